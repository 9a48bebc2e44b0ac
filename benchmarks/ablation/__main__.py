"""Command line of the ablation. The same command continues an ablation that was stopped."""

from __future__ import annotations

import argparse
import sys

from benchmarks.ablation import run
from simplclip.common.errors import UserError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m benchmarks.ablation", description=run.run.__doc__.partition("\n")[0])
    made.add_argument("config", help="YAML file or name of a built-in config")
    made.add_argument("--effects", required=True, help="YAML file of effects, or emoji for those of the demo")
    made.add_argument("--out", required=True, help="folder for the runs, effects.csv, effects.png and ablation.csv")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    made.add_argument("--seeds", type=int, default=3, help="seeds of each effect that names no number (default: 3)")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the CPU's threads (default: 1)")
    made.add_argument("--only", action="append", default=[], metavar="GLOB", help="only effects of this name or group")
    made.add_argument("--report", action="store_true", help="only write the tables of the runs that are done")
    return made


def main(arguments: list[str] | None = None) -> None:
    a = parser().parse_args(arguments)
    try:
        options = {"overrides": a.set, "seeds": a.seeds, "jobs": a.jobs, "only": a.only, "train": not a.report}
        path = run.run(a.config, a.effects, a.out, **options)
    except (UserError, OSError) as error:
        print(f"ablation: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("ablation: interrupted; the same command goes on")
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
