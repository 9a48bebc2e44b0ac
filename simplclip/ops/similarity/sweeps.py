"""The ops of similarity_loss, each a sweep over a similarity matrix, and the chunks of the sweeps:
the softmax terms with their gradients, and the sigmoid terms with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.fields import flat
from simplclip.calls.similarity import SigmoidCall, SigmoidRow, SimilarityCall, SimilarityGradient
from simplclip.ops import backends, distributed, registry
from simplclip.ops.backends import computes_in
from simplclip.ops.registry import define, register_gradient
from simplclip.ops.similarity import statistics
from simplclip.ops.similarity.reference import (
    empty_gradients,
    empty_sigmoids,
    empty_statistics,
)

# Budget of a chunk, which has no more rows of a similarity matrix than fast matrix products need. A
# GPU reads and writes gradients for every block, so that larger blocks cost it less.
SCRATCH_BYTES = 64 << 20
SCRATCH_BYTES_ELSEWHERE = 128 << 20
# Budget of the first rows of the matrices, which forward keeps so that backward need not compute
# them again; only the CPU's kernels do.
STORE_BYTES = 208 << 20
_STATISTICS_BYTES = 40  # about what forward computes of a row and of a column
_CHUNK_ROWS = 1024
_FEW_ROWS = 448  # of a chunk, with which keeping all rows saves more time than small products cost
_STRIP = 64  # rows of one task of the CPU kernel; a chunk is a multiple of it


def _rows_of_both(image: Tensor, m: int) -> int:
    """Returns how many rows of [N, m] a chunk and the rows that forward keeps have by default.

    They take, with the statistics, at most twice the bytes of the features' gradients in float32.
    """
    n, width = image.shape
    row_bytes = m * computes_in(image.dtype, "cpu").itemsize
    return max(0, (n + m) * (8 * width - _STATISTICS_BYTES)) // row_bytes


def sweep_rows(
    image: Tensor, m: int, live: int, scratch_bytes: int | None, *, keeps: bool = False
) -> int:
    """Returns a call's `chunk`: the rows of [N, m] that scratch_bytes holds, of `live` matrices.

    On a CPU a multiple of 64 that makes chunks about equally large; by default those of a single
    matrix are among _rows_of_both. keeps: whether the rows of stored_rows come from them too.
    """
    n = image.shape[0]
    device = image.device.type
    row_bytes = m * computes_in(image.dtype, device).itemsize
    if device != "cpu":
        rows = (SCRATCH_BYTES_ELSEWHERE if scratch_bytes is None else scratch_bytes) // row_bytes
        return min(n, max(1, rows))
    rows = (SCRATCH_BYTES if scratch_bytes is None else scratch_bytes) // row_bytes
    most = min(_CHUNK_ROWS // live, rows)
    if scratch_bytes is None and live == 1:
        both = _rows_of_both(image, m)
        most = min(most, both)
        if keeps and both - n >= _FEW_ROWS:
            most = min(most, both - n)
    most = max(_STRIP, most // _STRIP * _STRIP)
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def stored_rows(image: Tensor, m: int, matrices: int, store_bytes: int | None, chunk: int) -> int:
    """Returns how many of the N rows of each matrix forward keeps for backward: all if they fit.

    Else those of a single matrix that fit, a multiple of 64, and none of two, where they would save
    little. 0 unless the CPU's C++ kernels run. store_bytes: None for 208 MiB, and of a single
    matrix for what a chunk leaves of _rows_of_both; the loss then takes less memory than torch's
    linear_cross_entropy in chunks.
    """
    n = image.shape[0]
    dtype = computes_in(image.dtype, "cpu")
    if image.device.type != "cpu" or dtype == torch.float64 or backends.extension is None:
        return 0  # only the CPU's kernels keep rows
    if backends.forced_for("similarity_loss") not in ("", "cpu"):
        return 0
    row_bytes = m * dtype.itemsize * matrices
    rows = (STORE_BYTES if store_bytes is None else store_bytes) // row_bytes
    if store_bytes is None and matrices == 1:
        rows = min(rows, max(0, _rows_of_both(image, m) - chunk))
    if rows >= n:
        return n
    if matrices > 1:
        return 0
    return rows // _STRIP * _STRIP


@dataclass
class TermsCall:
    """Arguments of simplclip::similarity_loss_fwd: a sweep of the matrices, and terms of it.

    The terms are contrastive if `contrastive`, relational with a teacher, and pair matching with a
    plane. The results are the loss [], which is their weighted sum; the terms [T], or [0] if there
    is one, of weight 1; and for backward the statistics of rows [6, N] and columns [3, M], what
    statistics.terms returns, the columns' of each rank's rows [W, 3, N] with a group, and stored
    products.
    """

    image: Tensor  # [N, D]
    text: Tensor  # [M, D]
    scale: Tensor  # []
    teacher_image: Tensor | None  # [N, D̂]
    teacher_text: Tensor | None  # [M, D̂]
    teacher_scale: Tensor | None  # []
    plane_weight: Tensor | None  # []
    plane_bias: Tensor | None  # []
    ids: Tensor | None  # [N] int64
    text_ids: Tensor | None  # [M] int64
    share: Tensor | None  # [] `negative_share` with ids
    label_offset: int
    columns: bool  # whether both directions count
    entropy: float
    chunk: int
    stored_rows: int
    contrastive: bool
    contrastive_weight: float
    relational_weight: float
    pair_matching_weight: float
    group: str  # the name of a process group whose ranks exchange statistics of columns; "": none

    @property
    def has_teacher(self) -> bool:
        """Whether the relational term is asked for."""
        return self.teacher_image is not None

    @property
    def plane(self) -> tuple[Tensor, Tensor] | None:
        """p and q of pair matching, if it is asked for."""
        if self.plane_weight is None or self.plane_bias is None:
            return None
        return self.plane_weight, self.plane_bias

    @property
    def weights(self) -> list[float]:
        """The weights of the terms that the call has."""
        weights = [self.contrastive_weight] if self.contrastive else []
        if self.has_teacher:
            weights.append(self.relational_weight)
        if self.plane_weight is not None:
            weights.append(self.pair_matching_weight)
        return weights

    @property
    def negative_share(self) -> Tensor | float:
        """0.5 over the number of all negatives, at least 1."""
        if self.share is not None:
            return self.share
        return 0.5 / max(1, self.image.shape[0] * (self.text.shape[0] - 1))

    def of_kernels(self) -> tuple[Any, ...]:
        """Returns the fields of a SimilarityCall, features in the dtype of products."""
        image, text = self.image, self.text
        teacher_image, teacher_text = self.teacher_image, self.teacher_text
        dtype = computes_in(image.dtype, image.device.type)
        if image.dtype != dtype:
            image, text = image.to(dtype), text.to(dtype)
        if teacher_image is not None and teacher_text is not None:
            teacher_image, teacher_text = teacher_image.to(dtype), teacher_text.to(dtype)
        return (
            image,
            text,
            self.scale,
            teacher_image,
            teacher_text,
            self.teacher_scale,
            None if self.plane is None else torch.stack(self.plane),
            self.ids,
            self.text_ids,
            self.label_offset,
            self.columns,
            self.entropy,
            self.chunk,
            self.stored_rows,
        )

    def statistics(self, rows: Tensor, columns: Tensor, parts: Tensor) -> Tensor:
        """Returns the statistics of rows, and below them of the positives' columns if they count.

        parts: the columns' of each rank, [0] without a group.
        """
        if not self.columns:
            return rows
        n = rows.shape[1]
        if self.group:
            columns = statistics.merge_columns(parts)
        elif columns.shape[1] != n:
            columns = columns[:, self.label_offset : self.label_offset + n]
        return torch.cat([rows, columns])

    def column_gradient(self, d_stats: Tensor, columns: Tensor, parts: Tensor) -> Tensor:
        """Returns the gradient of `columns` from that of the result of `statistics`."""
        if not self.columns:
            return torch.zeros_like(columns)
        gradient = d_stats[statistics.SLOTS :]
        if self.group:
            return distributed.exchange_parts(statistics.of_parts(gradient, parts), self.group)
        after = columns.shape[1] - self.label_offset - gradient.shape[1]
        if self.label_offset or after:
            gradient = F.pad(gradient, (self.label_offset, after))
        return gradient


@dataclass
class TermsGradient(TermsCall):
    """Arguments of simplclip::similarity_loss_bwd: forward's, its results and their gradients.

    The results are d_image, d_text (without rows where not needed), d_scale [] and d_plane [2].
    """

    grad_loss: Tensor | None  # []
    grad_terms: Tensor | None  # [T]
    row_stats: Tensor  # [6, N] RowStat
    column_stats: Tensor  # [3, M] ColumnStat
    excess: Tensor  # see statistics.terms
    parts: Tensor  # [W, 3, N], or [0]
    stored: Tensor  # [matrices, stored_rows, M]
    need_image: bool
    need_text: bool


def _fwd(function: Callable, call: TermsCall) -> tuple[Tensor, ...]:
    """Returns the results of TermsCall, of statistics by a backend's function."""
    rows, columns, stored = function(SimilarityCall(*call.of_kernels()))
    if call.group:
        parts = distributed.exchange_columns(columns, call.group)
    else:
        parts = rows.new_empty(0)
    terms, excess = statistics.terms(call, call.statistics(rows, columns, parts))
    kept = rows, columns, excess, parts, stored
    if len(terms) == 1:
        return terms[0], rows.new_empty(0), *kept
    first, *weights = call.weights
    loss = terms[0] if first == 1 else first * terms[0]
    for weight, term in zip(weights, terms[1:]):
        loss = torch.add(loss, term, alpha=weight)
    return loss, torch.stack(terms), *kept


