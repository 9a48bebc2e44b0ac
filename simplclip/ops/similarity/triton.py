"""similarity_loss in Triton: kernels/similarity/."""

from __future__ import annotations

from torch import Tensor

from simplclip.calls.similarity import SigmoidCall, SimilarityCall, SimilarityGradient
from simplclip.ops.backends import Triton


class TritonSimilarity(Triton):
    """Backend "triton"; the methods return what the reference's return."""

    @staticmethod
    def similarity_loss_fwd(call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
        """Returns statistics of rows [6, N] and columns [3, M], and no stored products."""
        from simplclip.kernels.similarity import launch

        return launch.similarity_loss_fwd(call)

    @staticmethod
    def similarity_loss_bwd(call: SimilarityGradient) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns d_image, d_text, d_scale [] and d_plane [2]."""
        from simplclip.kernels.similarity import launch

        return launch.similarity_loss_bwd(call)

    @staticmethod
    def similarity_sigmoid(call: SigmoidCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the terms [K], and the gradients d_image, d_text and d_sigmoids [2, K]."""
        from simplclip.kernels.similarity import launch

        return launch.similarity_sigmoid(call)
