"""Training siclip-tiny: our blocks and losses against plain torch blocks with dense losses.

A step is forward, contrastive and pair matching loss, backward, clipping and AdamW on random pairs
held in memory; no loader. The forms start from the same weights and take turns; their losses are
compared first. The convolutions of the image trunk are the same in all.
"""

import copy
from functools import partial

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from benchmarks.block_forms import PlainBlock
from benchmarks.measure import BASE, compare, peak_mib
from benchmarks.similarity_forms import pair_matching
from simplclip import models
from simplclip.common import hardware
from simplclip.losses import ClipPMLoss
from simplclip.nn import SimplifiedBlock

PLAIN = "plain torch blocks, dense losses"
PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class PlainTowerBlock(PlainBlock):
    """A PlainBlock that can take the place of a tower's block."""

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        return super().forward(x)

    def get_weight_dtype(self) -> torch.dtype:
        return self.block.fc1.weight.dtype


def in_plain_torch(model: nn.Module) -> nn.Module:
    """Replaces the model's simplified blocks by plain torch ops that compute the same.

    Returns the model itself.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SimplifiedBlock):
                setattr(parent, name, PlainTowerBlock(child))
    return model


class DenseLoss(ClipPMLoss):
    """ClipPMLoss as open_clip and plain torch write it."""

    def forward(self, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        matching = pair_matching(image @ text.T, self.plane_weight, self.plane_bias)
        return matching + ClipLoss()(image, text, scale)


class Run:
    """One form with its own optimizer."""

    def __init__(self, model: nn.Module, loss: nn.Module, precision: str):
        self.model = model
        self.loss = loss
        self.precision = precision
        self.parameters = [*model.parameters(), *loss.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)

    def step(self, image: Tensor, text: Tensor) -> Tensor:
        with hardware.autocast(self.precision, image.device):
            x = self.model.encode_image(image, normalize=True)
            y = self.model.encode_text(text, normalize=True)
            loss = self.loss(x, y, self.model.logit_scale.exp())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()


def measure(batch: int, dtype: str, device: str, repeats: int, strict: bool = True) -> list[dict]:
    """Returns a row for each form. Compares their losses first. strict: as for `compare`."""
    torch.manual_seed(0)
    cases = {}
    model = models.create("siclip-tiny").train().to(device)
    image = torch.rand(batch, 3, 48, 48).to(device)
    text = torch.randint(1, 8000, (batch, 16)).to(device)
    for form in (BASE, PLAIN):
        copied, loss = copy.deepcopy(model), ClipPMLoss()
        if form == PLAIN:
            copied, loss = in_plain_torch(copied), DenseLoss()
        run = Run(copied, loss.to(device), PRECISION[dtype])
        cases[form] = partial(run.step, image, text)
    tolerance = 1e-4 if dtype == "float32" else 2e-2

    def wrong(name: str, loss: Tensor, ours: Tensor) -> str:
        if abs(loss - ours) <= tolerance * abs(ours):
            return ""
        return f"{name}: expected the loss of {BASE}, {ours}, got {loss}"

    what = {
        "op": "training",
        "objective": "contrastive, pair matching",
        "n": batch,
        "shape": "siclip-tiny",
        "dtype": dtype,
        "pass": "step",
    }
    rows = compare(what, cases, repeats, wrong=wrong, strict=strict)
    for row in rows:
        if "p50_ms" in row:
            row["samples_per_s"] = round(1e3 * batch / row["p50_ms"])
            row["extra_mib"] = round(peak_mib(cases[row["form"]], device), 1)
    return rows
