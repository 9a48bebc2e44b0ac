"""similarity_loss in plain torch, with whole matrices."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.calls import tensors_of
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.similarity.call import (
    GRADIENTS,
    ColumnStat,
    RowsCall,
    RowsGradient,
    RowStat,
    SigmoidCall,
    SimilarityCall,
    SimilarityGradient,
    TermsCall,
    TermsGradient,
)
from simplclip.ops.similarity.positives import masks
from simplclip.ops.similarity.terms import cross_entropy, mismatch


class _Matrices:
    """The features of a call in the accumulation dtype, and the mask of negatives [N, M]."""

    def __init__(self, call: SimilarityCall):
        dtype, n = accumulate_dtype(call.image.dtype), call.image.shape[0]
        given = {name: getattr(call, name) for name in tensors_of(SimilarityCall)}
        self.call = replace(call, **{name: t.to(dtype) for name, t in given.items() if t is not None and t.dim() == 2})
        own, belongs = masks(call)
        self.negative = ~(belongs if call.drop_ids else own)
        self.window = slice(call.label_offset, call.label_offset + n)

    def diagonal(self, matrix: Tensor) -> Tensor:
        return matrix[:, self.window].diagonal()

    def masked(self, matrix: Tensor) -> Tensor:
        return matrix.masked_fill(~self.negative, -torch.inf)

    def softmax(self, logits: Tensor, lse: Tensor) -> Tensor:
        """Returns e^(logits - lse) of the negatives, 0 elsewhere; lse is [N, 1] or [M]."""
        return self.masked(logits - lse).exp()


def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """Computes statistics of a call's matrices (see call.py), from which simplclip.ops.similarity.terms computes the terms.

    Returns rows [11, N] (RowStat), columns [5, M] (ColumnStat; 0 unless `columns`), and the first `stored_rows` rows of the
    products, [matrices, stored_rows, M], which backward may read instead of computing them again (not used here).
    """
    here, m = _Matrices(call), call.text.shape[0]
    rows = here.call.image.new_zeros(len(RowStat), call.image.shape[0])
    cols = here.call.image.new_zeros(len(ColumnStat), m)

    def similarities(image, text, diagonal):
        matrix = image @ text.T
        rows[diagonal] = here.diagonal(matrix)
        return matrix

    def lse(logits, dim):
        empty = ~here.negative.any(dim, keepdim=True)  # logsumexp of a row without negatives would have no second derivatives
        return here.masked(logits).masked_fill(empty, 0).logsumexp(dim).masked_fill(empty.squeeze(dim), -torch.inf)

    def mean(student, dim, lse):
        return (here.softmax(teacher, lse) * (call.entropy * teacher - student)).sum(dim)

    if call.has_teacher:
        products = similarities(here.call.teacher_image, here.call.teacher_text, RowStat.DIAGONAL_TEACHER)
        teacher = call.teacher_scale * products
        rows[RowStat.LSE_TEACHER], cols[ColumnStat.LSE_TEACHER] = lse(teacher, 1), lse(teacher, 0)
        by_row, by_column = rows[RowStat.LSE_TEACHER][:, None], cols[ColumnStat.LSE_TEACHER]
    if call.softmax:
        similarity = similarities(here.call.image, here.call.text, RowStat.DIAGONAL_STUDENT)
        student = call.scale * similarity
        rows[RowStat.LSE_STUDENT], cols[ColumnStat.LSE_STUDENT] = lse(student, 1), lse(student, 0)
        if call.sigmoids:
            masks = _sigmoid_masks(call, similarity)
            numbers = call.sigmoid_weight, call.sigmoid_bias, call.sigmoid_negative, call.sigmoid_positive
            for stat, of_term in zip((RowStat.SIGMOID, RowStat.SECOND_SIGMOID), zip(*numbers)):
                rows[stat] = _sigmoid_term(*of_term, similarity, *masks).sum(1)
        if call.relational:
            rows[RowStat.MEAN_STUDENT] = mean(student, 1, by_row)
            cols[ColumnStat.MEAN_STUDENT] = mean(student, 0, by_column)
    if call.interactive:
        stat = RowStat.DIAGONAL_IMAGE_TO_TEACHER
        logits = call.cross_scale * similarities(here.call.student_image, here.call.teacher_text, stat)
        rows[RowStat.LSE_IMAGE_TO_TEACHER] = lse(logits, 1)
        rows[RowStat.MEAN_IMAGE_TO_TEACHER] = mean(logits, 1, by_row)
    if call.has_teacher_to_text:
        stat = RowStat.DIAGONAL_TEACHER_TO_TEXT
        logits = call.cross_scale * similarities(here.call.teacher_image, here.call.student_text, stat)
        cols[ColumnStat.LSE_TEACHER_TO_TEXT] = lse(logits, 0)
        cols[ColumnStat.MEAN_TEACHER_TO_TEXT] = mean(logits, 0, by_column)
    if not call.columns:
        cols = torch.zeros_like(cols)
    stored = call.image.new_zeros(call.matrices if call.stored_rows else 0, call.stored_rows, m)
    return rows, cols, stored


def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, ...]:
    """Computes the gradients of forward by autograd, from grad_rows and grad_columns, the gradients of its statistics.

    The teacher is a constant. Returns d_image, d_text (empty where not needed), d_scale, d_projected_image, d_projected_text
    (empty where not given), d_cross_scale, d_sigmoid_weight and d_sigmoid_bias [K].
    """
    dtype = accumulate_dtype(call.image.dtype)
    given = [name for name in GRADIENTS if getattr(call, name) is not None]
    leaves = {name: getattr(call, name).detach().to(dtype).requires_grad_() for name in given}
    with torch.enable_grad():
        rows, columns, _ = similarity_loss_fwd(replace(call, **leaves))
        found = [(out, grad) for out, grad in ((rows, call.grad_rows), (columns, call.grad_columns)) if out.requires_grad]
        outputs, incoming = zip(*found)
        grads = torch.autograd.grad(outputs, list(leaves.values()), incoming, materialize_grads=True)
    of = dict(zip(given, grads))
    for name, needed in (("image", call.need_image), ("text", call.need_text)):
        if not needed:
            del of[name]

    def gradient(name):
        if name in of:
            return of[name].to(call.image.dtype) if of[name].dim() == 2 else of[name]
        absent = {"cross_scale": (), "sigmoid_weight": (0,), "sigmoid_bias": (0,)}
        return rows.new_zeros(absent[name]) if name in absent else call.image.new_empty(0, call.image.shape[1])

    return tuple(gradient(name) for name in GRADIENTS)


def similarity_rows(call: RowsCall) -> tuple[Tensor, Tensor]:
    """Returns [2, N]: for each row of scale · query · keysᵀ the log-sum-exp over negatives and the positive's raw similarity.

    Also returns the mean key under the softmax over the negatives, [N, D] (0 without negatives), or [0, D] unless `attend`.
    """
    student = call.contrastive
    rows, _, _ = similarity_loss_fwd(student)
    lse = rows[RowStat.LSE_STUDENT]
    stats = torch.stack([lse, rows[RowStat.DIAGONAL_STUDENT]])
    if not call.attend:
        return stats, call.query.new_empty(0, call.query.shape[1])
    here = _Matrices(student)
    softmax = here.softmax(call.scale * (here.call.image @ here.call.text.T), lse[:, None])
    return stats, (softmax @ here.call.text).to(call.query.dtype)


def similarity_rows_bwd(call: RowsGradient) -> tuple[Tensor, Tensor]:
    """Returns d_query, d_scale. Mean keys k̄: dlse_i = scale k̄_i·dx_i + x_i·k̄_i dscale, dpositive_i = label's key · dx_i."""
    grad, query = call.grad, call.query
    d_query, d_scale = torch.empty_like(query), grad.new_zeros(())
    for first in range(0, query.shape[0], 2048):  # so that copies in a wider dtype stay small
        rows = slice(first, first + 2048)
        g_lse, g_positive = grad[:, rows, None]
        wide = call.mean_keys[rows].to(grad.dtype)
        d_scale += torch.linalg.vecdot(wide, query[rows].to(grad.dtype)) @ g_lse[:, 0]
        positives = call.keys[call.label_offset + first : call.label_offset + first + g_lse.shape[0]]
        d_query[rows] = wide * (call.scale * g_lse) + positives * g_positive
    return d_query, d_scale


