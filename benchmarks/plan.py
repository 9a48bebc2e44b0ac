"""Plans siclip-s0 on a 24 GiB card beside the model that it is made from, trained whole by open_clip: no GPU is needed.

A row is that of `simplclip plan siclip-s0 --memory rtx-3090 --teacher-width 768` with the settings of CASES. Writes
benchmarks/results/plan-siclip-s0-*.csv.
"""

from __future__ import annotations

import datetime

import torch

from benchmarks import hardware
from benchmarks.results_file import RESULTS, table, write_csv
from benchmarks.steps import OpenClipStep
from simplclip import models
from simplclip.memory.measure import predict
from simplclip.memory.plan import MOST_PAIRS, Budget, Planner, largest, parse_memory
from simplclip.train import config

NAME, CARD, TEACHER_WIDTH = "siclip-s0", "rtx-3090", 768
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


def main() -> None:
    budget, device = Budget(parse_memory(CARD)), torch.device("cuda", 0)
    whole = models.spec_of(config.load(NAME, []).model.name).original
    dense, _ = largest(
        lambda pairs: predict(OpenClipStep(whole, pairs, "bf16", TEACHER_WIDTH), device).peak,
        budget.usable, range(1, MOST_PAIRS), start=64,
    )  # fmt: skip
    rows = [{"form": f"open_clip: {whole}, DistillClipLoss", "pairs": dense, "times_open_clip": 1.0}]
    for case, changes in CASES.items():
        planner = Planner(config.load(NAME, [*PLAIN, *changes]), budget, teacher_width=TEACHER_WIDTH, tell=print)
        one, cached = (row for row in planner.rows() if row.what.startswith("largest"))
        row = {"form": f"{NAME}, {case}", "pairs": one.batch_size, "times_open_clip": round(one.batch_size / dense, 1)}
        rows.append(row | {"cached_pairs": cached.batch_size, "micro_batch": cached.micro_batch})
    print("\n".join(table(rows)))
    where = {"torch": torch.__version__, "commit": hardware.commit(), "date": datetime.date.today().isoformat()}
    path = RESULTS / f"plan-{NAME}-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
