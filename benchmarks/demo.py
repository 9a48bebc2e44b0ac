"""Keeps the figures of a finished demo or ablation as result files.

python -m benchmarks.demo runs/siclip-lite0-emoji
python -m benchmarks.demo runs/ablation
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

from benchmarks import hardware
from benchmarks.ablation.tables import draw
from benchmarks.results_file import RESULTS, write_csv
from simplclip.common.files import write_atomically


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def keep_demo(run: Path, where: dict[str, str], name: str) -> Path:
    result = json.loads((run / "evaluation.json").read_text()) | where
    result["samples_per_second"] = statistics.median(float(row["samples_per_s"]) for row in read(run / "metrics.csv"))
    write_atomically(RESULTS / f"demo-{name}.json", json.dumps(result, indent=2) + "\n")
    return RESULTS / f"demo-{name}.json"


def keep_ablation(run: Path, where: dict[str, str], name: str) -> Path:
    """Writes the effects that have at least three seeds, and the runs to a second file. Returns the first file."""
    effects = [row for row in read(run / "effects.csv") if row["p"] and int(row["seeds"]) >= 3]
    write_csv(RESULTS / f"ablation-{name}.csv", [row | where for row in effects])
    write_csv(RESULTS / f"ablation_runs-{name}.csv", [row | where for row in read(run / "ablation.csv")])
    draw(RESULTS / f"ablation-{name}.png", effects, "siclip-lite0 on the built-in data: what each setting changes")
    return RESULTS / f"ablation-{name}.csv"


def main() -> None:
    run, where = Path(sys.argv[1]), hardware.describe()
    keep = keep_ablation if (run / "effects.csv").exists() else keep_demo
    name = f"{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}"
    print(f"wrote {keep(run, where, name)}")


if __name__ == "__main__":
    main()
