"""shaped_attention in CUDA C++, of few tokens: csrc/cuda/attention/."""

from __future__ import annotations

import torch

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops import backends
from simplclip.ops.attention.reference import empty_gradient, empty_results
from simplclip.ops.backends import Backend, Facts, native


class CudaAttention(Backend):
    """Backend "cuda"."""

    name = "cuda"

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, facts: Facts) -> str | None:
        """Returns why the kernels cannot run a call; None if they can."""
        if reason := backends.extension_on_cuda(device, dtype):
            return reason
        if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
            return (
                "serves float32 only through TF32, which torch does not allow "
                "(torch.backends.cuda.matmul.allow_tf32)"
            )
        reason = backends.cuda_extension.shaped_attention_why_not(
            facts.length, facts.width, dtype == torch.float32
        )
        return reason and f"{reason}; got {facts.length} tokens, width {facts.width}"

    shaped_attention_fwd = native(
        "shaped_attention_fwd_cuda", AttentionCall, "(Tensor, Tensor)", empty_results
    )
    shaped_attention_bwd = native(
        "shaped_attention_bwd_cuda", AttentionInto, "Tensor", empty_gradient
    )
