"""Inputs of loss modules, and losses of rows for RowwiseLoss with their dense form."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip.losses import RowwiseLoss
from simplclip.selftest.calls import TEACHER, similarity_call

N, D = 150, 16  # three chunks of 50 rows, see `chunked`


def loss_inputs(
    n: int = 24,
    width: int = 16,
    teacher_width: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the student's features, scale and bias as leaves, and the teacher's features and
    scale, for a loss module.
    """
    call = similarity_call(
        n, n, terms=("relational",), teacher_width=teacher_width, scale=14.0, width=width
    )
    tensors = call.typed(dtype)
    teacher = [tensors.pop(name) for name in TEACHER]
    student = [*tensors.values(), torch.tensor(-3.0, dtype=tensors["logit_scale"].dtype)]
    return [t.requires_grad_() for t in student], teacher


def focal(logits: Tensor, positives: Tensor) -> Tensor:
    cross_entropy = F.cross_entropy(logits, positives, reduction="none")
    return (1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy


def distilled(logits: Tensor, positives: Tensor, teacher_logits: Tensor) -> Tensor:
    kl = F.kl_div(logits.log_softmax(1), teacher_logits.softmax(1), reduction="none").sum(1)
    return kl + F.cross_entropy(logits, positives, reduction="none")


class Tempered(nn.Module):
    """A loss with parameters: a temperature, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, logits: Tensor, positives: Tensor) -> Tensor:
        return F.cross_entropy(self.temperature * logits, positives, reduction="none")


def batch(
    n: int = N, m: int = N, dtype: torch.dtype = torch.float64, width: int = D, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns image, text, logit_scale, logit_bias as leaves; then a teacher's features and
    scale.
    """
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, width, generator=g, dtype=torch.float64) for rows in (n, m))
    text[:n] += image
    teacher = [
        F.normalize(t + 0.5 * torch.randn(t.shape, generator=g), dim=1).to(dtype)
        for t in (image, text)
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias, teacher_scale = (torch.tensor(value, dtype=wide) for value in (12.0, -0.5, 9.0))
    leaves = [F.normalize(image, dim=1).to(dtype), F.normalize(text, dim=1).to(dtype), scale, bias]
    return [t.requires_grad_() for t in leaves], [*teacher, teacher_scale]


def dense(
    fn: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    teacher: Sequence[Tensor] = (),
    symmetric: bool = True,
) -> Tensor:
    """Returns the loss of rows from the whole matrix."""
    image, text, scale, bias = leaves
    n = image.shape[0]
    positives = torch.arange(n)
    matrices = [scale.to(image.dtype) * (image @ text.T) + bias.to(image.dtype)]
    if teacher:
        matrices.append(teacher[2].to(image.dtype) * (teacher[0] @ teacher[1].T))
    row_loss = fn(matrices[0], positives, *matrices[1:]).mean()
    if not symmetric:
        return row_loss
    columns = [matrix[:, :n].T for matrix in matrices]
    return 0.5 * (row_loss + fn(columns[0], positives, *columns[1:]).mean())


def call(loss: nn.Module, leaves: Sequence[Tensor], teacher: Sequence[Tensor] = ()) -> Tensor:
    names = ("dist_image_features", "dist_text_features", "dist_logit_scale")
    return loss(*leaves, **dict(zip(names, teacher)))


def chunked(*args: Any, **options: Any) -> RowwiseLoss:
    """Returns a RowwiseLoss whose chunks have the least number of rows, 64."""
    loss = RowwiseLoss(*args, **options)
    loss.scratch_bytes = 1
    return loss
