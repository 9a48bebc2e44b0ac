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
    """Contiguous; the kernels read any float dtype of the teacher but float64."""
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
    r"""Distance of a student's features to a teacher's, which is a constant: unimodal feature distillation.

    With u = student / max(‖student‖, eps) and t = teacher / max(‖teacher‖, eps) by rows, eps = 1e-12 (or the features
    themselves if not `normalize`), the mean over all N·D elements of

        "mse"        (u − t)²                                                    F.mse_loss
        "smooth_l1"  (u − t)² / (2 beta) where |u − t| < beta, else |u − t| − beta / 2      F.smooth_l1_loss

    Args:
        student: [N, D] float32, bfloat16, float16 or float64; under autocast it is cast to autocast's dtype. Any strides.
        teacher: [N, D] on the same device, of any of these dtypes (stored float16 features, say), read as it is: only a
            float64 teacher of another student is first cast to float32. It gets no gradient; if it requires one, a warning
            says so, once per process (not under torch.compile).
        distance: "mse" or "smooth_l1".
        beta: above 0; for "smooth_l1".
        projection: [D, D_student] of the student's dtype: `student @ projection.T`, by F.linear, stands in the student's
            place, whose width may then differ from the teacher's.

    Returns:
        The loss, 0-dimensional, float32 (float64 for a float64 student).

    Gradients flow to student and projection: with g = dloss/du, (g − u (u·g)) / ‖student‖; a row shorter than eps is divided
    by a constant, so g / eps. Saved for backward: the inputs and two inverse norms per row, [2, N]; backward computes the
    difference again. Extra memory: O(N), and with a projection O(N D). Computed in float32 (float64 for
    float64), sums in a fixed order: equal inputs give equal results. First derivatives in reverse mode only, but for
    backend "reference".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: a forced backend cannot serve the call.

    Source: FD of CLIP-KD (Yang et al. 2023, arXiv 2307.12732); the unimodal stage of WIKD (arXiv 2411.14789).
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
