"""similarity_loss in C++ for the CPU: csrc/cpu/similarity/."""

from __future__ import annotations

from simplclip.calls.similarity import SigmoidCall, SimilarityCall, SimilarityGradient
from simplclip.ops.backends import Cpu, native
from simplclip.ops.similarity.reference import empty_gradients, empty_sigmoids, empty_statistics


class CpuSimilarity(Cpu):
    """Backend "cpu"."""

    similarity_loss_fwd = native(
        "similarity_loss_fwd_cpu", SimilarityCall, "(Tensor, Tensor, Tensor)", empty_statistics
    )
    similarity_loss_bwd = native(
        "similarity_loss_bwd_cpu",
        SimilarityGradient,
        "(Tensor, Tensor, Tensor, Tensor)",
        empty_gradients,
    )
    similarity_sigmoid = native(
        "similarity_sigmoid_cpu", SigmoidCall, "(Tensor, Tensor, Tensor, Tensor)", empty_sigmoids
    )
