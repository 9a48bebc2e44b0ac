"""similarity_rows: softmaxes of rows over constant keys, for the interactive term of similarity_loss. Not public."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops import backends
from simplclip.ops.calls import flat, tensors_of
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.registry import call as run
from simplclip.ops.registry import define, register_gradient, wants_grad
from simplclip.ops.similarity import reference
from simplclip.ops.similarity.call import RowsCall, RowsGradient
from simplclip.ops.similarity.chunks import computes_in, prepare, sweep_rows
from simplclip.ops.similarity.positives import SameIds

_TENSORS = tensors_of(RowsCall)
_UNREAD = [name for name in _TENSORS if name not in tensors_of(RowsGradient)]  # not read by backward


def _run(function, call):
    dtype = call.query.dtype
    prepare(call, _TENSORS, computes_in(dtype, call.query.device.type))
    stats, mean_keys = function(call)
    return stats, mean_keys.to(dtype)


def _fake(call, backend):
    n, d = call.query.shape
    stats = call.query.new_empty(2, n, dtype=accumulate_dtype(call.query.dtype))
    return stats, call.query.new_empty(n if call.attend else 0, d)


def _run_bwd(function, call):
    call.scale = call.scale.to(call.grad.dtype)
    return function(call)


def _fake_bwd(call, backend):
    return torch.empty_like(call.query), call.grad.new_empty(())


_ROW = backends.row(reference.similarity_rows, module="similarity.rows")
_ROW_BWD = backends.row(reference.similarity_rows_bwd)  # O(N D) operations, so a fused kernel would gain nothing
define("similarity_rows", RowsCall, "(Tensor, Tensor)", _run, _fake, row=_ROW)
define("similarity_rows_bwd", RowsGradient, "(Tensor, Tensor)", _run_bwd, _fake_bwd, row=_ROW_BWD)


def _backward(call, mean_keys, grad, need, backend):
    gradient = RowsGradient(grad, call.query, call.keys, call.scale, *mean_keys, call.label_offset)
    d_query, d_scale = torch.ops.simplclip.similarity_rows_bwd(*flat(gradient), "")
    return {"query": d_query, "scale": d_scale.to(call.scale.dtype)}


register_gradient("similarity_rows", RowsCall, _backward, forget=_UNREAD)


def similarity_rows(
    query: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    same_ids: SameIds,
    scratch_bytes: int,
) -> Tensor:  # [2, N]
    """Returns for each row of scale · query · keysᵀ its log-sum-exp over negatives and its positive's unscaled similarity.

    The gradients of query and scale need only the mean key of each row under its softmax, [N, D]. Forward computes and keeps
    the mean keys if a gradient is needed: two matrix products in forward, none in backward.
    """
    device = query.device.type
    chunk = sweep_rows(query.shape[0], keys.shape[0], computes_in(query.dtype, device), device, 1, scratch_bytes)
    call = RowsCall(query, keys, scale, **same_ids.fields, attend=wants_grad(query, scale), chunk=chunk)
    return run("similarity_rows", *flat(call), backends.forced())[0]
