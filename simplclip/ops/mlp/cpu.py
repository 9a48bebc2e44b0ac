"""The second half of parallel_mlp in C++ for the CPU: csrc/cpu/mlp/."""

from __future__ import annotations

from simplclip.calls.mlp import HiddenCall, HiddenGradient
from simplclip.ops.backends import Cpu, native


class CpuMlp(Cpu):
    """Backend "cpu"."""

    parallel_mlp_fwd = native("parallel_mlp_fwd_cpu", HiddenCall, "()", lambda call: None)
    parallel_mlp_bwd = native(
        "parallel_mlp_bwd_cpu",
        HiddenGradient,
        "Tensor",
        lambda call: call.weight.new_empty(len(call.weight) * call.need_weight, call.h.shape[1]),
    )
