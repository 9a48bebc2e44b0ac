"""The definition of every op in plain torch: any device, float64 included. What the kernels are tested against."""

from __future__ import annotations

from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip import checks


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class RowStat(IntEnum):
    """Rows of the first result of similarity_loss_fwd: what a row of the matrices is reduced to, over its negatives.

    What a call does not ask for is 0. lse: log-sum-exp (-inf without negatives); mean: 0 without negatives.
    """

    LSE_Z = 0  # lse of Z
    LSE_T = 1
    LSE_U = 2
    MATCH = 3  # "all": sum of softplus(l); "hard": its mean under the softmax of Z
    MEAN_Z = 4  # mean of (entropy T - Z) under the softmax of T
    MEAN_U = 5  # mean of (entropy T - U) under the softmax of T
    DIAGONAL_Z = 6  # the positive's similarity, unscaled: x y^T
    DIAGONAL_L = 7  # (x w) y^T, only with a hadamard plane
    DIAGONAL_T = 8
    DIAGONAL_U = 9
    DIAGONAL_V = 10
    NEGATIVES = 11  # their number


class ColumnStat(IntEnum):
    """Rows of the second result of similarity_loss_fwd: the same for the columns."""

    LSE_Z = 0
    LSE_T = 1
    LSE_V = 2
    MATCH = 3  # "hard" only
    MEAN_Z = 4
    MEAN_V = 5


NEGATIVES_ALL, NEGATIVES_HARD = 1, 2


