"""Measures how strongly each term of the loss pulls at the features over a run (the norm of its gradient), and compares pair
matching's plane with the best plane for the features of that step.

python -m benchmarks.gradients [--set KEY=VALUE ...]     of the demo's config with pair matching 1, 150 steps of 128 pairs
"""

from __future__ import annotations

import copy
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
from simplclip.train.config import Schedule
from simplclip.train.loop import make_loader
from simplclip.train.objective import Objective
from simplclip.train.setup import State, setup
from simplclip.train.step import encode_image, encode_text, losses, train_step

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


def alone(objective: Objective, term: str) -> Objective:
    """Returns the objective with this term alone; the others have weight 0 at every step."""
    other, off = copy.copy(objective), Schedule(value=0)
    other.schedules = {name: schedule if name == term else off for name, schedule in objective.schedules.items()}
    return other


def row(state: State, batches: list[dict[str, Any]]) -> dict[str, Any]:
    with torch.no_grad():
        features = [torch.cat([encode(state, b) for b in batches]).float() for encode in (encode_image, encode_text)]
    image, text = (t.requires_grad_() for t in features)
    found: dict[str, Any] = {"step": state.step}
    objective = state.objective
    for name in objective.schedules:
        state.objective = alone(objective, name)
        gradients = torch.autograd.grad(losses(state, batches, image, text)[0], (image, text))
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        found |= {f"{name.removesuffix('_loss')} gradient": round(norm, 4)}
    state.objective = objective
    captions = len(text) // len(image)
    groups = torch.cat([b["group"] for b in batches]).repeat_interleave(captions)
    similarity = (image.repeat_interleave(captions, 0) @ text.T).detach()
    matched, others = similarity.diagonal(), similarity[groups[:, None] != groups]
    p, q = best_plane(matched, others)
    found |= {"cosine of pairs": round(matched.mean().item(), 3), "of others": round(others.mean().item(), 3)}
    found |= {"p": round(objective.loss.plane_weight.item(), 2), "q": round(objective.loss.plane_bias.item(), 2)}
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
    state = setup(values, device, devices.pick_precision(values.run.precision, device)[0])
    rows = []
    for batch in make_loader(state)[0]:
        if state.step in STEPS:
            rows.append(row(state, [batch]))
        train_step(state, [batch])
        if state.step == values.run.steps:
            break
    print("\n".join(table(rows)))
    where = hardware.describe()
    path = RESULTS / f"gradients-{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
