"""The second half of parallel_mlp in Triton: kernels/mlp/."""

from __future__ import annotations

from torch import Tensor

from simplclip.calls.mlp import HiddenCall, HiddenGradient
from simplclip.ops.backends import Triton


class TritonMlp(Triton):
    """Backend "triton"."""

    @staticmethod
    def parallel_mlp_fwd(call: HiddenCall) -> None:
        """Writes to call.out, as the reference's method."""
        from simplclip.kernels.mlp import launch

        launch.parallel_mlp_fwd(call)

    @staticmethod
    def parallel_mlp_bwd(call: HiddenGradient) -> Tensor:
        """Overwrites h and returns the weight's gradient, as the reference's method."""
        from simplclip.kernels.mlp import launch

        return launch.parallel_mlp_bwd(call)