def _sigmoid_masks(call: SimilarityCall | SigmoidCall, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the negatives, the positives and the positives' shares of a sigmoid term, [N, M] each."""
    own, belongs = masks(call)
    if call.image_share is None:
        return ~belongs, own, torch.ones_like(similarity)
    return ~belongs, belongs, call.image_share[:, None] + call.text_share


def _sigmoid_term(weight, bias, of_negative, of_positive, similarity, negative, positive, share) -> Tensor:  # [N, M]
    l = weight * similarity + bias
    unmatched = of_negative * -F.logsigmoid(-l).masked_fill(~negative, 0)
    return unmatched + of_positive * (share * mismatch(l)).masked_fill(~positive, 0)


def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the terms [K], and the gradients of their sum weighted by `mix`.

    The gradients are d_image, d_text (empty unless needed), d_weight and d_bias [K]. Without `gradient` autograd may
    differentiate the terms.
    """
    dtype = accumulate_dtype(call.image.dtype)
    image, text = call.image.to(dtype), call.text.to(dtype)
    similarity = image @ text.T
    negative, positive, share = masks = _sigmoid_masks(call, similarity)
    terms, slopes = [], []
    for numbers in zip(call.weight, call.bias, call.negative, call.positive):
        terms.append(_sigmoid_term(*numbers, similarity, *masks).sum())
        if call.gradient:
            weight, bias, of_negative, of_positive = numbers
            l = weight * similarity + bias
            of_pairs = of_negative * l.sigmoid() * negative
            slopes.append(of_pairs - of_positive * share * (-l).sigmoid() * positive)
    none = call.image.new_empty(0, call.image.shape[1])
    if not call.gradient:
        return torch.stack(terms), none, none.clone(), torch.zeros_like(call.weight), torch.zeros_like(call.bias)
    slope = call.mix[:, None, None] * torch.stack(slopes)
    logits = (call.weight[:, None, None] * slope).sum(0)
    return (
        torch.stack(terms),
        (logits @ text).to(call.image.dtype) if call.need_image else none,
        (logits.T @ image).to(call.text.dtype) if call.need_text else none.clone(),
        (slope * similarity).sum((1, 2)),
        slope.sum((1, 2)),
    )


def similarity_terms(call: TermsCall) -> Tensor:
    """Returns the contrastive term and the sums of the sigmoid terms, [1 + K]."""
    positive = call.scale * call.rows[RowStat.DIAGONAL_STUDENT] - call.margin
    value = cross_entropy(call.rows[RowStat.LSE_STUDENT], positive).mean()
    if call.columns is not None:
        value = 0.5 * (value + cross_entropy(call.columns[ColumnStat.LSE_STUDENT], positive).mean())
    return torch.cat([value[None], call.rows[RowStat.SIGMOID : RowStat.SIGMOID + call.sigmoids].sum(1)])


def similarity_terms_bwd(call: TermsGradient) -> tuple[Tensor, Tensor, Tensor]:
    """Returns d_rows [11, N], d_columns [5, N] (or [0]) and d_scale, by autograd."""
    leaves = [t for t in (call.rows, call.columns, call.scale) if t is not None]
    leaves = [t.detach().requires_grad_() for t in leaves]
    with torch.enable_grad():
        rows, columns, scale = leaves if len(leaves) == 3 else (leaves[0], None, leaves[1])
        value = similarity_terms(TermsCall(rows, columns, scale, call.margin, call.sigmoids))
        found = torch.autograd.grad(value, leaves, call.grad)
    return found if len(found) == 3 else (found[0], rows.new_empty(0), found[1])
