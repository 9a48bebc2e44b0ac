"""similarity_loss in plain torch, for every device and dtype, in chunks of rows: O(chunk · M)
memory beside the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.fields import accumulate_dtype
from simplclip.calls.similarity import (
    ColumnStat,
    RowStat,
    SigmoidCall,
    SigmoidRow,
    SimilarityCall,
    SimilarityGradient,
)
from simplclip.ops.backends import computes_in
from simplclip.ops.similarity.statistics import merge_columns


class _Chunk:
    """A chunk of the rows of a call. Its masks are applied in place to matrices [rows, M]."""

    def __init__(self, call: SimilarityCall | SigmoidCall, rows: slice):
        """Takes the call's rows in a slice with start and stop; finds positives and equal ids."""
        self.rows = rows
        self.indices = torch.arange(rows.stop - rows.start, device=call.image.device)
        self.positives = self.indices + (rows.start + call.label_offset)
        self.dropped: Tensor | None = None
        if call.ids is not None and call.text_ids is not None:
            self.dropped = call.ids[rows, None] == call.text_ids

    def product(self, image: Tensor, text: Tensor) -> Tensor:
        """Returns similarities [rows, M]: the chunk's rows of image [N, D] times text [M, D]."""
        return torch.mm(image[self.rows].to(text.dtype), text.T)

    def teacher(self, call: SimilarityCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the teacher's similarities of the positives, and its logits filled with -inf."""
        image: Any = call.teacher_image
        text: Any = call.teacher_text
        scale: Any = call.teacher_scale
        similarity = self.product(image, text.to(dtype))
        diagonal = self.positive(similarity)
        return diagonal, self.fill(similarity.mul_(scale), -torch.inf)

    def positive(self, matrix: Tensor) -> Tensor:
        """Returns the entries of the rows' positives, [rows], in a matrix [rows, M]."""
        return matrix[self.indices, self.positives]

    def fill(self, matrix: Tensor, value: float) -> Tensor:
        """Sets the entries that are not negatives to a value in place; returns the matrix."""
        if self.dropped is not None:
            matrix.masked_fill_(self.dropped, value)
        matrix[self.indices, self.positives] = value
        return matrix


def _chunks(call: SimilarityCall | SigmoidCall) -> Iterator[_Chunk]:
    """Yields chunks of call.chunk consecutive rows, in order; the last one may be shorter."""
    n = call.image.shape[0]
    for start in range(0, n, call.chunk):
        yield _Chunk(call, slice(start, min(start + call.chunk, n)))


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """Returns e^(logits - lse), 0 where the logits are -inf, even if lse is -inf too."""
    return (logits - lse.masked_fill(lse == -torch.inf, 0)).exp_()


class ReferenceSimilarity:
    """Backend "reference"."""

    @staticmethod
    def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rows [6, N] RowStat, columns [3, M] ColumnStat, and memory for stored products.

        columns are 0 unless `columns`. The memory is not written: only C++ kernels store products.
        """
        dtype = accumulate_dtype(call.image.dtype)
        n = call.image.shape[0]
        m = call.text.shape[0]
        text = call.text.to(dtype)
        rows = call.image.new_zeros(len(RowStat), n, dtype=dtype)
        columns = call.image.new_zeros(len(ColumnStat), m, dtype=dtype)
        if call.columns:
            columns[ColumnStat.LSE_STUDENT] = columns[ColumnStat.LSE_TEACHER] = -torch.inf
        for chunk in _chunks(call):
            part = rows[:, chunk.rows]
            student = chunk.product(call.image, text)
            part[RowStat.DIAGONAL_STUDENT] = chunk.positive(student)
            if call.plane is not None:
                unmatched = F.logsigmoid(
                    torch.addcmul(call.plane[1], student, call.plane[0]).neg_()
                )
                part[RowStat.PAIR_MATCHING] = -chunk.fill(unmatched, 0).sum(1)
            student = chunk.fill(student.mul_(call.scale), -torch.inf)
            if call.has_teacher:
                part[RowStat.DIAGONAL_TEACHER], teacher = chunk.teacher(call, dtype)
                gap = call.entropy * teacher.masked_fill(teacher == -torch.inf, 0) - student
                chunk.fill(gap, 0)
            chunk_columns = torch.zeros_like(columns)
            directions: list[tuple[Tensor, type[RowStat | ColumnStat], int]] = [(part, RowStat, 1)]
            if call.columns:
                directions.append((chunk_columns, ColumnStat, 0))
            for stats, stat, dim in directions:
                stats[stat.LSE_STUDENT] = student.logsumexp(dim)
                if call.has_teacher:
                    lse = teacher.logsumexp(dim)
                    stats[stat.LSE_TEACHER] = lse
                    # Not e^(T - lse), which adds up to 1 + eps |lse|: the gaps are as large as the
                    # logits.
                    mean = (teacher.softmax(dim) * gap).sum(dim)
                    stats[stat.MEAN] = mean.masked_fill(lse == -torch.inf, 0)
            if call.columns:
                columns = merge_columns(torch.stack([columns, chunk_columns]))
        if not call.has_teacher:
            columns[ColumnStat.LSE_TEACHER] = 0
        matrices = call.matrices if call.stored_rows else 0
        return rows, columns, call.image.new_empty(matrices, call.stored_rows, m)

    @staticmethod
    def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns d_image, d_text (without rows where not needed), d_scale [] and d_plane [2].

        d_plane is 0 without a plane. Stored products are not used.
        """
        dtype = accumulate_dtype(call.image.dtype)
        image, text = call.image.to(dtype), call.text.to(dtype)
        d_image = image.new_empty(image.shape if call.need_image else (0, image.shape[1]))
        d_text = text.new_zeros(text.shape if call.need_text else (0, text.shape[1]))
        d_scale, d_plane = image.new_zeros(()), image.new_zeros(2)
        for chunk in _chunks(call):
            stats, grads = call.row_stats[:, chunk.rows, None], call.grad_rows[:, chunk.rows, None]
            similarity = chunk.product(image, text)
            student = chunk.fill(call.scale * similarity, -torch.inf)
            g = _softmax(student, stats[RowStat.LSE_STUDENT]).mul_(grads[RowStat.LSE_STUDENT])
            if call.columns:
                lse = call.column_stats[ColumnStat.LSE_STUDENT]
                grad = call.grad_columns[ColumnStat.LSE_STUDENT]
                g.addcmul_(_softmax(student, lse), grad)
            if call.has_teacher:
                _, teacher = chunk.teacher(call, dtype)
                g.addcmul_(
                    _softmax(teacher, stats[RowStat.LSE_TEACHER]), grads[RowStat.MEAN], value=-1
                )
                if call.columns:
                    lse = call.column_stats[ColumnStat.LSE_TEACHER]
                    grad = call.grad_columns[ColumnStat.MEAN]
                    g.addcmul_(_softmax(teacher, lse), grad, value=-1)
            # by rows first, which rounds less than one long sum
            d_scale += torch.linalg.vecdot(g, similarity).sum()
            g.mul_(call.scale)
            if call.plane is not None:
                logits = torch.addcmul(call.plane[1], similarity, call.plane[0])
                slope = chunk.fill(logits.sigmoid_(), 0)
                slope.mul_(grads[RowStat.PAIR_MATCHING])
                d_plane += torch.stack([torch.linalg.vecdot(slope, similarity).sum(), slope.sum()])
                g.add_(slope.mul_(call.plane[0]))
            g[chunk.indices, chunk.positives] = grads[RowStat.DIAGONAL_STUDENT, :, 0]
            if call.need_image:
                torch.mm(g, text, out=d_image[chunk.rows])
            if call.need_text:
                d_text.addmm_(g.T, image[chunk.rows])
        return d_image.to(call.image.dtype), d_text.to(call.text.dtype), d_scale, d_plane

    @staticmethod
    def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the terms [K], and the gradients of their sum weighted by MIX.

        These are d_image, d_text (without rows unless needed) and d_sigmoids [2, K].
        """
        dtype = accumulate_dtype(call.image.dtype)
        stored = _sigmoid_dtype(call)
        image, text = call.image.to(dtype), call.text.to(dtype)
        d_image = image.new_empty(image.shape if call.need_image else (0, image.shape[1]))
        d_text = text.new_zeros(text.shape if call.need_text else (0, text.shape[1]))
        terms = torch.zeros_like(call.sigmoids[0])
        d_sigmoids = torch.zeros_like(call.sigmoids[: SigmoidRow.NEGATIVE])
        for chunk in _chunks(call):
            similarity = chunk.product(image, text)
            g = torch.zeros_like(similarity) if call.gradient else None
            for k, numbers in enumerate(call.sigmoids.T):
                weight = numbers[SigmoidRow.WEIGHT]
                negative = numbers[SigmoidRow.NEGATIVE]
                positive = numbers[SigmoidRow.POSITIVE]
                mix = numbers[SigmoidRow.MIX]
                logits = torch.addcmul(numbers[SigmoidRow.BIAS], similarity, weight)
                matched = chunk.positive(logits)
                negative_sum = chunk.fill(F.logsigmoid(-logits), 0).sum()
                positive_sum = (F.logsigmoid(matched) - 0 * matched).sum()
                terms[k] -= negative * negative_sum + positive * positive_sum
                if g is not None:
                    slope = chunk.fill(logits.sigmoid_(), 0).mul_(negative * mix)
                    slope[chunk.indices, chunk.positives] = -positive * mix * (-matched).sigmoid()
                    d_sigmoids[SigmoidRow.WEIGHT, k] += torch.linalg.vecdot(slope, similarity).sum()
                    d_sigmoids[SigmoidRow.BIAS, k] += slope.sum()
                    g.add_(slope.mul_(weight))
            if g is not None and call.need_image:
                torch.mm(g, text, out=d_image[chunk.rows])
            if g is not None and call.need_text:
                d_text.addmm_(g.T, image[chunk.rows])
        return terms, d_image.to(stored), d_text.to(stored), d_sigmoids


# The backend's functions.
similarity_loss_fwd = ReferenceSimilarity.similarity_loss_fwd
similarity_loss_bwd = ReferenceSimilarity.similarity_loss_bwd
similarity_sigmoid = ReferenceSimilarity.similarity_sigmoid


def empty_statistics(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised rows [6, N], columns [3, M] and stored products, as of forward."""
    n = call.image.shape[0]
    m = call.text.shape[0]
    dtype = computes_in(call.image.dtype, call.image.device.type)
    matrices = call.matrices if call.stored_rows else 0
    rows = call.scale.new_empty(len(RowStat), n)
    columns = call.scale.new_empty(len(ColumnStat), m)
    return rows, columns, call.image.new_empty(matrices, call.stored_rows, m, dtype=dtype)


def _of_features(call: SimilarityGradient | SigmoidCall, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields uninitialised gradients of image and text, without rows for one not needed."""
    for features, needed in ((call.image, call.need_image), (call.text, call.need_text)):
        rows, width = features.shape
        yield features.new_empty(rows if needed else 0, width, dtype=dtype)


def empty_gradients(call: SimilarityGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns uninitialised d_image, d_text, d_scale and d_plane, as of backward."""
    d_image, d_text = _of_features(call, call.image.dtype)
    return d_image, d_text, call.scale.new_empty(()), call.scale.new_empty(2)


def _sigmoid_dtype(call: SigmoidCall) -> torch.dtype:
    """Returns the dtype of d_image and d_text: for float16 float32, which keeps entries of 1/N²."""
    dtype = computes_in(call.image.dtype, call.image.device.type)
    return torch.float32 if dtype == torch.float16 else dtype


def empty_sigmoids(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns uninitialised terms, d_image, d_text and d_sigmoids, as of similarity_sigmoid."""
    values = torch.empty_like(call.sigmoids[0])
    d_image, d_text = _of_features(call, _sigmoid_dtype(call))
    return values, d_image, d_text, torch.empty_like(call.sigmoids[: SigmoidRow.NEGATIVE])
