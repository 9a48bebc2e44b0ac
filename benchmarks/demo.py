"""Keeps the figures of a finished demo as a result file.

python -m benchmarks.demo runs/siclip-lite0-emoji
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from benchmarks.results_file import describe, read_csv, result_path
from simplclip.common.files import write_atomically


def main() -> None:
    run, where = Path(sys.argv[1]), describe()
    result = json.loads((run / "evaluation.json").read_text()) | where
    result["samples_per_second"] = statistics.median(
        float(row["samples_per_s"]) for row in read_csv(run / "metrics.csv")
    )
    path = result_path("demo", where, ".json")
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
