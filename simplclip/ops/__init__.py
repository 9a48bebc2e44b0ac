"""The public ops, one folder each: op.py has schema, autograd and function, reference.py the
definition (block has none).
"""

from simplclip.ops.attention.op import shaped_attention
from simplclip.ops.block.op import simplified_block
from simplclip.ops.feature.op import feature_loss
from simplclip.ops.mlp.op import parallel_mlp
from simplclip.ops.similarity.op import similarity_loss

__all__ = [
    "feature_loss",
    "parallel_mlp",
    "shaped_attention",
    "similarity_loss",
    "simplified_block",
]
