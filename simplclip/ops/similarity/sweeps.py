"""The ops of similarity_loss, each a sweep over a similarity matrix: the statistics of the softmax
terms, their gradients, and the sigmoid terms with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.similarity import SigmoidCall, SigmoidRow, SimilarityCall, SimilarityGradient
from simplclip.ops import registry
from simplclip.ops.registry import define, register_gradient
from simplclip.ops.similarity.chunks import computes_in
from simplclip.ops.similarity.cpu import CpuSimilarity
from simplclip.ops.similarity.reference import (
    ReferenceSimilarity,
    empty_gradients,
    empty_sigmoids,
    empty_statistics,
)
from simplclip.ops.similarity.triton import TritonSimilarity

# The backends of similarity_loss, in the order in which they are tried.
BACKENDS = (TritonSimilarity, CpuSimilarity, ReferenceSimilarity)
FEATURES = ("image", "text", "teacher_image", "teacher_text")


def _prepared(call: Any) -> Any:
    """Returns the call with features cast to the dtype of the products, see chunks.computes_in."""
    dtype = computes_in(call.image.dtype, call.image.device.type)
    if call.image.dtype == dtype:
        return call
    features = {name: getattr(call, name, None) for name in FEATURES}
    return replace(call, **{name: t.to(dtype) for name, t in features.items() if t is not None})


def _fwd(function: Callable, call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the backend's function does: statistics of rows, of columns, stored products."""
    return function(_prepared(call))


def _bwd(function: Callable, call: SimilarityGradient) -> tuple[Tensor, ...]:
    """Returns d_image, d_text in the features' dtype, d_scale [] and d_plane [2], by a backend."""
    d_image, d_text, *others = function(_prepared(call))
    return d_image.to(call.image.dtype), d_text.to(call.text.dtype), *others


def _sigmoid(function: Callable, call: SigmoidCall) -> tuple[Tensor, ...]:
    """Returns Σ MIX term [], the terms [K], d_image, d_text and d_sigmoids [2, K], by a backend."""
    values, *gradients = function(_prepared(call))
    return (values * call.sigmoids[SigmoidRow.MIX]).sum(), values, *gradients


FORWARD = define(
    "similarity_loss_fwd",
    SimilarityCall,
    "(Tensor, Tensor, Tensor)",
    _fwd,
    lambda call, spec: empty_statistics(call),
    served_by=BACKENDS,
    differentiable=2,
)
BACKWARD = define(
    "similarity_loss_bwd",
    SimilarityGradient,
    "(Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    lambda call, spec: empty_gradients(call),
    served_by=BACKENDS,
)
SIGMOID = define(
    "similarity_sigmoid",
    SigmoidCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid,
    lambda call, spec: (call.sigmoids.new_empty(()), *empty_sigmoids(call)),
    served_by=BACKENDS,
)


def _gradient(
    saved: Sequence[Tensor],
    options: Sequence,
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
    spec: str,
) -> dict[str, Tensor]:
    """Returns gradients by name: image, text, scale, plane; see register_gradient."""
    *tensors, rows, columns, stored = saved
    grad_rows, grad_columns = grads
    call = FORWARD.call_type(*tensors, *options)
    gradient = SimilarityGradient(
        **vars(call),
        grad_rows=torch.zeros_like(rows) if grad_rows is None else grad_rows,
        grad_columns=torch.zeros_like(columns) if grad_columns is None else grad_columns,
        row_stats=rows,
        column_stats=columns,
        stored=stored,
        need_image=needed[0],
        need_text=needed[1],
    )
    d_image, d_text, d_scale, d_plane = registry.call(BACKWARD, gradient, spec)
    return {"image": d_image, "text": d_text, "scale": d_scale, "plane": d_plane}


def _sigmoid_gradient(
    saved: Sequence[Tensor],
    options: Sequence,
    grads: Sequence[Tensor],
    needed: Sequence[bool],
    spec: str,
) -> dict[str, Tensor]:
    """Returns gradients by name: image, text, sigmoids; see register_gradient."""
    d_image, d_text, d_sigmoids = (result * grads[0] for result in saved[2:])
    # only weight and bias have gradients
    constants = len(SigmoidRow) - d_sigmoids.shape[0]
    return {"image": d_image, "text": d_text, "sigmoids": F.pad(d_sigmoids, (0, 0, 0, constants))}


register_gradient(FORWARD, _gradient, save=lambda tensors, results: (*tensors, *results))
# forward has computed the gradients, and no features are kept
register_gradient(SIGMOID, _sigmoid_gradient, save=lambda tensors, results: results)
