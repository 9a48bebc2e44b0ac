"""Launcher of similarity_rows: similarity_loss's kernels with image_to_teacher alone, query as image and keys as text."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.launch import architecture_and_processors, device_of, precision_of, starts
from simplclip.kernels.similarity.launch import Launch
from simplclip.kernels.similarity.op import gradient_scratch, gradients_of_matrices, statistics
from simplclip.ops.calls import flat
from simplclip.ops.similarity.call import NO_NEGATIVES, RowsCall, RowStat, SimilarityCall, SimilarityGradient


def similarity_rows(call: RowsCall) -> tuple[Tensor, Tensor]:  # [2, N], [N, D] or [0, D]
    """The reference's statistics; for the mean keys each chunk's softmax is computed again and multiplied by the keys."""
    query, keys = call.query, call.keys
    of_similarity = SimilarityCall(
        image=query, text=keys, scale=call.scale, teacher_image=None, teacher_text=keys, teacher_scale=None,
        projected_image=None, projected_text=None, cross_scale=call.scale, plane_weight=None, plane_bias=None,
        ids=call.ids, text_ids=call.text_ids, label_offset=call.label_offset, softmax=False, columns=False,
        negatives=NO_NEGATIVES, relational=False, interactive=True, entropy=0.0, chunk=call.chunk, stored_rows=0,
    )  # fmt: skip
    launch = Launch(HAS_IMAGE_TO_TEACHER=True, HAS_IDS=call.ids is not None)
    n, m = query.shape[0], keys.shape[0]
    with device_of(query):
        rows, columns = statistics(of_similarity, [launch])
        mean_keys = query.new_empty(n if call.attend else 0, query.shape[1])
        if call.attend:
            architecture, _ = architecture_and_processors(query)
            tile = tuning.lookup("similarity_backward", launch.gradient_tiles, precision_of(query.dtype), architecture)
            scratch, sums = gradient_scratch(of_similarity, [launch], [tile])
            ones = torch.zeros_like(rows)
            ones[RowStat.LSE_IMAGE_TO_TEACHER] = 1.0
            gradient = SimilarityGradient(*flat(of_similarity), ones, columns, rows, columns, rows, True, False)
            for first in starts(n, call.chunk):
                at = slice(first, min(n, first + call.chunk))
                gradients_of_matrices(gradient, launch, tile, None, scratch, sums, at, attend=True)
                torch.mm(scratch[0, : at.stop - first, :m], keys, out=mean_keys[at])
    return torch.stack([rows[RowStat.LSE_IMAGE_TO_TEACHER], rows[RowStat.DIAGONAL_IMAGE_TO_TEACHER]]), mean_keys
