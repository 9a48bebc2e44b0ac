"""similarity_loss in plain torch: the matrices as a whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import NEGATIVES_ALL, NEGATIVES_HARD, ColumnStat, RowStat


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
    """Statistics of the similarity matrices, from which simplclip.ops.similarity.terms makes the terms.

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
                by_row, by_column = planes.softmax(z, rows[RowStat.LSE_Z][:, None]), planes.softmax(z, cols[ColumnStat.LSE_Z])
                rows[RowStat.MATCH] = (by_row.detach() * loss).sum(1)
                cols[ColumnStat.MATCH] = (by_column.detach() * loss).sum(0)
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
