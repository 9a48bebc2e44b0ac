"""similarity_rows in plain torch: one direction of a similarity matrix whose keys are constants."""

from __future__ import annotations

import torch

from simplclip.reference.dtypes import accumulate_dtype


def similarity_rows(query, keys, scale, ids, key_ids, label_offset, attend, chunk):
    """Of scale · query · keysᵀ, [2, N]: each row's log-sum-exp over its negatives, and its positive's unscaled similarity.

    And, where `attend`, the mean key under the softmax over the negatives [N, D] (0 without negatives), else [0, D].
    """
    dtype, n = accumulate_dtype(query.dtype), query.shape[0]
    similarity = query.to(dtype) @ keys.to(dtype).T
    window = slice(label_offset, label_offset + n)
    negative = torch.ones_like(similarity, dtype=torch.bool)
    negative[:, window].fill_diagonal_(False)
    if ids is not None:
        negative &= ids[:, None] != key_ids
    logits = (scale * similarity).masked_fill(~negative, -torch.inf)
    lse = logits.logsumexp(1)
    stats = torch.stack([lse, similarity[:, window].diagonal()])
    if not attend:
        return stats, query.new_empty(0, query.shape[1])
    softmax = (logits - lse[:, None]).masked_fill(~negative, -torch.inf).exp()
    return stats, (softmax @ keys.to(dtype)).to(query.dtype)


def similarity_rows_bwd(grad, query, keys, scale, mean_keys, label_offset):
    """With k̄_i the mean key: dlse_i = scale k̄_i·dx_i + x_i·k̄_i dscale, dpositive_i = key of its label · dx_i. No N×M left."""
    d_query, d_scale = torch.empty_like(query), grad.new_zeros(())
    for first in range(0, query.shape[0], 2048):  # so that what is wider than the features stays small
        rows = slice(first, first + 2048)
        g_lse, g_positive = grad[:, rows, None]
        wide = mean_keys[rows].to(grad.dtype)
        d_scale += torch.linalg.vecdot(wide, query[rows].to(grad.dtype)) @ g_lse[:, 0]
        positives = keys[label_offset + first : label_offset + first + g_lse.shape[0]]
        d_query[rows] = wide * (scale * g_lse) + positives * g_positive
    return d_query, d_scale
