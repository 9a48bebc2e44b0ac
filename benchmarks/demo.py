"""Keeps the figures of a finished demo as a result file: `python -m benchmarks.demo runs/siclip-tiny-emoji`."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

from benchmarks import hardware
from simplclip.checkpoint import write_atomically

RESULTS = hardware.ROOT / "benchmarks" / "results"


def main() -> None:
    run = Path(sys.argv[1])
    with open(run / "metrics.csv", newline="") as file:
        metrics = list(csv.DictReader(file))
    result = json.loads((run / "evaluation.json").read_text())
    result |= hardware.describe()
    result["samples_per_second"] = statistics.median(float(row["samples_per_s"]) for row in metrics)
    name = f"demo-{hardware.slug(result['hardware'].split(',')[0])}-{result['date']}.json"
    write_atomically(RESULTS / name, json.dumps(result, indent=2) + "\n")
    print(f"wrote {RESULTS / name}")


if __name__ == "__main__":
    main()
