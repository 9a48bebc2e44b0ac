"""The losses as simplclip, open_clip, torch.compile and others compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor

from simplclip.losses import WIKDLoss
from simplclip.ops import similarity_loss

WIDTH = 512
SCALE = 50.0
PLANE = (10.0, -2.0)
CHUNK = 1024  # rows of a chunk of open_clip's main branch


@dataclass
class Batch:
    image: Tensor  # [N, D], a leaf
    text: Tensor  # [N, D], a leaf
    scale: Tensor  # [], a leaf
    bias: Tensor  # [], a leaf
    teacher_image: Tensor  # [N, D]
    teacher_text: Tensor  # [N, D]
    teacher_scale: Tensor  # []

    def step(self, loss_function: Callable[[Batch], Tensor]) -> Tensor:
        """Runs forward and backward. Returns the loss."""
        for leaf in (self.image, self.text, self.scale, self.bias):
            leaf.grad = None
        loss = loss_function(self)
        loss.backward()
        return loss.detach()


def batch(n: int, dtype: torch.dtype, device: str) -> Batch:
    """Makes partly matched unit features, and features of a teacher near them."""
    generator = torch.Generator().manual_seed(0)

    def unit() -> Tensor:
        return F.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)

    image = unit()
    text = F.normalize(image + 4 * unit(), dim=1)
    teacher_image, teacher_text = (F.normalize(t + unit(), dim=1) for t in (image, text))
    student = [t.to(device, dtype).requires_grad_() for t in (image, text)]
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    teacher = [t.to(device, dtype) for t in (teacher_image, teacher_text)]
    return Batch(*student, scale, bias, *teacher, torch.tensor(60.0, device=device))


def _ours(*terms: str) -> Callable[[Batch], Tensor]:
    options: dict[str, Any] = {"terms": terms, "weights": dict.fromkeys(terms, 1.0)}
    if "pair_matching" in terms:
        options["plane"] = PLANE

    def run(b: Batch) -> Tensor:
        bias = b.bias if "sigmoid" in terms else None
        return similarity_loss(b.image, b.text, b.scale, logit_bias=bias, **options)["loss"]

    return run


def _all_terms(b: Batch) -> Tensor:
    # its plane begins as PLANE
    loss = WIKDLoss(interactive_weight=1.0, pm_weight=1.0).to(b.image.device)
    return sum(loss(b.image, b.text, b.scale, b.teacher_image, b.teacher_text, b.teacher_scale))


def _clip_loss(b: Batch) -> Tensor:
    return ClipLoss()(b.image, b.text, b.scale)


def _siglip_loss(b: Batch) -> Tensor:
    return SigLipLoss()(b.image, b.text, b.scale, b.bias)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float32)


def pair_matching(similarity: Tensor, weight: Tensor | float, bias: Tensor | float) -> Tensor:
    """Computes the pair matching loss of a dense matrix [N, N]."""
    decision = weight * similarity + bias
    n = similarity.shape[0]
    positive = F.softplus(-decision.diagonal())
    negative = (_sum(F.softplus(decision)) - _sum(F.softplus(decision.diagonal()))) / (n * (n - 1))
    return 0.5 * (positive.mean() + negative)


def _interactive(b: Batch) -> Tensor:
    labels = torch.arange(b.image.shape[0], device=b.image.device)
    by_image = F.cross_entropy(b.scale * b.image @ b.teacher_text.T, labels)
    return 0.5 * (by_image + F.cross_entropy(b.scale * b.text @ b.teacher_image.T, labels))


def _clip_loss_and_matching(b: Batch) -> Tensor:
    return _clip_loss(b) + pair_matching(b.image @ b.text.T, *PLANE)


def _distillation_of_open_clip(b: Batch) -> Tensor:
    """open_clip.DistillClipLoss, pair matching by one more product, and the interactive term."""
    student = b.image, b.text, b.scale
    teacher = b.teacher_image, b.teacher_text, b.teacher_scale
    distilled = sum(DistillClipLoss()(*student, *teacher))
    return distilled + pair_matching(b.image @ b.text.T, *PLANE) + _interactive(b)


# The compiled forms compute each matrix of similarities once, as torch.compile likes it.
def _contrastive_of(logits: Tensor) -> Tensor:
    diagonal = logits.diagonal()
    return 0.5 * ((logits.logsumexp(1) - diagonal).mean() + (logits.logsumexp(0) - diagonal).mean())


def _one_product(b: Batch) -> Tensor:
    return _contrastive_of(b.scale * (b.image @ b.text.T))


def _one_product_and_matching(b: Batch) -> Tensor:
    similarity = b.image @ b.text.T
    return _contrastive_of(b.scale * similarity) + pair_matching(similarity, *PLANE)


def _one_product_sigmoid(b: Batch) -> Tensor:
    logits = b.scale * (b.image @ b.text.T) + b.bias
    return (_sum(F.softplus(logits)) - _sum(logits.diagonal())) / b.image.shape[0]


def _fewest_products(b: Batch) -> Tensor:
    similarity = b.image @ b.text.T
    logits, teacher = b.scale * similarity, b.teacher_scale * (b.teacher_image @ b.teacher_text.T)
    loss = _contrastive_of(logits) + pair_matching(similarity, *PLANE) + _interactive(b)
    for dim in (0, 1):
        products = teacher.softmax(dim) * logits.log_softmax(dim)
        loss = loss - 0.5 * products.sum(dim).mean(dtype=torch.float32)
    return loss


def _siglip_loss_in_chunks(b: Batch) -> Tensor:
    """SigLipLoss(chunk_size=CHUNK) of open_clip's main branch (4.2.0.dev0), not in 3.3."""
    total = torch.zeros((), device=b.image.device)
    for first in range(0, b.image.shape[0], CHUNK):
        logits = b.scale * b.image[first : first + CHUNK] @ b.text.T
        logits += b.bias
        rows = torch.arange(logits.shape[0], device=logits.device)
        total = total + _sum(F.softplus(logits)) - _sum(logits[rows, first + rows])
    return total / b.image.shape[0]


