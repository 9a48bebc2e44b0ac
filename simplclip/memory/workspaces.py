"""Memory that a C++ function takes from torch's allocator besides its results, which fake tensors do not show.

The function itself computes its scratch from meta tensors (csrc/scratch.h). On a CPU the memory is added that oneDNN needs to
pack the largest product of bfloat16. Triton's launchers are Python; predictions run them without their kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from simplclip.common.errors import UserError
from simplclip.ops import backends
from simplclip.ops.calls import flat
from simplclip.ops.mlp.call import HiddenCall, HiddenGradient
from simplclip.ops.similarity.call import RowsCall, SimilarityCall, SimilarityGradient


class UnknownWorkspace(UserError, RuntimeError):
    """The workspace of a C++ function cannot be predicted here."""


def workspace_bytes(name: str, backend: str, call: Any) -> int:
    """Bytes that the function `name` of `backend`, "cpu" or "cuda", takes besides its results when it runs `call`.

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
    fields = flat(call)
    products = _PRODUCTS[name](call) if backend == "cpu" and name in _PRODUCTS else ()
    packing = (packing_bytes(m, n, k, fields[0].dtype, transposed=transposed) for m, n, k, transposed in products)
    return _scratch(name, backend, *fields) + max(packing, default=0)


def _scratch(name: str, backend: str, *fields) -> int:
    function = getattr(torch.ops.simplclip, f"{name}_{backend}_workspace")
    try:
        with _disable_current_modes():
            return function(*(_on_meta(value) if isinstance(value, Tensor) else value for value in fields))
    except NotImplementedError:
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


# The products of a function: m, n and k of [m, k] @ [k, n], and whether the first operand is transposed.
Products = Iterator[tuple[int, int, int, bool]]


def _chunks(n: int, chunk: int, stored: int = 0) -> Iterable[int]:
    """The different numbers of rows of the chunks, none of which crosses the end of the stored rows."""
    return {min(chunk, size) for part in (stored, n - stored) if part for size in (part, part % chunk) if size}


def _similarities(call: SimilarityCall, stored: int, image: Iterable[int] = (), text: Iterable[int] = ()) -> Products:
    """Similarities, and gradients of image and text features of these widths."""
    (n, d), m = call.image.shape, call.text.shape[0]
    widths = [d] * call.has_student + ([call.teacher_image.shape[1]] if call.has_teacher else [])
    for count in _chunks(n, min(call.chunk, n), min(stored, n)):
        yield from ((count, m, width, False) for width in widths)
        yield from ((count, width, m, False) for width in image)
        yield from ((m, width, count, True) for width in text)


def _similarity_loss_bwd(call: SimilarityGradient) -> Products:
    d, width = call.image.shape[1], call.teacher_image.shape[1] if call.has_teacher else 0
    image = [d] * (call.has_student and call.need_image) + [d] * call.has_hadamard
    image += [width] * (call.interactive and (call.need_image or call.projected_image is not None))
    text = [d] * (call.has_student and call.need_text)
    text += [width] * (call.has_teacher_to_text and (call.need_text or call.projected_text is not None))
    return _similarities(call, call.stored.shape[1], image, text)


def _similarity_rows(call: RowsCall) -> Products:
    (n, d), m = call.query.shape, call.keys.shape[0]
    for count in _chunks(n, min(call.chunk, n)):
        yield count, m, d, False
        if call.attend:
            yield count, d, m, False


def _hidden_chunks(call: HiddenCall | HiddenGradient) -> Iterable[int]:
    """The numbers of rows of the hidden layer whose activation is in scratch: forward takes memory for no more."""
    h = call.h
    size = _scratch("parallel_mlp_fwd", "cpu", h, call.weight, None, "", h, False)
    return _chunks(len(h), size // (h.shape[1] * h.itemsize))


def _parallel_mlp_bwd(call: HiddenGradient) -> Products:
    c, f = call.weight.shape
    for count in _hidden_chunks(call):
        yield count, f, c, False
        if call.need_weight:
            yield c, f, count, True


_PRODUCTS = {
    "similarity_loss_fwd": lambda call: _similarities(call, call.stored_rows),
    "similarity_loss_bwd": _similarity_loss_bwd,
    "similarity_rows": _similarity_rows,
    "parallel_mlp_fwd": lambda call: ((n, *call.weight.shape, False) for n in _hidden_chunks(call)),
    "parallel_mlp_bwd": _parallel_mlp_bwd,
}
