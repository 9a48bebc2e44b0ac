"""The public ops. Each file holds one op whole: schema, fake, autograd, checks and the public function."""

from simplclip.ops.feature_loss import feature_loss
from simplclip.ops.shaped_attention import shaped_attention
from simplclip.ops.similarity_loss import similarity_loss

__all__ = ["feature_loss", "shaped_attention", "similarity_loss"]
