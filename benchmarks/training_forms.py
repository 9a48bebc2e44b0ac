"""Training siclip-tiny: our blocks and losses against the same weights in plain torch blocks with dense losses.

A step is forward, losses, backward, clipping and AdamW on random pairs held in memory; no loader. The forms start from the
same weights and take turns; their losses are compared first. The convolutions of the image trunk are the same in all.
"""

import copy

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor, nn

from benchmarks.block_forms import PlainBlock
from benchmarks.measure import BASE, compare, peak_mib
from simplclip import models
from simplclip.common import hardware
from simplclip.losses import ClipPMLoss, WIKDLoss
from simplclip.nn import SimplifiedBlock

AGAIN, PLAIN = f"{BASE}, blocks recomputed", "plain torch blocks, dense losses"
PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
OBJECTIVES = ("contrastive, pair matching", "and all of distillation")
WIDTH = 256


class PlainTowerBlock(PlainBlock):
    """A PlainBlock that can take the place of a tower's block."""

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        return super().forward(x)

    def get_weight_dtype(self) -> torch.dtype:
        return self.block.fc1.weight.dtype


def in_plain_torch(model: nn.Module) -> nn.Module:
    """Replaces the model's simplified blocks by plain torch ops that compute the same. Returns the model itself."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SimplifiedBlock):
                setattr(parent, name, PlainTowerBlock(child))
    return model


def wide_sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float32)


def dense_pair_matching(image: Tensor, text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    decision = weight * (image @ text.T) + bias
    n = len(image)
    positive = F.softplus(-decision.diagonal()).mean()
    negative = (wide_sum(F.softplus(decision)) - wide_sum(F.softplus(decision.diagonal()))) / (n * (n - 1))
    return 0.5 * (positive + negative)


class Dense(nn.Module):
    """The objective of one of our losses as open_clip and plain torch write it, with that loss's parameters."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, image, text, scale, *teacher) -> Tensor:
        total = dense_pair_matching(image, text, self.loss.plane_weight, self.loss.plane_bias)
        if not teacher:
            return total + ClipLoss()(image, text, scale)
        labels = torch.arange(len(image), device=image.device)
        across = zip((image, text), (teacher[1], teacher[0]))
        total = total + 0.5 * sum(F.cross_entropy(scale * student @ other.T, labels) for student, other in across)
        same = zip((image, text), teacher[:2])
        total = total + 0.5 * sum(F.mse_loss(F.normalize(s, dim=1), F.normalize(t, dim=1)) for s, t in same)
        return total + sum(DistillClipLoss()(image, text, scale, *teacher))


class Ours(nn.Module):
    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, image, text, scale, *teacher) -> Tensor:
        return sum(self.loss(image, text, scale, *teacher, output_dict=True).values())


class Run:
    """One form with its own optimizer."""

    def __init__(self, model: nn.Module, loss: nn.Module, precision: str):
        self.model, self.loss, self.precision = model, loss, precision
        self.parameters = [*model.parameters(), *loss.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, fused=True)

    def forward(self, image, text, teacher) -> Tensor:
        with hardware.autocast(self.precision, image.device):
            x, y = self.model.encode_image(image, normalize=True), self.model.encode_text(text, normalize=True)
            return self.loss(x, y, self.model.logit_scale.exp(), *teacher)

    def step(self, *pairs) -> Tensor:
        loss = self.forward(*pairs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss.detach()


def make(batch: int, dtype: str, distil: bool, device: str) -> tuple[dict[str, Run], tuple]:
    torch.manual_seed(0)
    model = models.create("siclip-tiny").train().to(device)
    weights = {"interactive_weight": 1.0, "feature_weight": 1.0, "pm_weight": 1.0}
    loss = WIKDLoss(**weights, embed_dim=WIDTH, teacher_dim=WIDTH) if distil else ClipPMLoss()
    loss = loss.to(device)
    forms = {}
    for form in (BASE, AGAIN, PLAIN):
        own_model, own_loss = copy.deepcopy(model), copy.deepcopy(loss)
        for module in own_model.modules():
            if isinstance(module, SimplifiedBlock):
                module.recompute = form == AGAIN
        if form == PLAIN:
            own_model = in_plain_torch(own_model)
        forms[form] = Run(own_model, (Dense if form == PLAIN else Ours)(own_loss), PRECISION[dtype])
    teacher = [F.normalize(torch.randn(batch, WIDTH), dim=1) for _ in range(2)] + [torch.tensor(50.0)]
    teacher = [t.to(device) for t in teacher] if distil else []
    return forms, (torch.rand(batch, 3, 48, 48).to(device), torch.randint(1, 8000, (batch, 16)).to(device), teacher)


def measure(objective: str, batch: int, dtype: str, device: str, repeats: int, strict: bool = True) -> list[dict]:
    """Returns a row for each form. Compares their losses first. strict: as for `compare`."""
    forms, pairs = make(batch, dtype, "distillation" in objective, device)
    cases = {form: lambda run=run: run.step(*pairs) for form, run in forms.items()}

    def wrong(name: str, loss: Tensor, ours: Tensor) -> str:
        if abs(loss - ours) <= (1e-4 if dtype == "float32" else 2e-2) * abs(ours):
            return ""
        return f"{name}: expected the loss of {BASE}, {ours}, got {loss}"

    what = {"op": "training", "objective": objective, "n": batch, "shape": "siclip-tiny", "dtype": dtype, "pass": "step"}
    rows = compare(what, cases, repeats, wrong=wrong, strict=strict)
    for row in rows:
        if "p50_ms" in row:
            row["samples_per_s"] = round(1e3 * batch / row["p50_ms"])
            row["extra_mib"] = peak_mib(cases[row["form"]], device)
    return rows
