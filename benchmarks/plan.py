"""Plans a student on a 24 GiB card beside the model that it is made from, trained whole by open_clip: no GPU is needed.

    python -m benchmarks.plan siclip-s0 siclip2-s0

Every row is a row of `simplclip plan NAME --memory rtx-3090 --teacher-width 768` with the changes named.
"""

from __future__ import annotations

import json
import sys

from benchmarks import hardware
from benchmarks.results_file import RESULTS
from benchmarks.steps import OpenClipStep
from simplclip import models
from simplclip.common.files import write_atomically
from simplclip.memory.measure import predict
from simplclip.memory.plan import MOST_PAIRS, Budget, Planner, largest, parse_memory
from simplclip.memory.report import as_dict
from simplclip.train import config

CARD, TEACHER_WIDTH = "rtx-3090", 768
PLAIN = ["data.captions_per_image=1", "loss.feature_weight=0", "loss.interactive_weight=0"]
SAME = ["loss.pm_weight=0", "loss.relational_weight=1"]  # what open_clip's DistillClipLoss computes
WIKD = [f"loss.{name}=1" for name in ("relational_weight", "interactive_weight", "feature_weight", "pm_weight")]
WHOLE = ["inherit={}", "model.freeze_norms=true"]
CASES = {
    "all of it trained": [*WHOLE, *SAME],
    "all of it trained, blocks recomputed": [*WHOLE, *SAME, "model.recompute=true"],
    "inherited and frozen": SAME,
    "inherited and frozen, all of WIKD and pair matching": WIKD,
}


def run(name: str) -> None:
    budget, plans = Budget(parse_memory(CARD)), {}
    for case, changes in CASES.items():
        # The changes replace the config's three stages, which would be the same in all rows.
        planner = Planner(config.load(name, [*PLAIN, *changes]), budget, teacher_width=TEACHER_WIDTH, tell=print)
        plans[case] = as_dict(planner, list(planner.rows())) | {"changes": changes}
    other = models.original(config.load(name, []).model.name)
    fits, peaks = largest(
        lambda pairs: predict(OpenClipStep(other, pairs, planner.precision, TEACHER_WIDTH), planner.device).peak,
        budget.usable, range(1, MOST_PAIRS), start=64,
    )  # fmt: skip
    compared = {"what": f"{other}, DistillClipLoss", "batch_size": fits, "peak": peaks.get(fits)}
    where = hardware.describe()
    result = {"model": name, "card": CARD, "teacher_width": TEACHER_WIDTH, "plans": plans, "open_clip": compared} | where
    path = RESULTS / f"plan-{name}-{where['date']}.json"
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ("siclip-s0", "siclip2-s0"):
        run(wanted)
