"""Launcher of similarity_rows: similarity_loss's kernels with the student's matrix alone, query as image and keys as text."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels.launch import device_of, starts
from simplclip.kernels.similarity.op import gradient_plan, gradients_of_matrices, statistics
from simplclip.ops.calls import flat
from simplclip.ops.similarity.call import RowsCall, RowStat, SimilarityGradient


def similarity_rows(call: RowsCall) -> tuple[Tensor, Tensor]:  # [2, N], [N, D] or [0, D]
    """The reference's statistics; for the mean keys each chunk's softmax is computed again and multiplied by the keys."""
    query, keys, student = call.query, call.keys, call.contrastive
    n, m = query.shape[0], keys.shape[0]
    with device_of(query):
        rows, columns = statistics(student)
        mean_keys = query.new_empty(n if call.attend else 0, query.shape[1])
        if call.attend:
            ones = torch.zeros_like(rows)
            ones[RowStat.LSE_STUDENT] = 1.0
            gradient = SimilarityGradient(*flat(student), ones, columns, rows, columns)
            [(launch, tile)], scratch, sums = gradient_plan(gradient)
            for first in starts(n, call.chunk):
                at = slice(first, min(n, first + call.chunk))
                gradients_of_matrices(gradient, launch, tile, None, scratch, sums, at, attend=True)
                torch.mm(scratch[0, : at.stop - first, :m], keys, out=mean_keys[at])
    return torch.stack([rows[RowStat.LSE_STUDENT], rows[RowStat.DIAGONAL_STUDENT]]), mean_keys
