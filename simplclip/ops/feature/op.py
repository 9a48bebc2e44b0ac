"""feature_loss: distance of normalised student and teacher features, in chunks of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.fields import accumulate_dtype
from simplclip.ops import checks
from simplclip.ops.modes import (
    autocast,
    autocasts,
    check_reverse_mode,
    first_order_only,
    transforms,
)

aten = torch.ops.aten
DISTANCES = ("mse", "smooth_l1")
NORM_EPS = 1e-12  # eps of F.normalize
SUM = 2  # aten's number of the reduction "sum"


def _chunks(*tensors: Tensor) -> zip:
    """Yields the same rows of each tensor, at most 4,096: bits depend on no number of threads."""
    megabytes = 1 if tensors[0].device.type == "cpu" else 16  # on a CPU, of its cache
    rows = min(4096, max(1, (megabytes << 20) // (tensors[0].shape[1] * 8)))
    return zip(*(t.split(rows) for t in tensors))


def _sums(student: Tensor, teacher: Tensor, beta: float | None, normalize: bool) -> Tensor:
    """Returns each row's distance [N] in differentiable torch; arguments as of _FeatureLoss."""
    dtype = accumulate_dtype(student.dtype)
    u, t = student.to(dtype), teacher.to(dtype)
    if normalize:
        u, t = F.normalize(u, dim=1), F.normalize(t, dim=1)
    if beta is None:
        return F.mse_loss(u, t, reduction="none").sum(1)
    return F.smooth_l1_loss(u, t, reduction="none", beta=beta).sum(1)


class _FeatureLoss(torch.autograd.Function):
    """feature_loss without checks, of (student, teacher, beta or None for mse, normalize)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, beta: float | None, normalize: bool
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.options = beta, normalize
        rows = _chunks(student, teacher)
        sums = [_sums(x, y, beta, normalize).sum() for x, y in rows]
        return torch.stack(sums).sum() / student.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher = ctx.saved_tensors
        beta, normalize = ctx.options
        d_student = torch.empty_like(student, memory_format=torch.contiguous_format)
        with torch.no_grad():
            factor = grad / student.shape[0]
            for x, y, out in _chunks(student, teacher, d_student):
                u, t = x.to(grad.dtype), y.to(grad.dtype)
                if normalize:
                    norm = u.norm(dim=1, keepdim=True).clamp_min_(NORM_EPS)
                    u, t = u / norm, F.normalize(t, dim=1)
                if beta is None:
                    g = aten.mse_loss_backward(factor, u, t, SUM)
                else:
                    g = aten.smooth_l1_loss_backward(factor, u, t, SUM, beta)
                if normalize:
                    # a shorter row was divided by a constant
                    along = (u * g).sum(1, keepdim=True).masked_fill_(norm <= NORM_EPS, 0)
                    g = g.addcmul_(u, along, value=-1).div_(norm)
                out.copy_(g)
        if torch.is_grad_enabled():  # with create_graph=True
            (d_student,) = first_order_only("feature_loss", (d_student,), student, grad)
        return d_student, None, None, None


def feature_loss(
    student: Tensor,  # [N, D], or [N, D_student] with a projection
    teacher: Tensor,  # [N, D]
    *,
    distance: str = "mse",
    beta: float = 1.0,
    normalize: bool = True,
    projection: Tensor | None = None,  # [D, D_student]
) -> Tensor:  # []
    r"""Distance of a student's features to a teacher's, which are constants: unimodal distillation.

    With u = student / max(‖student‖, eps) and t = teacher / max(‖teacher‖, eps) by rows, eps =
    1e-12 (or the features themselves if not `normalize`), the mean over the N rows of the sum over
    the D columns of

        "mse"        (u − t)²: the squared distance, for unit vectors 2 − 2 cos(u, t)
        "smooth_l1"  (u − t)² / (2 beta) where |u − t| < beta, else |u − t| − beta / 2, as in
                     F.smooth_l1_loss

    Args:
        student: [N, D] float32, bfloat16, float16 or float64; under autocast it is cast to
            autocast's dtype. Any strides.
        teacher: [N, D] on the same device, in any of these dtypes (e.g. stored float16 features),
            read without a cast. It gets no gradient; if it requires one, a warning is given once
            per process (not under torch.compile).
        distance: "mse" or "smooth_l1".
        beta: above 0; for "smooth_l1".
        projection: [D, D_student] in the student's dtype. `F.linear(student, projection)` is then
            compared to the teacher, so that the student's width may differ from the teacher's.

    Returns:
        The loss, 0-dimensional, float32 (float64 for a float64 student).

    Gradients flow to student and projection: with g = dloss/du, (g − u (u·g)) / ‖student‖; for a
    row shorter than eps, which is divided by a constant, g / eps. Saved for backward: the inputs.
    Extra memory: a few MiB (on a GPU tens of them), and O(N D) with a projection. It computes in
    float32 (float64 for float64). The same call has the same bits each time, on a CPU with any
    number of threads if there is no projection. Only first derivatives in reverse mode are
    supported. Compiled, it is the formula in plain torch.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and
            what it got.

    Source: feature distillation in CLIP-KD (Yang et al. 2023, arXiv 2307.12732); unimodal stage of
    WIKD (arXiv 2411.14789).
    """
    checks.check_features("student", student, "[N, D]")
    checks.check_features("teacher", teacher, "[N, D]")
    checks.check_device("teacher", teacher, "student", student.device)
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(
            f"teacher: expected one row for each of student's {student.shape[0]}, got "
            f"{teacher.shape[0]}"
        )
    checks.check_choice("distance", distance, DISTANCES)
    checks.check_boolean("normalize", normalize)
    beta = checks.number("beta", beta)
    if beta < torch.finfo(torch.float32).tiny:
        raise ValueError(f"beta: expected a finite number above 0 (in float32), got {beta}")
    if projection is not None:
        student = _project(student, projection, teacher.shape[1])
    elif teacher.shape[1] != student.shape[1]:
        raise ValueError(
            f"student: expected the width of teacher, {teacher.shape[1]}, or a projection "
            f"[{teacher.shape[1]}, {student.shape[1]}], got width {student.shape[1]}"
        )
    (student,) = autocast(student)
    arguments = (
        student,
        checks.constant("teacher", teacher),
        None if distance == "mse" else beta,
        normalize,
    )
    if torch.compiler.is_compiling():
        return _sums(*arguments).mean()
    check_reverse_mode("feature_loss", arguments)
    if transforms():  # torch.vmap maps plain torch
        return _sums(*arguments).mean()
    return _FeatureLoss.apply(*arguments)


def _project(student: Tensor, projection: Any, width: int) -> Tensor:  # [N, width]
    """Returns student projectionᵀ; raises TypeError or ValueError if it does not fit."""
    shape = [width, student.shape[1]]
    if not isinstance(projection, Tensor):
        raise TypeError(
            f"projection: expected a tensor [D, D_student] = {shape}, got "
            f"{type(projection).__name__}"
        )
    if list(projection.shape) != shape:
        raise ValueError(
            f"projection: expected shape [D, D_student] = {shape}, got "
            f"{checks.shape_of(projection)}"
        )
    checks.check_device("projection", projection, "student", student.device)
    # Autocast casts both, unless one is float64.
    cast = autocasts(student.device) and torch.float64 not in (student.dtype, projection.dtype)
    if projection.dtype != student.dtype and not (cast and projection.is_floating_point()):
        raise TypeError(
            f"projection: expected the dtype of student, {student.dtype}, got {projection.dtype}"
        )
    return F.linear(student, projection)
