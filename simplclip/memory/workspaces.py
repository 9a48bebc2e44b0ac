"""Memory that a C++ function takes from torch's allocator besides its results, which fake tensors do not show.

The function itself computes its scratch from meta tensors (csrc/scratch.h). On a CPU the memory is added that oneDNN needs to
pack one product of bfloat16. Triton's launchers are Python; predictions run them without their kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from simplclip.common.errors import UserError
from simplclip.ops import backends
from simplclip.ops.calls import flat
from simplclip.ops.similarity.call import SimilarityCall


class UnknownWorkspace(UserError, RuntimeError):
    """The workspace of a C++ function cannot be predicted here."""


def workspace_bytes(name: str, backend: str, call: Any) -> int:
    """Bytes that the function `name` of `backend`, "cpu" or "cuda", takes besides its results when it runs `call`.

    This is the highest sum of live bytes without the tensors that it returns. Only shapes, strides, dtypes and arguments that
    are not tensors are read. On a CPU the result is exact, for bfloat16 within 128 KiB or 1%. On a GPU each allocation is
    rounded up to 512 bytes, as in the allocator; cuBLAS's own memory is not included.

    Raises:
        UnknownWorkspace: the extension of the function does not load, or the function has no workspace.
    """
    extension = backends.extension if backend == "cpu" else backends.cuda_extension
    if extension is None:
        error = backends.extension_error if backend == "cpu" else backends.cuda_extension_error
        raise UnknownWorkspace(f"the workspace of {name} on backend {backend} cannot be predicted: {error}")
    fields = flat(call)
    function = getattr(torch.ops.simplclip, f"{name}_{backend}_workspace")
    try:
        with _disable_current_modes():
            scratch = function(*(_on_meta(value) if isinstance(value, Tensor) else value for value in fields))
    except NotImplementedError:
        raise UnknownWorkspace(f"no workspace is stated for {name} on backend {backend}") from None
    if backend == "cuda" or name not in _PRODUCTS:
        return scratch
    *sizes, transposed = _PRODUCTS[name](call)
    return scratch + packing_bytes(*sizes, fields[0].dtype, transposed=transposed)


def _on_meta(tensor: Tensor) -> Tensor:
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
    memory = torch.empty(tensor.storage_offset() + size, dtype=tensor.dtype, device="meta")
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _parts(size: int, of: int) -> int:
    return -(-size // of)


def _row_block(m: int) -> int:
    """Rows of a block: at most 256, with the number of blocks that wastes the fewest rows."""
    fewest = _parts(m, 256)
    blocks = range(fewest, max(fewest, m // 32) + 1)
    return _parts(m, min(blocks, key=lambda count: count * _parts(m, count)))


def packing_bytes(m: int, n: int, k: int, dtype: torch.dtype, *, transposed: bool = False) -> int:
    """Bytes that oneDNN takes from torch's allocator within one product [m, k] @ [k, n] of bfloat16.

    transposed: the first operand's columns are contiguous, not its rows. The formula is fitted to 347 products by oneDNN's
    kernels for AVX512-BF16 on one thread of a Zen 4, where it is exact; T threads take about T times as much. Other
    instruction sets (AMX, and AVX512-FP16, with which oneDNN multiplies float16 too) are not measured.
    """
    if dtype != torch.bfloat16 or not backends.native_bf16 or m * n * k <= 16**3:
        return 0
    # A block of the first operand is copied if it is transposed or if its row stride is a large power of two.
    copied = transposed or (m >= 1024 and k >= 4096 and k & (k - 1) == 0)
    depth = k if k <= 512 else 512 if transposed or k <= 1024 else 1024
    rows, pitch, columns = _row_block(m), _parts(depth, 32) * 32, min(n, 64)
    if copied and depth < k:  # sums of several blocks of the depth are kept until the last one
        blocks = _parts(n, 64)
        columns = 64 * max(count for count in range(1, 17) if blocks % count == 0)
    size = 4 * rows * columns + 2 * pitch * 64 + 1024
    if copied:
        size += 2 * rows * (pitch + 32 * (pitch % 512 == 0)) + 128
    return torch.get_num_threads() * size


def _similarity(call: SimilarityCall, transposed: bool = False) -> tuple[int, int, int, bool]:
    rows = min(call.chunk, len(call.image))
    return (*call.text.shape, rows, True) if transposed else (rows, *call.text.shape, False)


# The product for which a function packs about the most, the gradient of its second operand if there is one: m, n and k of
# [m, k] @ [k, n], and whether the first operand is transposed.
_PRODUCTS = {
    "similarity_loss_fwd": _similarity,
    "similarity_loss_bwd": lambda call: _similarity(call, transposed=call.need_text),
    "similarity_sigmoid": lambda call: _similarity(call, transposed=call.need_text),
    "similarity_rows": lambda call: (min(call.chunk, len(call.query)), *call.keys.shape, False),
    "parallel_mlp_fwd": lambda call: (len(call.h), *call.weight.shape, False),
    "parallel_mlp_bwd": lambda call: (
        (*call.weight.shape, len(call.h), True) if call.need_weight else (len(call.h), *reversed(call.weight.shape), False)
    ),
}