def _fwd_empty(call: TermsCall, spec: str) -> tuple[Tensor, ...]:
    """Returns uninitialised results of TermsCall."""
    rows, columns, stored = empty_statistics(SimilarityCall(*call.of_kernels()))
    n = rows.shape[1]
    parts = [0]
    if call.group:
        parts = [call.text.shape[0] // n, columns.shape[0], n]
    count = len(call.weights)
    terms = rows.new_empty(count if count > 1 else 0)
    excess = rows.new_empty((2 if call.columns else 1) * (2 if call.has_teacher else 1), n)
    return rows.new_empty(()), terms, rows, columns, excess, rows.new_empty(parts), stored


def _bwd(function: Callable, call: TermsGradient) -> tuple[Tensor, ...]:
    """Returns the gradients of TermsGradient, by a backend's function from those of statistics."""
    rows, columns = call.row_stats, call.column_stats
    d_stats, minus_d_scale, d_plane = statistics.gradients(call, rows, call.excess, _factors(call))
    of_gradient: Callable = SimilarityGradient
    gradient = of_gradient(
        *call.of_kernels(),
        d_stats[: statistics.SLOTS],
        call.column_gradient(d_stats, columns, call.parts),
        rows,
        columns,
        call.stored,
        call.need_image,
        call.need_text,
    )
    d_image, d_text, scale_by_matrix, plane_by_matrix = function(gradient)
    dtype = call.image.dtype
    if d_image.dtype != dtype:
        d_image, d_text = d_image.to(dtype), d_text.to(dtype)
    if d_plane is not None:
        plane_by_matrix = torch.add(plane_by_matrix, d_plane, alpha=-0.5 / rows.shape[1])
    return d_image, d_text, scale_by_matrix - minus_d_scale, plane_by_matrix


def _factors(call: TermsGradient) -> list[Tensor]:
    """Returns the gradients [] of the terms, from those of the loss and of the terms themselves."""
    if call.grad_terms is None:
        grad: Any = call.grad_loss
        return [grad if weight == 1 else weight * grad for weight in call.weights]
    factors = list(call.grad_terms)
    if call.grad_loss is not None:
        for i, weight in enumerate(call.weights):
            factors[i] = factors[i] + weight * call.grad_loss
    return factors


def _sigmoid(function: Callable, call: SigmoidCall) -> tuple[Tensor, ...]:
    """Returns Σ MIX term [], the terms [K], d_image, d_text and d_sigmoids [2, K], by a backend."""
    dtype = computes_in(call.image.dtype, call.image.device.type)
    if call.image.dtype != dtype:
        call = replace(call, image=call.image.to(dtype), text=call.text.to(dtype))
    values, *gradients = function(call)
    return (values * call.sigmoids[SigmoidRow.MIX]).sum(), values, *gradients


FORWARD = define(
    "similarity_loss_fwd",
    "similarity_loss",
    TermsCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_empty,
    differentiable=2,
)
BACKWARD = define(
    "similarity_loss_bwd",
    "similarity_loss",
    TermsGradient,
    "(Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    lambda call, spec: empty_gradients(call),
)
SIGMOID = define(
    "similarity_sigmoid",
    "similarity_loss",
    SigmoidCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid,
    lambda call, spec: (call.sigmoids.new_empty(()), *empty_sigmoids(call)),
)


def _gradient(
    call: TermsCall,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needed: Mapping[str, bool],
    spec: str,
) -> dict[str, Tensor]:
    """Returns gradients by name: image, text, scale and the plane; see register_gradient."""
    of_gradient: Callable = TermsGradient
    gradient = of_gradient(*flat(call), *grads, *kept, needed["image"], needed["text"])
    *of_features, d_scale, d_plane = registry.call(BACKWARD, gradient, spec)
    names = "image", "text", "scale", "plane_weight", "plane_bias"
    return dict(zip(names, (*of_features, d_scale, *d_plane.unbind())))


def _sigmoid_gradient(
    call: None,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needed: Mapping[str, bool],
    spec: str,
) -> dict[str, Tensor]:
    """Returns gradients by name: image, text, sigmoids; see register_gradient."""
    d_image, d_text, d_sigmoids = (result * grads[0] for result in kept[2:])
    # only weight and bias have gradients
    constants = len(SigmoidRow) - d_sigmoids.shape[0]
    return {"image": d_image, "text": d_text, "sigmoids": F.pad(d_sigmoids, (0, 0, 0, constants))}


register_gradient(FORWARD, _gradient)
# forward has computed the gradients, and no features are kept
register_gradient(SIGMOID, _sigmoid_gradient, keeps_call=False)
