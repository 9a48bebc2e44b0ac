"""Choice of a run's device, precision and algorithms, and measurement of its memory."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from simplclip.common.errors import InputError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Values of ONEDNN_MAX_CPU_ISA by which oneDNN, which computes torch's products, copies bf16
# operands to fp32.
ISAS_WITHOUT_BF16 = re.compile("SSE41|AVX|AVX2(_VNNI(_2)?)?|AVX512_CORE(_VNNI)?")
# the memory limit of a container, by versions 2 and 1 of control groups
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def pick_device(name: str = "auto") -> torch.device:
    """Returns the device `name`, for "auto" a GPU if there is one; InputError for a missing one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"device: expected cpu, cuda or cuda:N, got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device: expected a device of this machine, got {name!r}; it has "
            f"{torch.cuda.device_count()} usable GPUs (torch {torch.__version__})"
        )
    return device


def native_bf16(device: torch.device) -> bool:
    """Whether products in bf16 run in the hardware of `device`; emulated ones are slower than fp32.

    On a CPU the variable ONEDNN_MAX_CPU_ISA may forbid them.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if device.type != "cpu" or ISAS_WITHOUT_BF16.fullmatch(isa):
        return False
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def pick_precision(name: str, device: torch.device) -> tuple[str, str]:
    """Returns the precision, one of DTYPES, and a few words on why.

    "auto" is bf16 if the device has it, else fp32. Raises InputError for another name.
    """
    if name in DTYPES:
        return name, "as configured"
    if name != "auto":
        raise InputError(f"precision: expected {', '.join(DTYPES)} or auto, got {name!r}")
    if native_bf16(device):
        return "bf16", f"auto: this {device.type} has native bf16"
    return "fp32", f"auto: this {device.type} has no native bf16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Returns the autocast context of a precision, "fp32", "bf16" or "fp16"; disabled for fp32."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextlib.contextmanager
def timed_algorithms(enabled: bool) -> Iterator[None]:
    """Context in which cuDNN times each convolution's algorithms once, if `enabled`."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def total_memory(device: torch.device) -> int:
    """Returns the bytes of the GPU's memory or, on a CPU, of a rank's equal share of the machine's.

    In a container with a limit, the limit is shared.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            total = min(total, int(Path(file).read_text()))
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory_mb(device: torch.device) -> float:
    """Returns the peak in MiB since the start, or since torch's statistics were reset.

    Of a GPU's allocator, or on a CPU of the process's resident set (0 outside Linux).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    kib = re.search(r"VmHWM:\s*(\d+)", status.read_text() if status.exists() else "")
    return int(kib[1]) / 2**10 if kib else 0.0


def describe_gpu(device: torch.device) -> str:
    """Returns the GPU memory of all processes as "  GPU 3.1 of 23.7 GiB"; "" for a CPU.

    With nvidia-ml-py the GPU's utilization follows: ", 97% busy".
    """
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    used = f"  GPU {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
    with contextlib.suppress(Exception):
        used += f", {torch.cuda.utilization(device)}% busy"
    return used
