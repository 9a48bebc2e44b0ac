"""Plans siclip-s0 on a 24 GiB card beside the model that it is made from, trained whole by open_clip: no GPU is needed.

A row is that of `simplclip plan siclip-s0 --memory rtx-3090 --teacher-width 768` with the settings of CASES. Writes
benchmarks/results/plan-siclip-s0-*.csv.
"""

from __future__ import annotations

import torch

from benchmarks.results_file import RESULTS, table, versions, write_csv
from benchmarks.steps import ORIGINALS, TEACHER_WIDTH, OpenClipStep
from simplclip.plan.cards import parse_memory
from simplclip.plan.measure import predict
from simplclip.plan.search import MOST_PAIRS, Budget, Planner, largest
from simplclip.train import config

NAME, CARD = "siclip-s0", "rtx-3090"
# What open_clip's DistillClipLoss computes.
LOSS = ["data.captions_per_image=1", "loss.relational_weight=1", "loss.feature_weight=0"]
LOSS += ["loss.interactive_weight=0", "loss.pm_weight=0"]
CASES = {"all of it trained": [*LOSS, "inherit={}", "model.freeze_norms=true"], "inherited and frozen": LOSS}


def main() -> None:
    budget, device = Budget(parse_memory(CARD)), torch.device("cuda", 0)
    whole = ORIGINALS[NAME]
    dense, _ = largest(
        lambda pairs: predict(OpenClipStep(whole, pairs, "bf16", TEACHER_WIDTH), device).peak,
        budget.usable, range(1, MOST_PAIRS), start=64,
    )  # fmt: skip
    rows = [{"form": f"open_clip: {whole}, DistillClipLoss", "pairs": dense, "times_open_clip": 1.0}]
    for case, changes in CASES.items():
        planner = Planner(config.load(NAME, changes), budget, teacher_width=TEACHER_WIDTH, tell=print)
        pairs = next(row for row in planner.rows() if row.what == "largest in one graph").batch_size
        rows.append({"form": f"{NAME}, {case}", "pairs": pairs, "times_open_clip": round(pairs / dense, 1)})
    print("\n".join(table(rows)))
    where = versions()
    path = RESULTS / f"plan-{NAME}-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
