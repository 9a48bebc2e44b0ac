"""Inputs of loss modules, and losses of rows for RowwiseLoss with their dense form."""

import torch
import torch.nn.functional as F
from torch import nn

from simplclip.losses import RowwiseLoss
from support.ops.calls import TEACHER, similarity_call

N, D = 150, 16  # three chunks of 50 rows, see `chunked`


def loss_inputs(n=24, width=16, teacher_width=None, dtype=torch.float64):
    """Returns the student's features, scale and bias as leaves, and the teacher's features and
    scale, for a loss module.
    """
    tensors = similarity_call(
        n, n, terms=("relational",), teacher_width=teacher_width, scale=14.0, width=width
    ).typed(dtype)
    teacher = [tensors.pop(name) for name in TEACHER]
    student = [*tensors.values(), torch.tensor(-3.0, dtype=tensors["logit_scale"].dtype)]
    return [t.requires_grad_() for t in student], teacher


def focal(logits, positives):
    cross_entropy = F.cross_entropy(logits, positives, reduction="none")
    return (1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy


def distilled(logits, positives, teacher_logits):
    kl = F.kl_div(logits.log_softmax(1), teacher_logits.softmax(1), reduction="none").sum(1)
    return kl + F.cross_entropy(logits, positives, reduction="none")


class Tempered(nn.Module):
    """A loss with parameters: a temperature, and a parameter that is not used."""

    def __init__(self):
        super().__init__()
        self.temperature, self.unused = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.ones(2))

    def forward(self, logits, positives):
        return F.cross_entropy(self.temperature * logits, positives, reduction="none")


def batch(n=N, m=N, dtype=torch.float64, width=D, seed=0):
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


def dense(fn, leaves, teacher=(), symmetric=True):
    image, text, scale, bias = leaves
    n, positives = image.shape[0], torch.arange(image.shape[0])
    matrices = [scale.to(image.dtype) * (image @ text.T) + bias.to(image.dtype)]
    if teacher:
        matrices.append(teacher[2].to(image.dtype) * (teacher[0] @ teacher[1].T))
    value = fn(matrices[0], positives, *matrices[1:]).mean()
    if not symmetric:
        return value
    return 0.5 * (
        value + fn(matrices[0][:, :n].T, positives, *(t[:, :n].T for t in matrices[1:])).mean()
    )


def call(loss, leaves, teacher=()):
    names = ("dist_image_features", "dist_text_features", "dist_logit_scale")
    return loss(*leaves, **dict(zip(names, teacher)))


def chunked(*args, **options):
    """Returns a RowwiseLoss whose chunks have the least number of rows, 64."""
    loss = RowwiseLoss(*args, **options)
    loss.scratch_bytes = 1
    return loss
