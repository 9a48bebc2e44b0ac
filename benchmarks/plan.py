"""Plans a student on a 24 GiB card beside the model that it is made from, trained whole by open_clip: no GPU is needed.

    python -m benchmarks.plan siclip-s0 siclip2-s0

Every row is an answer of `simplclip plan NAME --memory rtx-3090 --teacher-width 768 --compare open_clip` with the changes
named; the picture of the third row is kept too.
"""

from __future__ import annotations

import json
import sys

from benchmarks import hardware
from benchmarks.results_file import RESULTS
from simplclip import memory as plan
from simplclip.common.files import write_atomically
from simplclip.memory import report
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
    budget = plan.Budget(plan.parse_memory(CARD))
    plans = {}
    for case, changes in CASES.items():
        # The changes replace the config's three stages, which would be the same in all rows.
        values = config.load(name, [*PLAIN, *changes])
        made = plan.make(values, budget, teacher_width=TEACHER_WIDTH, compare=not plans)
        plans[case] = report.as_dict(made) | {"changes": changes}
        if len(plans) == 3:
            report.draw(RESULTS / f"plan-{name}.png", made)
    where = hardware.describe()
    result = {"model": name, "card": CARD, "teacher_width": TEACHER_WIDTH, "plans": plans} | where
    path = RESULTS / f"plan-{name}-{where['date']}.json"
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ("siclip-s0", "siclip2-s0"):
        run(wanted)
