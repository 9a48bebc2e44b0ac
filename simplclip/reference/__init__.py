"""The definition of every op in plain torch: any device, float64 included. What the kernels are tested against."""

from simplclip.reference.dtypes import accumulate_dtype
from simplclip.reference.feature_loss import feature_loss_bwd, feature_loss_fwd
from simplclip.reference.parallel_mlp import ACTIVATIONS, parallel_mlp_bwd, parallel_mlp_fwd
from simplclip.reference.shaped_attention import shaped_attention_bwd, shaped_attention_fwd
from simplclip.reference.similarity_loss import (
    NEGATIVES_ALL,
    NEGATIVES_HARD,
    ColumnStat,
    RowStat,
    similarity_loss_bwd,
    similarity_loss_fwd,
)
from simplclip.reference.similarity_rows import similarity_rows, similarity_rows_bwd

__all__ = [
    "ACTIVATIONS",
    "NEGATIVES_ALL",
    "NEGATIVES_HARD",
    "ColumnStat",
    "RowStat",
    "accumulate_dtype",
    "feature_loss_bwd",
    "feature_loss_fwd",
    "parallel_mlp_bwd",
    "parallel_mlp_fwd",
    "shaped_attention_bwd",
    "shaped_attention_fwd",
    "similarity_loss_bwd",
    "similarity_loss_fwd",
    "similarity_rows",
    "similarity_rows_bwd",
]
