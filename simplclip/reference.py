"""The definition of every op in plain torch: any device, float64 included. What the kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip import checks


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _similarity_planes(image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, label_offset):
    """S, Z, l (or None) and the boolean masks of positives and of negatives, all [N, M], in the accumulation dtype."""
    dtype = accumulate_dtype(image.dtype)
    x, y = image.to(dtype), text.to(dtype)
    s = x @ y.T
    z = logit_scale * s
    l = None
    if plane_weight is not None:
        l = (x * plane_weight) @ y.T if plane_weight.dim() == 1 else plane_weight * s
        l = l + plane_bias
    columns = torch.arange(text.shape[0], device=image.device)
    positive = columns == torch.arange(image.shape[0], device=image.device)[:, None] + label_offset
    negative = ~positive
    if ids is not None:
        negative &= ids[:, None] != text_ids
    return x, y, s, z, l, positive, negative


def _diagonal(matrix: Tensor, n: int, label_offset: int) -> Tensor:
    return matrix[:, label_offset : label_offset + n].diagonal()


def similarity_loss_fwd(
    image, text, logit_scale, plane_weight, plane_bias, ids, text_ids,
    label_offset, symmetric, contrastive, negatives, chunk, stored_rows,
):  # fmt: skip
    """See simplclip.ops.similarity_loss; `negatives` is 0 (no pair matching), 1 (all) or 2 (hard).

    Returns terms [2], row_lse [2, N] and col_lse [2, M] (with and without the positive; without the bias, which cancels;
    +inf where a column takes no part), the number of negative pairs [1], and S of the first `stored_rows` rows.
    """
    n = image.shape[0]
    window = slice(label_offset, label_offset + n)
    _, _, s, z, l, _, negative = _similarity_planes(
        image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, label_offset
    )
    z_ii = _diagonal(z, n, label_offset)
    z_negative = z.masked_fill(~negative, -torch.inf)
    row_negative, col_negative = z_negative.logsumexp(1), z_negative.logsumexp(0)
    row = torch.logaddexp(row_negative, z_ii)
    col = z.new_full((2, z.shape[1]), torch.inf)
    if symmetric:
        col[:, window] = torch.stack([torch.logaddexp(col_negative[window], z_ii), col_negative[window]])

    terms = z.new_zeros(2)
    if contrastive:
        terms[0] = F.softplus(row_negative - z_ii).mean()
        if symmetric:
            terms[0] = 0.5 * (terms[0] + F.softplus(col[1, window] - z_ii).mean())
    if negatives:
        positive_loss = F.softplus(-_diagonal(l, n, label_offset)).mean()
        loss = F.softplus(l)
        if negatives == 1:
            negative_loss = (loss * negative).sum() / negative.sum().clamp(min=1)
        else:
            negative_loss = (_hard_weight(z, row_negative, col_negative, negative, window, symmetric) * loss).sum()
        terms[1] = 0.5 * (positive_loss + negative_loss)
    pairs = negative.sum().to(torch.float64).reshape(1)
    return terms, torch.stack([row, row_negative]), col, pairs, s[:stored_rows].to(image.dtype, copy=True)


def _hard_weight(z, row_negative, col_negative, negative, window, symmetric):
    """Weight of each negative, [N, M]: its softmax among the row's and among the column's negatives, averaged; sums to 1."""
    n = z.shape[0]
    weight = (z - row_negative[:, None]).exp().masked_fill(~negative, 0) / n
    if not symmetric:
        return weight
    by_column = torch.zeros_like(z)
    by_column[:, window] = (z - col_negative).exp().masked_fill(~negative, 0)[:, window] / n
    return 0.5 * (weight + by_column)


def similarity_loss_bwd(
    grad_terms, image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, row_lse, col_lse, pairs, stored,
    label_offset, symmetric, contrastive, negatives, need_image, need_text, chunk,
):  # fmt: skip
    """Gradients of image, text (empty when not needed), logit_scale, plane_weight and plane_bias (empty without a plane)."""
    n, dtype = image.shape[0], accumulate_dtype(image.dtype)
    window = slice(label_offset, label_offset + n)
    x, y, s, z, l, positive, negative = _similarity_planes(
        image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, label_offset
    )
    g = torch.zeros_like(z)
    if contrastive:
        # p - 1 of the positive is -sigmoid(lse of its negatives - z): no cancellation where the pair is well matched.
        z_ii = _diagonal(z, n, label_offset)
        g += (z - row_lse[0][:, None]).exp().masked_fill(~negative, 0)
        g_ii = -F.sigmoid(row_lse[1] - z_ii)
        if symmetric:
            g += (z - col_lse[0]).exp().masked_fill(~negative, 0)
            g_ii = g_ii - F.sigmoid(col_lse[1, window] - z_ii)
        g[positive] = g_ii
        g *= grad_terms[0] / (2 * n if symmetric else n)
    d_scale = (g * s).sum()
    g_sim = logit_scale * g
    d_x, d_y = g_sim @ y, g_sim.T @ x

    empty = z.new_empty(0)
    d_weight, d_bias = empty, z.new_zeros(())
    if negatives:
        h = F.sigmoid(l)
        if negatives == 1:
            h = h * negative / pairs.clamp(min=1).to(dtype)
        else:
            h = h * _hard_weight(z, row_lse[1], col_lse[1], negative, window, symmetric)
        h = 0.5 * grad_terms[1] * (h - F.sigmoid(-l) * positive / n)
        d_bias = h.sum()
        if plane_weight.dim() == 1:
            hy = h @ y
            d_weight = (x * hy).sum(0)
            d_x, d_y = d_x + plane_weight * hy, d_y + h.T @ (x * plane_weight)
        else:
            d_weight = (h * s).sum()
            d_x, d_y = d_x + plane_weight * (h @ y), d_y + plane_weight * (h.T @ x)
    d_image = d_x.to(image.dtype) if need_image else image.new_empty(0, image.shape[1])
    d_text = d_y.to(text.dtype) if need_text else text.new_empty(0, text.shape[1])
    return d_image, d_text, d_scale, d_weight, d_bias


def shaped_attention(
    q: Tensor,  # [B, L, H, K]
    k: Tensor,  # [B, L, H, K]
    v: Tensor,  # [B, L, H, K]
    alpha: Tensor,  # [H]
    beta: Tensor,  # [H]
    gamma: Tensor,  # [H]
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,  # [B], integer
) -> Tensor:  # [B, L, H, K]
    """Shaped attention, per head: `out = alpha v + beta softmax(q k^T scale) v - gamma C v`.

    C is uniform over the keys that a query sees: the mean over the valid keys, or the running mean when `causal`.
    With q = 0 and alpha = beta = gamma the softmax equals C and the result is `alpha v`: the identity a skipless
    block starts from.

    Args:
        q, k, v: [B, L, H, K], one floating dtype. Half dtypes are multiplied as such, the softmax and the mixing
            weights `alpha E + beta A - gamma C` are formed in float32. Float64 stays float64.
        alpha, beta, gamma: [H], any floating dtype.
        scale: factor of the logits, `K ** -0.5` when None.
        causal: query i sees the keys 0..i.
        lengths: [B] integers, the number of valid leading tokens of each sequence; 0 is allowed. Tokens behind the
            length are neither read (they may hold anything, NaN included) nor written: their output and their
            gradients are zero. The values are not checked, which would wait for the device: one above L counts as
            L, one below 0 as 0.

    Returns:
        [B, L, H, K] in the dtype of `v`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Autograd keeps q, k, v and two [B, H, L, L] matrices. Source: He & Hofmann 2023, arXiv 2311.01906, where C is
    causal only; C over all valid keys and `lengths` are this library's.
    """
    checks.attention(q, k, v, alpha, beta, gamma, lengths)
    length, width = q.shape[1], q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = width**-0.5 if scale is None else scale

    visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if lengths is not None:
        valid = torch.arange(length, device=q.device) < lengths[:, None]  # [B, L]
        visible = (visible & valid[:, None, :] & valid[:, :, None])[:, None]  # [B, 1, L, L]
        # A weight of zero does not silence a NaN, so padded tokens are overwritten and not only masked.
        padded = ~valid[:, :, None, None]
        q, k, v = (t.masked_fill(padded, 0) for t in (q, k, v))

    q, k, v_heads = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, L, K]
    logits = (q @ k.transpose(-2, -1)).to(wide) * scale
    if causal or lengths is not None:
        # A finite fill keeps a row without keys free of NaN, in the gradient too; its weights are zeroed below.
        logits = logits.masked_fill(~visible, torch.finfo(wide).min)
    weights = logits.softmax(-1)
    if lengths is not None:
        weights = weights.masked_fill(~visible, 0)
    uniform = visible.to(wide) / visible.sum(-1, keepdim=True).clamp(min=1)
    identity = torch.eye(length, dtype=wide, device=q.device)

    alpha, beta, gamma = (t.to(wide)[:, None, None] for t in (alpha, beta, gamma))
    mixing = alpha * identity + beta * weights - gamma * uniform  # one product with v instead of three
    return (mixing.to(v.dtype) @ v_heads).transpose(1, 2)
