"""shaped_attention in C++ for the CPU: csrc/cpu/attention/."""

from __future__ import annotations

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops.attention.reference import empty_gradient, empty_results
from simplclip.ops.backends import Cpu, native


class CpuAttention(Cpu):
    """Backend "cpu"."""

    shaped_attention_fwd = native(
        "shaped_attention_fwd_cpu", AttentionCall, "(Tensor, Tensor)", empty_results
    )
    shaped_attention_bwd = native(
        "shaped_attention_bwd_cpu", AttentionInto, "Tensor", empty_gradient
    )
