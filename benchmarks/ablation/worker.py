"""The process of one run of an ablation: trains, evaluates, and keeps the figures in place of the checkpoint.

python -m benchmarks.ablation.worker RUN.yaml PARENT [--keep]     PARENT: the process that started it
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation.effects import RESULT
from simplclip import evaluation, train
from simplclip.common import hardware
from simplclip.common.errors import UserError
from simplclip.common.files import write_atomically
from simplclip.models.trained import image_transform, load_model, tokenizer
from simplclip.train import config
from simplclip.train.config import Config

MATRIX = 1 << 26  # most similarities that `auc` computes


def follow(parent: int, period: float = 2.0) -> None:
    """Sends this process SIGTERM when its parent has ended, so that a killed ablation leaves no run behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(period)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def auc(split: evaluation.Split) -> float:
    """Returns the probability that a pair is more similar than an image and a caption of different groups. Unlike recall, it
    shows how well one threshold serves all queries. Of large splits it takes every k-th image, with its captions."""
    step = math.ceil(math.sqrt(len(split.groups) * len(split.caption_groups) / MATRIX))
    groups, caption_groups = split.groups[::step], split.caption_groups
    captions = torch.isin(caption_groups, groups).nonzero()[:, 0]
    similarity = split.image_features[:][::step] @ split.text_features[:][captions].T
    pairs = groups[:, None] == caption_groups[captions]
    matched, others = similarity[pairs], similarity[~pairs].sort().values
    below, upto = (torch.searchsorted(others, matched, right=right).double().mean() for right in (False, True))
    return float((below + upto) / 2 / len(others))


def result(values: Config) -> dict[str, Any]:
    """Returns figures of the finished run: AUC and R@k with its chance by split and direction; time per step; parameters."""
    out = Path(values.run.out)
    device = hardware.pick_device(values.run.device)
    precision, _ = hardware.pick_precision(values.run.precision, device)
    model, _, state = load_model(out / "last.pt", device)
    section = values.model.model_dump()
    splits = evaluation.load_splits(values.eval.splits, tokenizer(section), image_transform(section))
    found = {}
    for name, split in splits.items():
        evaluation.encode(model, split, evaluation.BATCH_SIZE, device, precision, workers=values.data.workers)
        found[name] = {**(evaluation.recall_of(split, device) or {}), "AUC": auc(split)}
    with open(out / "metrics.csv", newline="") as file:
        rates = [float(row["samples_per_s"]) for row in csv.DictReader(file)]
    return {
        "step": state["step"],
        "seconds_per_step": values.data.batch_size / statistics.median(rates),
        "parameters": sum(p.numel() for p in model.parameters()),
        "splits": found,
    }


def main(path: str, keep: bool = False) -> None:
    values = config.load(path)
    train.run(values, resume=True)
    out = Path(values.run.out)
    write_atomically(out / RESULT, json.dumps(result(values), indent=1) + "\n")
    if not keep:
        (out / "last.pt").unlink()


if __name__ == "__main__":
    follow(int(sys.argv[2]))
    try:
        main(sys.argv[1], "--keep" in sys.argv[3:])
    except train.Interrupted as stop:
        print(stop)
        sys.exit(130)
    except (UserError, OSError) as error:
        sys.exit(f"simplclip: {error}")
