"""Plans siclip2-s0 on a 24 GiB card beside MobileCLIP2-S0 in open_clip: `python -m benchmarks.plan` (no GPU is needed).

Every row is an answer of `simplclip plan siclip2-s0 --memory rtx-3090 --teacher-width 768 --compare open_clip` with the
changes named; the first one's picture is kept too.
"""

from __future__ import annotations

import json

from benchmarks import hardware
from benchmarks.results_file import RESULTS
from simplclip import memory as plan
from simplclip.common.files import write_atomically
from simplclip.memory import report
from simplclip.train import config

CARD, TEACHER_WIDTH = "rtx-3090", 768
SAME = ["loss.pm_weight=0", "loss.relational_weight=1"]  # what open_clip's DistillClipLoss computes
WIKD = ["loss.relational_weight=1", "loss.interactive_weight=1", "loss.feature_weight=1", "loss.projection=true"]
WHOLE = ["inherit.source=null", "model.freeze_norms=true"]
CASES = {
    "all of it trained": [*WHOLE, *SAME],
    "all of it trained, blocks recomputed": [*WHOLE, *SAME, "model.recompute=true"],
    "inherited and frozen": SAME,
    "inherited and frozen, all of WIKD and pair matching": WIKD,
}


def main() -> None:
    budget = plan.Budget(plan.parse_memory(CARD))
    plans = {}
    for name, changes in CASES.items():
        made = plan.make(
            config.load("siclip2-s0", changes), budget, teacher_width=TEACHER_WIDTH, compare=not plans, show=print
        )
        plans[name] = report.as_dict(made) | {"changes": changes}
        if len(plans) == 3:
            report.draw(RESULTS / "plan-siclip2-s0.png", made)
    where = hardware.describe()
    result = {"card": CARD, "teacher_width": TEACHER_WIDTH, "plans": plans} | where
    path = RESULTS / f"plan-siclip2-s0-{where['date']}.json"
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
