"""feature_loss: distance of normalised student and teacher features, the normalisation and its backward fused with it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops import backends, checks
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.feature import reference
from simplclip.ops.registry import autocast, call, define, register_autograd

DISTANCES = ("mse", "smooth_l1")


def _prepare(student, teacher):
    """Makes both contiguous, and casts a float64 teacher of another student, which the kernels do not read."""
    wide = teacher.dtype == torch.float64 and student.dtype != torch.float64
    return student.contiguous(), (teacher.float() if wide else teacher).contiguous()


def _fwd(function, student, teacher, *mode):
    return function(*_prepare(student, teacher), *mode)


def _fwd_fake(student, teacher, smooth, beta, normalize, backend):
    stats = {"dtype": accumulate_dtype(student.dtype)}
    return student.new_empty((), **stats), student.new_empty(2, student.shape[0] if normalize else 0, **stats)


def _bwd(function, grad, student, teacher, inv_norms, *mode):
    return function(grad.contiguous(), *_prepare(student, teacher), inv_norms, *mode)


def _bwd_fake(grad, student, teacher, inv_norms, *mode):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


define(
    "feature_loss_fwd",
    "Tensor student, Tensor teacher, bool smooth, float beta, bool normalize",
    "(Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    row=backends.row(reference.feature_loss_fwd, module="feature.op"),
)
define(
    "feature_loss_bwd",
    "Tensor grad, Tensor student, Tensor teacher, Tensor inv_norms, bool smooth, float beta",
    "Tensor",
    _bwd,
    _bwd_fake,
    row=backends.row(reference.feature_loss_bwd, module="feature.op"),
)


def _setup_context(ctx, inputs, output):
    student, teacher, smooth, beta, _normalize, backend = inputs
    _, inv_norms = output
    ctx.mark_non_differentiable(inv_norms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, inv_norms)
    ctx.mode = (smooth, beta, backend)


def _autograd(ctx, grad, _):
    d_student = None
    if grad is not None and ctx.needs_input_grad[0]:
        d_student = torch.ops.simplclip.feature_loss_bwd(grad, *ctx.saved_tensors, *ctx.mode)
    return d_student, None, None, None, None, None


register_autograd("feature_loss_fwd", _autograd, _setup_context)


def feature_loss(
    student: Tensor,  # [N, D], or [N, D_student] with a projection
    teacher: Tensor,  # [N, D]
    *,
    distance: str = "mse",
    beta: float = 1.0,
    normalize: bool = True,
    projection: Tensor | None = None,  # [D, D_student]
) -> Tensor:  # []
    r"""Distance of a student's features to the features of a teacher, which are constants: unimodal distillation.

    With u = student / max(‖student‖, eps) and t = teacher / max(‖teacher‖, eps) by rows, eps = 1e-12 (or the features
    themselves if not `normalize`), the mean over all N·D elements of

        "mse"        (u − t)²                                                    F.mse_loss
        "smooth_l1"  (u − t)² / (2 beta) where |u − t| < beta, else |u − t| − beta / 2      F.smooth_l1_loss

    Args:
        student: [N, D] float32, bfloat16, float16 or float64; under autocast it is cast to autocast's dtype. Any strides.
        teacher: [N, D] on the same device, in any of these dtypes (e.g. stored float16 features). It is read without a cast,
            unless it is float64 and the student is not. It gets no gradient; if it requires one, a warning is given once
            per process (not under torch.compile).
        distance: "mse" or "smooth_l1".
        beta: above 0; for "smooth_l1".
        projection: [D, D_student] in the student's dtype. `F.linear(student, projection)` is then compared to the teacher,
            so that the student's width may differ from the teacher's.

    Returns:
        The loss, 0-dimensional, float32 (float64 for a float64 student).

    Gradients flow to student and projection: with g = dloss/du, (g − u (u·g)) / ‖student‖; for a row shorter than eps,
    which is divided by a constant, g / eps. Saved for backward: the inputs and two inverse norms per row, [2, N]; backward
    computes the difference again. Extra memory: O(N), and O(N D) with a projection. The loss is computed in float32 (float64
    for float64) and is deterministic: sums have a fixed order. Only first derivatives in reverse mode are supported, except
    by backend "reference".

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and what it got.
        RuntimeError: a forced backend does not support the call.

    Source: feature distillation in CLIP-KD (Yang et al. 2023, arXiv 2307.12732); unimodal stage of WIKD (arXiv 2411.14789).
    """
    checks.features("student", student, "[N, D]")
    checks.features("teacher", teacher, "[N, D]")
    if teacher.device != student.device:
        raise ValueError(f"teacher: expected the device of student, {student.device}, got {teacher.device}")
    if teacher.shape[0] != student.shape[0]:
        raise ValueError(f"teacher: expected one row for each of student's {student.shape[0]}, got {teacher.shape[0]}")
    checks.choice("distance", distance, DISTANCES)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}")
    if not torch.finfo(torch.float32).tiny <= beta < math.inf:
        raise ValueError(f"beta: expected a finite number above 0 (in float32), got {beta}")
    if projection is not None:
        student = _project(student, projection, teacher.shape[1])
    elif teacher.shape[1] != student.shape[1]:
        raise ValueError(
            f"student: expected the width of teacher, {teacher.shape[1]}, or a projection "
            f"[{teacher.shape[1]}, {student.shape[1]}], got width {student.shape[1]}"
        )
    (student,) = autocast(student)
    teacher = checks.constant("teacher", teacher)
    return call(
        "feature_loss_fwd", student, teacher, distance == "smooth_l1", float(beta), bool(normalize), backends.forced()
    )[0]


def _project(student, projection, width):
    shape = [width, student.shape[1]]
    if not isinstance(projection, Tensor):
        raise TypeError(f"projection: expected a tensor [D, D_student] = {shape}, got {type(projection).__name__}")
    if list(projection.shape) != shape:
        raise ValueError(f"projection: expected shape [D, D_student] = {shape}, got {checks.shape_of(projection)}")
    if projection.device != student.device:
        raise ValueError(f"projection: expected the device of student, {student.device}, got {projection.device}")
    # Autocast casts both, unless one is float64.
    cast = torch.is_autocast_enabled(student.device.type) and torch.float64 not in (student.dtype, projection.dtype)
    if projection.dtype != student.dtype and not (cast and projection.is_floating_point()):
        raise TypeError(f"projection: expected the dtype of student, {student.dtype}, got {projection.dtype}")
    return F.linear(student, projection)
