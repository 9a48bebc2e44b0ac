"""feature_loss: distance of normalised student and teacher features, fused with the normalisation and its backward."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops import backends, checks, registry
from simplclip.ops.calls import accumulate_dtype, flat
from simplclip.ops.feature import reference
from simplclip.ops.feature.call import FeatureCall, FeatureGradient
from simplclip.ops.registry import autocast, autocasts, define, register_gradient

DISTANCES = ("mse", "smooth_l1")


def _run(function, call):
    """Makes tensors contiguous. Casts a float64 teacher to float32 if the student is not float64: no kernel reads float64."""
    wide = call.teacher.dtype == torch.float64 and call.student.dtype != torch.float64
    teacher = (call.teacher.float() if wide else call.teacher).contiguous()
    return function(replace(call, student=call.student.contiguous(), teacher=teacher))


def _fwd_fake(call, backend):
    stats, rows = {"dtype": accumulate_dtype(call.student.dtype)}, call.student.shape[0] if call.normalize else 0
    return call.student.new_empty((), **stats), call.student.new_empty(2, rows, **stats)


def _bwd_fake(call, backend):
    return torch.empty_like(call.student, memory_format=torch.contiguous_format)


_FWD = backends.row(reference.feature_loss_fwd, FeatureCall, module="feature.op")
_BWD = backends.row(reference.feature_loss_bwd, FeatureGradient, module="feature.op")
FORWARD = define("feature_loss_fwd", FeatureCall, "(Tensor, Tensor)", _run, _fwd_fake, row=_FWD)
BACKWARD = define("feature_loss_bwd", FeatureGradient, "Tensor", _run, _bwd_fake, row=_BWD)


def _gradient(call, results, grads, needed, spec):
    return (registry.call(BACKWARD, FeatureGradient(*flat(call), *grads, *results), spec) if needed[0] else None), None


register_gradient(FORWARD, _gradient)


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
    for float64). Sums have a fixed order: on one machine, the same call has the same bits each time, by the CPU kernels with
    any number of threads if there is no projection, whose product is BLAS's. Only first derivatives in reverse mode are
    supported, except by backend "reference".

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and what it got.
        RuntimeError: a forced backend does not support the call.

    Source: feature distillation in CLIP-KD (Yang et al. 2023, arXiv 2307.12732); unimodal stage of WIKD (arXiv 2411.14789).
    """
    checks.features("student", student, "[N, D]")
    checks.features("teacher", teacher, "[N, D]")
    checks.on("teacher", teacher, "student", student.device)
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
    of_call = FeatureCall(student, teacher, distance == "smooth_l1", float(beta), bool(normalize))
    return registry.call(FORWARD, of_call)[0]


def _project(student, projection, width):
    shape = [width, student.shape[1]]
    if not isinstance(projection, Tensor):
        raise TypeError(f"projection: expected a tensor [D, D_student] = {shape}, got {type(projection).__name__}")
    if list(projection.shape) != shape:
        raise ValueError(f"projection: expected shape [D, D_student] = {shape}, got {checks.shape_of(projection)}")
    checks.on("projection", projection, "student", student.device)
    # Autocast casts both, unless one is float64.
    cast = autocasts(student.device) and torch.float64 not in (student.dtype, projection.dtype)
    if projection.dtype != student.dtype and not (cast and projection.is_floating_point()):
        raise TypeError(f"projection: expected the dtype of student, {student.dtype}, got {projection.dtype}")
    return F.linear(student, projection)