class _Planes:
    """The similarity matrices of a call in the accumulation dtype, [N, M], and the mask of negatives."""

    def __init__(
        self, image, text, scale, teacher_image, teacher_text, teacher_scale, projected_image, projected_text, cross_scale,
        plane_weight, plane_bias, ids, text_ids, label_offset,
    ):  # fmt: skip
        self.dtype = accumulate_dtype(image.dtype)
        n, m = image.shape[0], text.shape[0]
        wide = lambda t: None if t is None else t.to(self.dtype)  # noqa: E731
        self.x, self.y, self.tx, self.ty = map(wide, (image, text, teacher_image, teacher_text))
        self.px, self.py = (
            (self.x if projected_image is None else wide(projected_image)),
            (self.y if projected_text is None else wide(projected_text)),
        )
        self.scale, self.teacher_scale, self.cross_scale = scale, teacher_scale, cross_scale
        self.weight, self.bias = plane_weight, plane_bias
        columns, rows = torch.arange(m, device=image.device), torch.arange(n, device=image.device)
        self.positive = columns == rows[:, None] + label_offset
        self.negative = ~self.positive
        if ids is not None:
            self.negative &= ids[:, None] != text_ids
        self.window = slice(label_offset, label_offset + n)

    def diagonal(self, matrix: Tensor) -> Tensor:
        return matrix[:, self.window].diagonal()

    def masked(self, matrix: Tensor) -> Tensor:
        return matrix.masked_fill(~self.negative, -torch.inf)

    def softmax(self, logits: Tensor, lse: Tensor) -> Tensor:
        """e^(logits - lse) of the negatives, 0 elsewhere; lse is [N, 1] or [M]."""
        return self.masked(logits - lse).exp()

    def hyperplane(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """l, and what its weight multiplies."""
        product = (self.x * self.weight) @ self.y.T if self.weight.dim() == 1 else s
        return (product if self.weight.dim() == 1 else self.weight * s) + self.bias, product


def similarity_loss_fwd(*args):
    """Statistics of the similarity matrices, from which simplclip.ops.similarity_terms makes the terms.

    S = x yᵀ, Z = scale S; T = teacher_scale x̂ ŷᵀ; U = cross_scale x' ŷᵀ and V = cross_scale x̂ y'ᵀ, x' and y' the student's
    features in the teacher's width (its own where none are given); l the hyperplane of pair matching.

    Returns rows [12, N] (RowStat), columns [6, M] (ColumnStat; only where `columns`), and what backward may read instead of
    multiplying again: the first `stored_rows` rows of the products, [planes, stored_rows, M] (not used here).
    """
    *tensors, label_offset, softmax, columns, negatives, relational, interactive, entropy, _chunk, stored_rows = args
    planes = _Planes(*tensors, label_offset)
    image, text = tensors[:2]
    rows = planes.x.new_zeros(len(RowStat), image.shape[0])
    cols = planes.x.new_zeros(len(ColumnStat), text.shape[0])
    rows[RowStat.NEGATIVES] = planes.negative.sum(1).to(rows.dtype)
    t = t_masked = None
    if relational or interactive:
        t_raw = planes.tx @ planes.ty.T
        rows[RowStat.DIAGONAL_T] = planes.diagonal(t_raw)
        t = planes.teacher_scale * t_raw
        t_masked = planes.masked(t)
        rows[RowStat.LSE_T] = t_masked.logsumexp(1)
        cols[ColumnStat.LSE_T] = t_masked.logsumexp(0)

    def mean(student, dim, lse):
        return (planes.softmax(t, lse) * (entropy * t - student)).sum(dim)

    if softmax or negatives:
        s = planes.x @ planes.y.T
        z = planes.scale * s
        rows[RowStat.DIAGONAL_Z] = planes.diagonal(s)
        if softmax:
            z_masked = planes.masked(z)
            rows[RowStat.LSE_Z], cols[ColumnStat.LSE_Z] = z_masked.logsumexp(1), z_masked.logsumexp(0)
        if negatives:
            l, product = planes.hyperplane(s)
            if planes.weight.dim() == 1:
                rows[RowStat.DIAGONAL_L] = planes.diagonal(product)
            loss = F.softplus(l)
            if negatives == NEGATIVES_ALL:
                rows[RowStat.MATCH] = (loss * planes.negative).sum(1)
            else:
                rows[RowStat.MATCH] = (planes.softmax(z, rows[RowStat.LSE_Z][:, None]) * loss).sum(1)
                cols[ColumnStat.MATCH] = (planes.softmax(z, cols[ColumnStat.LSE_Z]) * loss).sum(0)
        if relational:
            rows[RowStat.MEAN_Z] = mean(z, 1, rows[RowStat.LSE_T][:, None])
            cols[ColumnStat.MEAN_Z] = mean(z, 0, cols[ColumnStat.LSE_T])
    if interactive:
        u_raw = planes.px @ planes.ty.T
        u = planes.cross_scale * u_raw
        rows[RowStat.DIAGONAL_U], rows[RowStat.LSE_U] = planes.diagonal(u_raw), planes.masked(u).logsumexp(1)
        rows[RowStat.MEAN_U] = mean(u, 1, rows[RowStat.LSE_T][:, None])
    if interactive and columns:
        v_raw = planes.tx @ planes.py.T
        v = planes.cross_scale * v_raw
        rows[RowStat.DIAGONAL_V], cols[ColumnStat.LSE_V] = planes.diagonal(v_raw), planes.masked(v).logsumexp(0)
        cols[ColumnStat.MEAN_V] = mean(v, 0, cols[ColumnStat.LSE_T])
    if not columns:
        cols.zero_()
    count = bool(softmax or negatives) + (t is not None) + interactive * (1 + columns)
    return rows, cols, image.new_zeros(count if stored_rows else 0, stored_rows, text.shape[0])


def similarity_loss_bwd(grad_rows, grad_columns, *args):
    """Gradients of a loss with the gradients grad_rows [12, N] and grad_columns [6, M] to the statistics.

    Those of LSE_T, DIAGONAL_T and NEGATIVES are not read: the teacher is a constant; so are the weights of "hard". Returns
    d_image, d_text (empty where not needed), d_scale, d_projected_image, d_projected_text (empty where not given),
    d_cross_scale, d_plane_weight (empty without), d_plane_bias.
    """
    (*tensors, rows, cols, _stored, label_offset, softmax, columns, negatives, relational, interactive, _entropy,
     need_image, need_text, _chunk) = args  # fmt: skip
    planes = _Planes(*tensors, label_offset)
    image, text, projected_image, projected_text = tensors[0], tensors[1], tensors[6], tensors[7]
    x, y, tx, ty = planes.x, planes.y, planes.tx, planes.ty
    d_x, d_y, d_px, d_py = (torch.zeros_like(t) for t in (x, y, planes.px, planes.py))
    d_scale, d_cross, d_bias = (x.new_zeros(()) for _ in range(3))
    d_weight = x.new_zeros(0 if planes.weight is None else planes.weight.shape)

    def row(lse, logits, g):  # g_i e^(logits_ij - lse_i) over the negatives
        return grad_rows[g][:, None] * planes.softmax(logits, rows[lse][:, None])

    def column(lse, logits, g):
        return grad_columns[g] * planes.softmax(logits, cols[lse]) if columns else 0

    t = planes.teacher_scale * (tx @ ty.T) if relational or interactive else None
    if softmax or negatives:
        s = x @ y.T
        z = planes.scale * s
        g = torch.zeros_like(s)
        if softmax:
            g = row(RowStat.LSE_Z, z, RowStat.LSE_Z) + column(ColumnStat.LSE_Z, z, ColumnStat.LSE_Z)
        if relational:
            g = g - row(RowStat.LSE_T, t, RowStat.MEAN_Z) - column(ColumnStat.LSE_T, t, ColumnStat.MEAN_Z)
        d_scale = (g * s).sum()
        g = planes.scale * g
        if negatives:
            l, product = planes.hyperplane(s)
            h = grad_rows[RowStat.MATCH][:, None] * planes.negative
            if negatives == NEGATIVES_HARD:
                h = row(RowStat.LSE_Z, z, RowStat.MATCH) + column(ColumnStat.LSE_Z, z, ColumnStat.MATCH)
            h = h * F.sigmoid(l)
            d_bias = h.sum()
            if planes.weight.dim() == 1:
                h[planes.positive] = grad_rows[RowStat.DIAGONAL_L]
                hy = h @ y
                d_weight = (x * hy).sum(0)
                d_x, d_y = planes.weight * hy, h.T @ (x * planes.weight)
            else:
                d_weight = (h * product).sum()
                g = g + planes.weight * h
        g[planes.positive] = grad_rows[RowStat.DIAGONAL_Z]
        d_x, d_y = d_x + g @ y, d_y + g.T @ x
    if interactive:
        u_raw = planes.px @ ty.T
        u = planes.cross_scale * u_raw
        g = row(RowStat.LSE_U, u, RowStat.LSE_U) - row(RowStat.LSE_T, t, RowStat.MEAN_U)
        d_cross = (g * u_raw).sum()
        g = planes.cross_scale * g
        g[planes.positive] = grad_rows[RowStat.DIAGONAL_U]
        d_px = g @ ty
    if interactive and columns:
        v_raw = tx @ planes.py.T
        v = planes.cross_scale * v_raw
        g = column(ColumnStat.LSE_V, v, ColumnStat.LSE_V) - column(ColumnStat.LSE_T, t, ColumnStat.MEAN_V)
        d_cross = d_cross + (g * v_raw).sum()
        g = planes.cross_scale * g
        g[planes.positive] = grad_rows[RowStat.DIAGONAL_V]
        d_py = g.T @ tx
    if projected_image is None:
        d_x = d_x + d_px
    if projected_text is None:
        d_y = d_y + d_py

    def give(like, gradient, needed=True):
        return gradient.to(like.dtype) if needed else like.new_empty(0, like.shape[1])

    return (
        give(image, d_x, need_image),
        give(text, d_y, need_text),
        d_scale,
        give(image, d_px, projected_image is not None),
        give(text, d_py, projected_text is not None),
        d_cross,
        d_weight,
        d_bias,
    )


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


NORM_EPS = 1e-12  # F.normalize's


def _feature_difference(student, teacher, inv_norms):
    """u (normalised if inv_norms holds anything) and u − t, [N, D], in the accumulation dtype."""
    dtype = accumulate_dtype(student.dtype)
    u, t = student.to(dtype), teacher.to(dtype)
    if inv_norms.shape[1]:
        u, t = u * inv_norms[0][:, None], t * inv_norms[1][:, None]
    return u, u - t


def feature_loss_fwd(student, teacher, smooth, beta, normalize):
    """See simplclip.ops.feature_loss. Returns the loss [] and the inverse norms [2, N], or [2, 0] if not `normalize`."""
    dtype = accumulate_dtype(student.dtype)
    if normalize:
        inv_norms = torch.stack([t.to(dtype).norm(dim=1).clamp_min(NORM_EPS).reciprocal() for t in (student, teacher)])
    else:
        inv_norms = student.new_empty(2, 0, dtype=dtype)
    _, difference = _feature_difference(student, teacher, inv_norms)
    size = difference.abs()
    square = size * size
    distance = torch.where(size < beta, 0.5 * square / beta, size - 0.5 * beta) if smooth else square
    return distance.mean(), inv_norms


def feature_loss_bwd(grad, student, teacher, inv_norms, smooth, beta):
    """Gradient of the student, [N, D]: with g = dloss/du, (g − u (u·g)) / norm; below eps, g / eps."""
    u, difference = _feature_difference(student, teacher, inv_norms)
    slope = (difference / beta).clamp(-1, 1) if smooth else 2 * difference
    g = grad / slope.numel() * slope
    if inv_norms.shape[1]:
        along = (u * g).sum(1, keepdim=True)
        inv = inv_norms[0][:, None]
        clamped = inv >= inv.new_tensor(NORM_EPS).reciprocal()
        g = (g - u * along.masked_fill(clamped, 0)) * inv
    return g.to(student.dtype)
