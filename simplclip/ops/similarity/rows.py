"""similarity_rows: row softmaxes over constant keys, the interactive term's. A part of similarity_loss, not public."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops import backends
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.registry import call, define, register_autograd, wants_grad
from simplclip.ops.similarity.sweep import SCRATCH_BYTES, chunk_rows, computes_in


def _run(function, query, keys, scale, ids, key_ids, *mode):
    compute = computes_in(query.dtype, query.device.type)
    ids, key_ids = (None if t is None else t.contiguous() for t in (ids, key_ids))
    features = (t.to(compute).contiguous() for t in (query, keys))
    stats, mean_keys = function(*features, scale.to(accumulate_dtype(compute)), ids, key_ids, *mode)
    return stats, mean_keys.to(query.dtype)


def _fake(query, keys, scale, ids, key_ids, label_offset, attend, chunk, backend):
    n, d = query.shape
    return query.new_empty(2, n, dtype=accumulate_dtype(query.dtype)), query.new_empty(n if attend else 0, d)


define(
    "similarity_rows",
    "Tensor query, Tensor keys, Tensor scale, Tensor? ids, Tensor? key_ids, SymInt label_offset, bool attend, SymInt chunk",
    "(Tensor, Tensor)",
    _run,
    _fake,
)


def _run_bwd(function, grad, query, keys, scale, mean_keys, label_offset):
    return function(grad, query, keys, scale.to(grad.dtype), mean_keys, label_offset)


def _fake_bwd(grad, query, keys, scale, mean_keys, label_offset, backend):
    return torch.empty_like(query), grad.new_empty(())


define(
    "similarity_rows_bwd",
    "Tensor grad, Tensor query, Tensor keys, Tensor scale, Tensor mean_keys, SymInt label_offset",
    "(Tensor, Tensor)",
    _run_bwd,
    _fake_bwd,
)


def _setup_context(ctx, inputs, output):
    query, keys, scale, _, _, ctx.label_offset, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, keys, scale, output[1])


def _autograd(ctx, grad, _):
    nothing = (None,) * 7
    if grad is None:
        return None, None, *nothing
    query, keys, scale, mean_keys = ctx.saved_tensors
    d_query, d_scale = torch.ops.simplclip.similarity_rows_bwd(grad, query, keys, scale, mean_keys, ctx.label_offset, "")
    return d_query, None, d_scale.to(scale.dtype), *nothing[1:]


register_autograd("similarity_rows", _autograd, _setup_context)


def similarity_rows(
    query: Tensor,  # [N, D]
    keys: Tensor,  # [M, D], constants
    scale: Tensor,  # []
    ids: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    label_offset: int,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:  # [2, N]
    """Of scale · query · keysᵀ: each row's log-sum-exp over its negatives, and the unscaled similarity of its positive.

    Gradients to query and scale need only the mean key of each row under its softmax, [N, D], which forward computes and
    keeps (where a gradient is needed): two matrix products in all, none in backward.
    """
    device = query.device.type
    chunk = chunk_rows(query.shape[0], keys.shape[0], computes_in(query.dtype, device), device, 1, scratch_bytes)
    attend = wants_grad(query, scale)
    return call("similarity_rows", query, keys, scale, ids, key_ids, label_offset, attend, chunk, backends.forced())[0]
