"""The second half of parallel_mlp in C++ for the CPU: csrc/cpu/mlp/."""

from __future__ import annotations

from simplclip.calls.mlp import HiddenCall, HiddenGradient
from simplclip.ops.backends import Cpu, native
from simplclip.ops.mlp.reference import empty_weight_gradient


def _nothing(call: HiddenCall) -> None:
    """Returns None: forward writes its result to call.out."""


class CpuMlp(Cpu):
    """Backend "cpu"."""

    parallel_mlp_fwd = native("parallel_mlp_fwd_cpu", HiddenCall, "()", _nothing)
    parallel_mlp_bwd = native(
        "parallel_mlp_bwd_cpu", HiddenGradient, "Tensor", empty_weight_gradient
    )
