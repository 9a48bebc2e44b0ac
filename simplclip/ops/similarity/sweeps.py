"""The ops of similarity_loss, each a sweep over a similarity matrix, and the chunks of the sweeps:
the softmax terms with their gradients, and the sigmoid terms with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.fields import flat
from simplclip.calls.similarity import (
    SigmoidCall,
    SigmoidRow,
    SimilarityCall,
    SimilarityGradient,
    TermsGradient,
)
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


def _in_products(call: Any) -> Any:
    """Returns the call with features in the dtype of products."""
    dtype = computes_in(call.image.dtype, call.image.device.type)
    if call.image.dtype == dtype:
        return call
    names = "image", "text", "teacher_image", "teacher_text"
    features = {name: getattr(call, name, None) for name in names}
    cast = {name: t.to(dtype) for name, t in features.items() if t is not None}
    return replace(call, **cast)


def _fwd(backend: ModuleType, call: SimilarityCall) -> tuple[Tensor, ...]:
    """Returns the results of SimilarityCall, of a backend's terms or of its statistics."""
    products = _in_products(call)
    if hasattr(backend, "similarity_terms_fwd") and not call.group:
        return backend.similarity_terms_fwd(products)
    rows, columns, stored = backend.similarity_loss_fwd(products)
    parts = rows.new_empty(0)
    if call.group:
        parts = distributed.exchange_columns(columns, call.group)
    terms, excess = statistics.terms(call, _statistics(call, rows, columns, parts))
    kept = rows, columns, excess, parts, stored
    if len(terms) == 1:
        return terms[0], rows.new_empty(0), *kept
    first, *weights = call.weights
    loss = terms[0] if first == 1 else first * terms[0]
    for weight, term in zip(weights, terms[1:]):
        loss = torch.add(loss, term, alpha=weight)
    return loss, torch.stack(terms), *kept


def _statistics(call: SimilarityCall, rows: Tensor, columns: Tensor, parts: Tensor) -> Tensor:
    """Returns the statistics of rows, and below them of the positives' columns if they count.

    parts: the columns' of each rank, [0] without a group.
    """
    if not call.columns:
        return rows
    n = rows.shape[1]
    if call.group:
        columns = statistics.merge_columns(parts)
    elif columns.shape[1] != n:
        columns = columns[:, call.label_offset : call.label_offset + n]
    return torch.cat([rows, columns])


def _column_gradient(call: TermsGradient, d_stats: Tensor) -> Tensor:
    """Returns the gradient of the columns' statistics from that of the result of `_statistics`."""
    if not call.columns:
        return torch.zeros_like(call.column_stats)
    gradient = d_stats[statistics.SLOTS :]
    if call.group:
        return distributed.exchange_parts(statistics.of_parts(gradient, call.parts), call.group)
    after = call.text.shape[0] - call.label_offset - gradient.shape[1]
    if call.label_offset or after:
        gradient = F.pad(gradient, (call.label_offset, after))
    return gradient


def _fwd_empty(call: SimilarityCall, names: str) -> tuple[Tensor, ...]:
    """Returns uninitialised results of SimilarityCall."""
    rows, columns, stored = empty_statistics(call)
    n = rows.shape[1]
    parts = [0]
    if call.group:
        parts = [call.text.shape[0] // n, columns.shape[0], n]
    count = len(call.weights)
    terms = rows.new_empty(count if count > 1 else 0)
    excess = rows.new_empty((2 if call.columns else 1) * call.matrices, n)
    return rows.new_empty(()), terms, rows, columns, excess, rows.new_empty(parts), stored


def _bwd(backend: ModuleType, call: TermsGradient) -> tuple[Tensor, ...]:
    """Returns the gradients of TermsGradient, by a backend's from those of terms or statistics."""
    products = _in_products(call)
    if hasattr(backend, "similarity_terms_bwd") and not call.group:
        d_image, d_text, d_scale, d_plane = backend.similarity_terms_bwd(products)
    else:
        d_image, d_text, d_scale, d_plane = _bwd_of_statistics(backend, products)
    dtype = call.image.dtype
    if d_image.dtype != dtype:
        d_image, d_text = d_image.to(dtype), d_text.to(dtype)
    return d_image, d_text, d_scale, d_plane


def _bwd_of_statistics(backend: ModuleType, call: TermsGradient) -> tuple[Tensor, ...]:
    """Returns what `_bwd` does, by a backend's function from the gradients of the statistics."""
    rows = call.row_stats
    d_stats, minus_d_scale, terms_plane = statistics.gradients(call, _factors(call))
    of_gradient: Callable = SimilarityGradient
    gradient = of_gradient(
        *flat(call), d_stats[: statistics.SLOTS], _column_gradient(call, d_stats)
    )
    d_image, d_text, d_scale, d_plane = backend.similarity_loss_bwd(gradient)
    if terms_plane is not None:
        d_plane = torch.add(d_plane, terms_plane, alpha=-0.5 / rows.shape[1])
    return d_image, d_text, d_scale - minus_d_scale, d_plane


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


def _sigmoid(backend: ModuleType, call: SigmoidCall) -> tuple[Tensor, ...]:
    """Returns Σ MIX term [], the terms [K], d_image, d_text and d_sigmoids [2, K], by a backend."""
    values, *gradients = backend.similarity_sigmoid(_in_products(call))
    return (values * call.sigmoids[SigmoidRow.MIX]).sum(), values, *gradients


FORWARD = define(
    "similarity_loss_fwd",
    "similarity_loss",
    SimilarityCall,
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
    call: SimilarityCall,
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
