"""Kernel and launchers of similarity_terms: the terms from the statistics, and the gradients of all statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from simplclip.kernels.launch import COMPILE, device_of, interpreted, started
from simplclip.kernels.similarity.tile import softplus_and_sigmoid
from simplclip.ops.similarity.call import ColumnStat, RowStat, TermsCall, TermsGradient

BLOCK = 1024
ROW_STATS: tl.constexpr = tl.constexpr(len(RowStat))
COLUMN_STATS: tl.constexpr = tl.constexpr(len(ColumnStat))
LSE: tl.constexpr = tl.constexpr(int(RowStat.LSE_STUDENT))  # ColumnStat.LSE_STUDENT is equal
DIAGONAL: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_STUDENT))
SIGMOID: tl.constexpr = tl.constexpr(int(RowStat.SIGMOID))


@triton.jit
def _cross_entropy(stats, n, at, inside, positive, INTERPRETED: tl.constexpr):
    """Returns softplus(lse - z) of positives z, NaN where z is infinite, and its derivative with respect to lse."""
    value, share = softplus_and_sigmoid(tl.load(stats + LSE * n + at, inside, 0.0) - positive, INTERPRETED)
    return value + 0.0 * positive, share


@triton.jit(do_not_specialize=["n", "margin"])
def _similarity_terms_kernel(
    rows,  # [11, N]
    columns,  # [5, N] or None
    scale,  # []
    margin,
    grad,  # [1 + SIGMOIDS], None in forward; likewise grad_rows and grad_columns
    grad_rows,  # [11, N]
    grad_columns,  # [5, N]
    out,  # [programs, 1 + SIGMOIDS]: shares of the terms; with `grad` [programs]: shares of the scale's gradient
    n,
    SIGMOIDS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    diagonal = tl.load(rows + DIAGONAL * n + at, inside, 0.0)
    positive = diagonal * tl.load(scale) - margin
    value, share = _cross_entropy(rows, n, at, inside, positive, INTERPRETED)
    by = 1.0 / n
    both = share
    if columns is not None:
        by = 0.5 / n
        of_column, column_share = _cross_entropy(columns, n, at, inside, positive, INTERPRETED)
        value += of_column
        both += column_share
    if grad is None:
        out += tl.program_id(0) * (1 + SIGMOIDS)
        tl.store(out, tl.sum(tl.where(inside, value * by, 0.0)))
        for k in tl.static_range(SIGMOIDS):
            tl.store(out + 1 + k, tl.sum(tl.load(rows + (SIGMOID + k) * n + at, inside, 0.0)))
    else:
        by *= tl.load(grad)
        tl.store(out + tl.program_id(0), -tl.sum(tl.where(inside, by * both * diagonal, 0.0)))
        for stat in tl.static_range(ROW_STATS):
            g = tl.zeros((BLOCK,), tl.float32)
            if stat == LSE:
                g = by * share
            elif stat == DIAGONAL:
                g = -by * both * tl.load(scale)
            elif stat >= SIGMOID and stat < SIGMOID + SIGMOIDS:
                g += tl.load(grad + 1 + stat - SIGMOID)
            tl.store(grad_rows + stat * n + at, g, inside)
        if columns is not None:
            for stat in tl.static_range(COLUMN_STATS):
                g = tl.zeros((BLOCK,), tl.float32)
                if stat == LSE:
                    g = by * column_share
                tl.store(grad_columns + stat * n + at, g, inside)


def _launch(call: TermsCall | TermsGradient, grad: Tensor | None, results: tuple[Tensor | None, ...], numbers: int) -> Tensor:
    n = call.rows.shape[1]
    shares = call.rows.new_empty(-(-n // BLOCK), numbers)
    with device_of(call.rows):
        started(_similarity_terms_kernel)[(shares.shape[0],)](
            call.rows, call.columns, call.scale, call.margin, grad, *results, shares, n,
            SIGMOIDS=call.sigmoids, BLOCK=BLOCK, INTERPRETED=interpreted(), num_warps=4, **COMPILE,
        )  # fmt: skip
    return shares.sum(0)


def similarity_terms(call: TermsCall) -> Tensor:  # [1 + K]
    return _launch(call, None, (None, None), 1 + call.sigmoids)


def similarity_terms_bwd(call: TermsGradient) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows = torch.empty_like(call.rows)
    grad_columns = call.rows.new_empty(0) if call.columns is None else torch.empty_like(call.columns)
    return grad_rows, grad_columns, _launch(call, call.grad, (grad_rows, grad_columns), 1).reshape(())
