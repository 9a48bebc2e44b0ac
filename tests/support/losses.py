"""Inputs of loss modules, and losses of rows for RowwiseLoss with their dense form."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip.losses import RowwiseLoss, base
from simplclip.selftest.calls import TEACHER, similarity_call

N, D = 150, 16  # three chunks of 50 rows, see `chunked`


def loss_inputs(
    n: int = 24,
    width: int = 16,
    teacher_width: int | None = None,
    dtype: torch.dtype = torch.float64,
    m: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the student's features, scale and bias as leaves, and the teacher's features and
    scale, for a loss module of n images and m texts, by default as many.
    """
    shape = {"teacher_width": teacher_width, "width": width}
    call = similarity_call(n, m or n, terms=("relational",), scale=14.0, bias=-3.0, **shape)
    tensors = call.typed(dtype)
    teacher = [tensors.pop(name) for name in TEACHER]
    return [t.requires_grad_() for t in tensors.values()], teacher


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
    n: int = N, m: int = N, dtype: torch.dtype = torch.float64, width: int = D
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the inputs of a loss of rows: n images and m texts; see `loss_inputs`."""
    return loss_inputs(n, width, dtype=dtype, m=m)


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
    return loss(*leaves, **dict(zip(base.TEACHER, teacher)))


def chunked(*args: Any, **options: Any) -> RowwiseLoss:
    """Returns a RowwiseLoss whose chunks have the least number of rows, 64."""
    loss = RowwiseLoss(*args, **options)
    loss.scratch_bytes = 1
    return loss
