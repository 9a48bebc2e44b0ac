"""Launcher of similarity_rows: similarity_loss's kernels with the student's matrix alone, query as image and keys as text."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels.launch import device_of
from simplclip.kernels.similarity.gradients import FeatureGradient
from simplclip.kernels.similarity.op import Blocks, statistics
from simplclip.ops.calls import flat
from simplclip.ops.similarity.call import RowsCall, RowStat, SimilarityGradient


def similarity_rows(call: RowsCall) -> tuple[Tensor, Tensor]:  # [2, N], [N, D] or [0, D]
    """Returns the reference's results. For mean keys each block's softmax is computed again and multiplied by the keys."""
    query, keys, student = call.query, call.keys, call.contrastive
    with device_of(query):
        rows, columns = statistics(student)
        mean_keys = FeatureGradient(query, call.attend)
        if call.attend:
            ones = torch.zeros_like(rows)
            ones[RowStat.LSE_STUDENT].fill_(1.0)
            gradient = SimilarityGradient(*flat(student), ones, columns, rows, columns)
            for _, at, of, softmax in Blocks(gradient, attend=True):
                mean_keys.add(at, softmax, keys[of])
        return torch.stack([rows[RowStat.LSE_STUDENT], rows[RowStat.DIAGONAL_STUDENT]]), mean_keys.result()
