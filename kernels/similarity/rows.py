"""Launcher of similarity_rows: U of similarity_loss's kernels alone, with the query as image and the keys as text."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import architecture_and_processors, device_of, precision_of, starts
from simplclip.kernels.similarity.launch import Call, Launch
from simplclip.kernels.similarity.op import gradient_scratch, gradients_of_planes, statistics
from simplclip.ops.similarity.call import RowStat


def similarity_rows(
    query: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    ids: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    label_offset: int,
    attend: bool,
    chunk: int,
) -> tuple[Tensor, Tensor]:  # [2, N], [N, D] or [0, D]
    """The reference's statistics; for the mean keys a chunk of rows is multiplied again, as softmax, and then by the keys."""
    call = Call(
        query, keys, scale, None, keys, None, None, None, scale, None, None, ids, key_ids, label_offset,
        softmax=False, columns=False, negatives=0, relational=False, interactive=True, entropy=0.0,
    )  # fmt: skip
    launch = Launch(U=True, IDS=ids is not None)
    n, m = query.shape[0], keys.shape[0]
    with device_of(query):
        rows, columns = statistics(call, [launch], chunk)
        mean_keys = query.new_empty(n if attend else 0, query.shape[1])
        if attend:
            architecture, _ = architecture_and_processors(query)
            tile = tuning.lookup("similarity_backward", launch.gradient_tiles, precision_of(query.dtype), architecture)
            scratch, sums = gradient_scratch(call, [launch], [tile], chunk)
            ones = torch.zeros_like(rows)
            ones[RowStat.LSE_U] = 1.0
            for first in starts(n, chunk):
                at = slice(first, min(n, first + chunk))
                gradients_of_planes(call, launch, tile, (rows, columns, ones, columns), None, scratch, sums, at, attend=True)
                torch.mm(scratch[0, : at.stop - first, :m], keys, out=mean_keys[at])
    return torch.stack([rows[RowStat.LSE_U], rows[RowStat.DIAGONAL_U]]), mean_keys
