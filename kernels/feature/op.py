"""Triton kernels of feature_loss. The op is memory bound, so that CUDA C++ would not be faster.

A program processes some rows. A row of at most MAX_BLOCK columns is kept in registers and read once; a wider row is read
twice in blocks, for the norms (or u·g) and for the distance (or the gradient).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels.launch import device_of, started
from simplclip.ops.feature.call import FeatureCall, FeatureGradient

EPS = tl.constexpr(1e-12)  # F.normalize's
CLAMPED = tl.constexpr(0.9999e12)  # 1/norm counts as 1/EPS from here on, since a GPU's division may round down
MAX_BLOCK = 8192


def tile(d: int) -> tuple[int, int, int]:
    """Returns rows of a program, columns of a block, num_warps for width D: 2,048 elements or one row, 16 per thread.

    A thread has 8 elements if a row has several blocks: with 16 the compiler uses so few registers that it spills.
    """
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(d)))
    rows = max(1, 2048 // block)
    return rows, block, rows * block // (512 if d <= MAX_BLOCK else 256)


@triton.jit
def _load(base, rows, columns, n, d):
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    return tl.load(base + rows[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(base, rows, columns, n, d, value):
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    tl.store(base + rows[:, None] * d + columns[None, :], value, mask=inside)


@triton.jit
def _inverse(squares):
    norm = tl.sqrt(squares)
    return 1.0 / tl.where(norm < EPS, EPS, norm)  # keeps NaN


@triton.jit
def _distance(difference, beta, SMOOTH: tl.constexpr):
    if SMOOTH:
        size = tl.abs(difference)
        return tl.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)
    else:
        return difference * difference


@triton.jit
def _slopes(student, teacher, x_inv, y_inv, rows, columns, n, d, beta, SMOOTH: tl.constexpr):
    """Returns u and the derivative of the distance with respect to u."""
    u = _load(student, rows, columns, n, d) * x_inv[:, None]
    difference = u - _load(teacher, rows, columns, n, d) * y_inv[:, None]
    if SMOOTH:
        return u, tl.where(difference > beta, 1.0, tl.where(difference < -beta, -1.0, difference / beta))
    else:
        return u, 2.0 * difference


@triton.jit
def _feature_loss_fwd_kernel(
    student,  # [N, D]
    teacher,  # [N, D]
    sums,  # [programs] float32: each program's sum of distances
    inv_norms,  # [2, N] float32
    n, d, beta,
    SMOOTH: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr,  # WHOLE: a block holds the row
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        x = _load(student, rows, columns, n, d)
        y = _load(teacher, rows, columns, n, d)
        if NORMALIZE:
            x_inv = _inverse(tl.sum(x * x, 1))
            y_inv = _inverse(tl.sum(y * y, 1))
            x = x * x_inv[:, None]
            y = y * y_inv[:, None]
        distance = _distance(x - y, beta, SMOOTH)
    else:
        if NORMALIZE:
            xx = tl.zeros((ROWS, BLOCK), tl.float32)
            yy = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, d, BLOCK):
                x = _load(student, rows, start + columns, n, d)
                y = _load(teacher, rows, start + columns, n, d)
                xx += x * x
                yy += y * y
            x_inv = _inverse(tl.sum(xx, 1))
            y_inv = _inverse(tl.sum(yy, 1))
        distance = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, d, BLOCK):
            x = _load(student, rows, start + columns, n, d)
            y = _load(teacher, rows, start + columns, n, d)
            if NORMALIZE:
                x = x * x_inv[:, None]
                y = y * y_inv[:, None]
            distance += _distance(x - y, beta, SMOOTH)
    tl.store(sums + program, tl.sum(tl.sum(distance, 1), 0))
    if NORMALIZE:
        tl.store(inv_norms + rows, x_inv, mask=rows < n)
        tl.store(inv_norms + n + rows, y_inv, mask=rows < n)


@triton.jit
def _feature_loss_bwd_kernel(
    student,  # [N, D]
    teacher,  # [N, D]
    inv_norms,  # [2, N] float32
    d_student,  # [N, D]
    grad,  # [] float32
    n, d, beta,
    scale,  # 1 / (N D)
    SMOOTH: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    factor = tl.load(grad) * scale
    x_inv = tl.full((ROWS,), 1.0, tl.float32)
    y_inv = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        x_inv = tl.load(inv_norms + rows, mask=rows < n, other=0.0)
        y_inv = tl.load(inv_norms + n + rows, mask=rows < n, other=0.0)
    # along is u·g, which the normalisation removes; a row shorter than eps is divided by a constant.
    if WHOLE:
        u, g = _slopes(student, teacher, x_inv, y_inv, rows, columns, n, d, beta, SMOOTH)
        if NORMALIZE:
            along = tl.where(x_inv >= CLAMPED, 0.0, tl.sum(u * g, 1))
            g = x_inv[:, None] * (g - u * along[:, None])
        _store(d_student, rows, columns, n, d, factor * g)
    else:
        if NORMALIZE:
            dot = tl.zeros((ROWS, BLOCK), tl.float32)
            for start in range(0, d, BLOCK):
                u, g = _slopes(student, teacher, x_inv, y_inv, rows, start + columns, n, d, beta, SMOOTH)
                dot += u * g
            along = tl.where(x_inv >= CLAMPED, 0.0, tl.sum(dot, 1))
        for start in range(0, d, BLOCK):
            u, g = _slopes(student, teacher, x_inv, y_inv, rows, start + columns, n, d, beta, SMOOTH)
            if NORMALIZE:
                g = x_inv[:, None] * (g - u * along[:, None])
            _store(d_student, rows, start + columns, n, d, factor * g)


def _launch(kernel, call: FeatureCall, *tensors: Tensor, **scalars: float) -> None:
    n, d = call.student.shape
    rows, block, num_warps = tile(d)
    with device_of(call.student):
        started(kernel)[(triton.cdiv(n, rows),)](
            call.student, call.teacher, *tensors, n, d, call.beta, **scalars,
            SMOOTH=call.smooth, NORMALIZE=call.normalize, WHOLE=d <= block, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip


def feature_loss_fwd(call: FeatureCall) -> tuple[Tensor, Tensor]:  # [], [2, N] or [2, 0]
    n, d = call.student.shape
    sums = call.student.new_empty(triton.cdiv(n, tile(d)[0]), dtype=torch.float32)
    inv_norms = call.student.new_empty(2, n if call.normalize else 0, dtype=torch.float32)
    _launch(_feature_loss_fwd_kernel, call, sums, inv_norms)
    return (sums.sum(dtype=torch.float64) / (n * d)).float(), inv_norms


def feature_loss_bwd(call: FeatureGradient) -> Tensor:  # [N, D]
    d_student = torch.empty_like(call.student)
    _launch(_feature_loss_bwd_kernel, call, call.inv_norms, d_student, call.grad, scale=1 / d_student.numel())
    return d_student
