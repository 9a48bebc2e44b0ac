"""What the native function of a backend takes from torch's allocator beside its results, from its arguments alone.

For predictions of peak memory by fake tensors, which see the aten ops around a C++ function and nothing inside it: whoever
allocates in csrc/ states it here, and test_workspaces.py measures that. Triton's launchers are Python: predictions run them
without their kernels (simplclip.kernels.launch.pretended).
"""

from __future__ import annotations

from typing import Any

from simplclip.ops import workspaces_cpu, workspaces_cuda
from simplclip.ops.backends import TABLE

# backend -> name in backends.TABLE -> bytes of a call's arguments
STATED: dict[str, dict[str, Any]] = {"cpu": workspaces_cpu.STATED, "cuda": workspaces_cuda.STATED}


class UnknownWorkspace(RuntimeError):
    """No workspace is stated for a native function."""


def workspace_bytes(name: str, backend: str, *args) -> int:
    """Bytes that the function `name` of `backend` (see backends.TABLE) takes from torch's allocator when called with `args`.

    Beside its results, that is: the highest sum of live bytes minus those of the tensors that it returns; memory that is not
    torch's does not count. Only shapes, dtypes, strides, devices and arguments that are no tensors are read, so that tensors
    may be fake or on the meta device.

    On a CPU exact, but for oneDNN's packing of bfloat16 operands (workspaces_cpu.packing_bytes). On a GPU each allocation
    counts as the multiple of 512 bytes that the allocator makes of it; what cuBLAS takes for itself does not count.

    Raises:
        UnknownWorkspace: nothing is stated for this function.
    """
    if backend == "reference":
        reason = "it is plain torch, whose ops a prediction runs itself"
    elif name not in TABLE:
        reason = f"there is no such op; expected one of {', '.join(TABLE)}"
    elif backend == "triton":
        reason = "predictions run its launchers themselves"
    elif backend not in STATED:
        reason = f"there is no such backend; expected one of {', '.join(STATED)}"
    elif backend not in TABLE[name]:
        reason = f"it has no such backend; expected one of {', '.join(TABLE[name])}"
    elif name not in STATED[backend]:
        reason = f"simplclip.ops.workspaces.STATED[{backend!r}] lacks it"
    else:
        return STATED[backend][name](*args)
    raise UnknownWorkspace(f"no workspace is stated for {name} on backend {backend}: {reason}")
