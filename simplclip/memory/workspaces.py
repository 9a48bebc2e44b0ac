"""Memory that a C++ function takes from torch's allocator besides its results, which fake tensors do not show.

The function itself computes its scratch from meta tensors (csrc/scratch.h). On a CPU the memory is added that oneDNN needs to
pack the largest product of bfloat16. Triton's launchers are Python; predictions run them without their kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from simplclip.common.errors import UserError
from simplclip.ops import backends
from simplclip.ops.calls import flat
from simplclip.ops.similarity.call import RowsCall, SimilarityCall, SimilarityGradient

_HIDDEN_BYTES = 8 << 20  # of a chunk of rows of an activation in parallel_mlp


class UnknownWorkspace(UserError, RuntimeError):
    """The workspace of a C++ function cannot be predicted here."""


def workspace_bytes(name: str, backend: str, *args) -> int:
    """Bytes that the function `name` of `backend`, "cpu" or "cuda", takes besides its results when called with `args`.

    This is the highest sum of live bytes without the tensors that it returns. Only shapes, strides, dtypes and arguments that
    are not tensors are read. On a CPU the result is exact except for oneDNN's packing of bfloat16 operands. On a GPU each
    allocation is rounded up to 512 bytes, as in the allocator; cuBLAS's own memory is not included.

    Raises:
        UnknownWorkspace: the extension of the function does not load, or the function has no workspace.
    """
    extension = backends.extension if backend == "cpu" else backends.cuda_extension
    if extension is None:
        error = backends.extension_error if backend == "cpu" else backends.cuda_extension_error
        raise UnknownWorkspace(f"the workspace of {name} on backend {backend} cannot be predicted: {error}")
    function = getattr(torch.ops.simplclip, f"{name}_{backend}_workspace")
    fields = flat(args[0]) if hasattr(args[0], "__match_args__") else args
    with _disable_current_modes():
        scratch = _scratch(function, name, backend, fields)
    return scratch + (_PACKING[name](*args) if backend == "cpu" and name in _PACKING else 0)


def _scratch(function, name: str, backend: str, fields: Iterable) -> int:
    try:
        return function(*(_on_meta(value) if isinstance(value, Tensor) else value for value in fields))
    except NotImplementedError:
        if backend == "cpu" and name.startswith(("feature_loss", "shaped_attention")):
            return 0  # their scratch belongs to threads and is not torch's
        raise UnknownWorkspace(f"no workspace is stated for {name} on backend {backend}") from None


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


def _chunks(n: int, chunk: int, stored: int) -> Iterable[int]:
    """The different numbers of rows of the chunks, none of which crosses the end of the stored rows."""
    return {min(chunk, size) for part in (stored, n - stored) if part for size in (part, part % chunk) if size}


def _similarities(call: SimilarityCall, stored: int, image: Iterable[int] = (), text: Iterable[int] = ()) -> int:
    """Packing of the largest product: similarities, and gradients of image and text features of these widths."""
    (n, d), m, dtype = call.image.shape, call.text.shape[0], call.image.dtype
    widths = {d} if call.has_student else set()
    widths |= {call.teacher_image.shape[1]} if call.has_teacher else set()
    sizes = [0]
    for count in _chunks(n, min(call.chunk, n), min(stored, n)):
        sizes += [packing_bytes(count, m, width, dtype) for width in widths]
        sizes += [packing_bytes(count, width, m, dtype) for width in image]
        sizes += [packing_bytes(m, width, count, dtype, transposed=True) for width in text]
    return max(sizes)


def _similarity_loss_bwd(call: SimilarityGradient) -> int:
    d, width = call.image.shape[1], call.teacher_image.shape[1] if call.has_teacher else 0
    own = {"image": call.projected_image is None, "text": call.projected_text is None}
    image = [d] * (call.has_student and call.need_image) + [d] * call.has_hadamard
    image += [width] * (call.interactive and (call.need_image or not own["image"]))
    text = [d] * (call.has_student and call.need_text)
    text += [width] * (call.has_teacher_to_text and (call.need_text or not own["text"]))
    return _similarities(call, call.stored.shape[1], image, text)


def _similarity_rows(call: RowsCall) -> int:
    (n, d), m, dtype = call.query.shape, call.keys.shape[0], call.query.dtype
    counts = _chunks(n, min(call.chunk, n), 0)
    return max(max(packing_bytes(c, m, d, dtype), call.attend * packing_bytes(c, d, m, dtype)) for c in counts)


def _parallel_mlp(h: Tensor, weight: Tensor, products: int) -> int:
    """Packing of forward's product, or with products = 2 of the gradient of the hidden layer and of the weight's (3)."""
    (t, f), c = h.shape, weight.shape[0]
    rows = min(max(64, _HIDDEN_BYTES // (f * h.itemsize)), t)
    sizes = [0]
    for count in _chunks(t, rows, 0):
        sizes.append(packing_bytes(count, c, f, h.dtype) if products == 1 else packing_bytes(count, f, c, h.dtype))
        if products == 3:
            sizes.append(packing_bytes(c, f, count, h.dtype, transposed=True))
    return max(sizes)


_PACKING = {
    "similarity_loss_fwd": lambda call: _similarities(call, call.stored_rows),
    "similarity_loss_bwd": _similarity_loss_bwd,
    "similarity_rows": _similarity_rows,
    "parallel_mlp_fwd": lambda call: _parallel_mlp(call.h, call.weight, 1),
    "parallel_mlp_bwd": lambda call: _parallel_mlp(call.h, call.weight, 2 + call.need_weight),
}
