"""Measures how strongly each term of the loss pulls at the features over a run (the norm of its gradient), and compares pair
matching's plane with the best plane for the features of that step.

python -m benchmarks.gradients [--set KEY=VALUE ...]     of the demo's config with pair matching 1, 150 steps of 128 pairs
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import hardware
from benchmarks.results_file import RESULTS, table, write_csv
from simplclip.common import hardware as devices
from simplclip.train import config
from simplclip.train.batches import batches
from simplclip.train.state import Training
from simplclip.train.step import train_step

STEPS = (0, 10, 25, 50, 100, 149)


def best_plane(matched: Tensor, others: Tensor) -> tuple[float, float]:
    """Returns the p and q that minimise the pair matching loss of these cosines."""
    plane = torch.tensor([10.0, -2.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([plane], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        p, q = plane
        value = 0.5 * (F.softplus(-(p * matched + q)).mean() + F.softplus(p * others + q).mean())
        value.backward()
        return value

    optimizer.step(loss)
    return plane[0].item(), plane[1].item()


def row(this: Training, batches: list[dict[str, Any]]) -> dict[str, Any]:
    with torch.no_grad():
        features = [torch.cat([encode(b) for b in batches]).float() for encode in (this.encode_image, this.encode_text)]
    image, text = (t.requires_grad_() for t in features)
    found: dict[str, Any] = {"step": this.step}
    objective = this.objective
    for name in objective.schedules:
        this.objective = objective.alone(name)
        gradients = torch.autograd.grad(this.terms(batches, image, text)[0], (image, text))
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        found |= {f"{name.removesuffix('_loss')} gradient": round(norm, 4)}
    this.objective = objective
    captions = len(text) // len(image)
    groups = torch.cat([b["group"] for b in batches]).repeat_interleave(captions)
    similarity = (image.repeat_interleave(captions, 0) @ text.T).detach()
    matched, others = similarity.diagonal(), similarity[groups[:, None] != groups]
    p, q = best_plane(matched, others)
    found |= {"cosine of pairs": round(matched.mean().item(), 3), "of others": round(others.mean().item(), 3)}
    found |= {"p": round(this.loss.plane_weight.item(), 2), "q": round(this.loss.plane_bias.item(), 2)}
    return found | {"best p": round(p, 2), "best q": round(q, 2)}


def main() -> None:
    changes = [word for word in sys.argv[1:] if word != "--set"]
    base = ["loss.pm_weight=1", "run.steps=150", "data.batch_size=128", "data.workers=0", "run.out=none"]
    values = config.load("examples/emoji/siclip-lite0.yaml", [*base, *changes])
    if values.loss.base == "sigmoid":
        sys.exit("loss.base: expected contrastive, since sigmoid and pair matching are trained by the gradient of their sum")
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    device = devices.pick_device("cpu")
    this = Training(values, device, devices.pick_precision(values.run.precision, device)[0])
    this.model.train()
    rows = []
    for of_step in batches(this, show=lambda line: None):
        if this.step in STEPS:
            rows.append(row(this, of_step))
        train_step(this, of_step)
        if this.step == values.run.steps:
            break
    print("\n".join(table(rows)))
    where = hardware.describe()
    path = RESULTS / f"gradients-{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
