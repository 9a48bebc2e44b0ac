"""The public ops. Each file holds one op whole: schema, fake, autograd, checks and the public function."""

from simplclip.ops.feature_loss import feature_loss
from simplclip.ops.parallel_mlp import parallel_mlp
from simplclip.ops.shaped_attention import shaped_attention
from simplclip.ops.similarity_loss import similarity_loss
from simplclip.ops.simplified_block import simplified_block

__all__ = ["feature_loss", "parallel_mlp", "shaped_attention", "similarity_loss", "simplified_block"]