def _linear_cross_entropy(b: Batch) -> Tensor:
    """The contrastive loss by torch's linear_cross_entropy in chunks, one call a direction."""
    labels = torch.arange(b.image.shape[0], device=b.image.device)
    chunks = torch.nn.LinearCrossEntropyOptions()
    scale = b.scale.to(b.image.dtype)
    by_image = F.linear_cross_entropy(scale * b.image, b.text, labels, options=chunks)
    by_text = F.linear_cross_entropy(scale * b.text, b.image, labels, options=chunks)
    return 0.5 * (by_image + by_text)


def _siglip_kernel(b: Batch) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(b.image, b.text, b.scale.log(), b.bias)


def _memeff(b: Batch) -> Tensor:  # gives the scale no gradient
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)(b.image, b.text)


# By loss and form. "compiled" runs through torch.compile.
LOSSES: dict[str, dict[str, Callable[[Batch], Tensor]]] = {
    "contrastive": {
        "simplclip": _ours("contrastive"),
        "open_clip": _clip_loss,
        "compiled": _one_product,
        "linear_cross_entropy": _linear_cross_entropy,
        "memeff": _memeff,
    },
    "matching": {
        "simplclip": _ours("contrastive", "pair_matching"),
        "open_clip": _clip_loss_and_matching,
        "compiled": _one_product_and_matching,
    },
    "sigmoid": {
        "simplclip": _ours("sigmoid"),
        "open_clip": _siglip_loss,
        "open_clip_chunks": _siglip_loss_in_chunks,
        "compiled": _one_product_sigmoid,
        "siglip_kernel": _siglip_kernel,
    },
    "distillation": {
        "simplclip": _all_terms,
        "open_clip": _distillation_of_open_clip,
        "compiled": _fewest_products,
    },
}


def make(loss: str, form: str, n: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """Returns a function that runs forward and backward of a form, and returns the loss."""
    function = LOSSES[loss][form]
    if form == "compiled":
        function = torch.compile(function, dynamic=False)
    return partial(batch(n, dtype, device).step, function)
