"""Workspaces of the C++ functions for the CPU (csrc/cpu); see workspaces. Scratch of threads is not torch's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from simplclip.ops import backends
from simplclip.ops.similarity.call import HARD_NEGATIVES, RowsCall, SimilarityCall, SimilarityGradient

_STRIP = 64  # rows of a strip, which has its own partial statistics of columns
_HIDDEN_BYTES = 8 << 20  # of an activation's rows


def _parts(size: int, of: int) -> int:
    return -(-size // of)


def _row_block(m: int) -> int:
    """Rows of a block: at most 256, in as many blocks as waste the fewest rows."""
    fewest = _parts(m, 256)
    blocks = range(fewest, max(fewest, m // 32) + 1)
    return _parts(m, min(blocks, key=lambda count: count * _parts(m, count)))


def packing_bytes(m: int, n: int, k: int, dtype: torch.dtype, *, transposed: bool = False) -> int:
    """Bytes that oneDNN takes from torch's allocator within one product [m, k] @ [k, n] of bfloat16.

    `transposed`: the first operand's columns are contiguous, not its rows. Fitted to 347 products by oneDNN's kernels for
    AVX512-BF16 on one thread of a Zen 4, and exact there; T threads take about T times as much. Other instruction sets
    (AMX, and AVX512-FP16, by which oneDNN multiplies float16 too) are not measured.
    """
    if dtype != torch.bfloat16 or not backends.native_bf16 or m * n * k <= 16**3:
        return 0
    # A block of the first operand is copied if it is transposed or if its rows lie a large power of two apart.
    copied = transposed or (m >= 1024 and k >= 4096 and k & (k - 1) == 0)
    depth = k if k <= 512 else 512 if transposed or k <= 1024 else 1024
    rows, pitch, columns = _row_block(m), _parts(depth, 32) * 32, min(n, 64)
    if copied and depth < k:  # sums of several blocks of the depth stay until the last one
        blocks = _parts(n, 64)
        columns = 64 * max(count for count in range(1, 17) if blocks % count == 0)
    size = 4 * rows * columns + 2 * pitch * 64 + 1024
    if copied:
        size += 2 * rows * (pitch + 32 * (pitch % 512 == 0)) + 128
    return torch.get_num_threads() * size


def _chunks(n: int, chunk: int, stored: int) -> Iterable[int]:
    """The different numbers of rows of a sweep's chunks, none of which crosses the end of the stored rows."""
    return {min(chunk, size) for part in (stored, n - stored) if part for size in (part, part % chunk) if size}


class _Sweep:
    """What forward and backward of similarity_loss share (csrc/cpu/similarity_sweep.h)."""

    def __init__(self, call: SimilarityCall, stored: int):
        self.call, self.dtype = call, call.image.dtype
        (self.n, self.d), self.m = call.image.shape, call.text.shape[0]
        self.chunk, self.stored = min(call.chunk, self.n), min(stored, self.n)
        self.teacher_width = call.teacher_image.shape[1] if call.has_teacher else 0
        self.missing = self.chunk if self.stored < self.n else 0  # rows of a plane that is not stored as a whole

    def scratch_bytes(self, student_rows: int) -> int:
        hadamard = self.chunk * self.call.has_hadamard
        rows = student_rows + self.missing * self.call.has_teacher + hadamard
        return (rows * self.m + hadamard * self.d) * self.dtype.itemsize

    def packing_bytes(self, image_widths: Iterable[int] = (), text_widths: Iterable[int] = ()) -> int:
        """Of the largest product: similarities, and gradients of image and of text features of such widths."""
        widths = {self.d} if self.call.has_student else set()
        widths |= {self.teacher_width} if self.call.has_teacher else set()
        largest = 0
        for count in _chunks(self.n, self.chunk, self.stored):
            sizes = [packing_bytes(count, self.m, width, self.dtype) for width in widths]
            sizes += [packing_bytes(count, width, self.m, self.dtype) for width in image_widths]
            sizes += [packing_bytes(self.m, width, count, self.dtype, transposed=True) for width in text_widths]
            largest = max(largest, *sizes)
        return largest


def _similarity_loss_fwd(call: SimilarityCall) -> int:
    sweep = _Sweep(call, call.stored_rows)
    # Statistics of the columns: of Z and its mean over hard negatives, of T and Z's mean; of V, of T and V's mean.
    parts = bool(call.softmax) + (call.negatives == HARD_NEGATIVES) + 2 * call.relational + 3 * call.interactive
    own = call.interactive and call.relational  # a second total of T
    columns = 4 * sweep.m * (_parts(sweep.chunk, _STRIP) * parts + own) if call.columns else 0
    return sweep.scratch_bytes(sweep.missing) + columns + sweep.packing_bytes()


def _similarity_loss_bwd(call: SimilarityGradient) -> int:
    need_image, need_text = call.need_image, call.need_text
    sweep = _Sweep(call, call.stored.shape[1])
    n, m, d, teacher_width = sweep.n, sweep.m, sweep.d, sweep.teacher_width
    z, u, v = call.has_student, call.interactive, call.has_teacher_to_text
    own_image, own_text = call.projected_image is None, call.projected_text is None

    image = ([d] if z and need_image else []) + ([teacher_width] if u and (need_image or not own_image) else [])
    image += [d] if call.has_hadamard else []
    text = ([d] if z and need_text else []) + ([teacher_width] if v and (need_text or not own_text) else [])
    # Float32 sums of bfloat16 products.
    several = sweep.chunk < n or sweep.stored % n != 0
    sums = d * (need_text and (several or ((call.has_hadamard or (v and own_text)) and z)))
    sums += teacher_width * (not own_text and several)
    sums *= 4 * m * (sweep.dtype == torch.bfloat16)
    # Gradients of what no plane reads, made twice: as memory for the products and as zeros.
    zero_image = n * d if need_image and not z and not (u and own_image) else 0
    zero_text = m * d if need_text and not z and not (v and own_text) else 0
    zero_text += m * teacher_width if not own_text and not v else 0
    last = max(zero_image, zero_text) * sweep.dtype.itemsize
    product = sweep.chunk * d * call.has_hadamard * sweep.dtype.itemsize
    return sweep.scratch_bytes(sweep.chunk) + product + sums + max(sweep.packing_bytes(image, text), last)


def _similarity_rows(call: RowsCall) -> int:
    query, attend, (n, d), m = call.query, call.attend, call.query.shape, call.keys.shape[0]
    chunk = min(call.chunk, n)
    packing = 0
    for count in _chunks(n, chunk, 0):
        mean = packing_bytes(count, d, m, query.dtype) if attend else 0
        packing = max(packing, packing_bytes(count, m, d, query.dtype), mean)
    return chunk * m * query.itemsize + 4 * n + packing


def _hidden_rows(h: Tensor) -> int:
    return min(max(64, _HIDDEN_BYTES // (h.shape[1] * h.itemsize)), h.shape[0])


def _parallel_mlp_fwd(h: Tensor, weight: Tensor, _bias, _act: str, _out: Tensor, _accumulate: bool) -> int:
    (t, f), c = h.shape, weight.shape[0]
    if not t:
        return 0
    rows = _hidden_rows(h)
    return rows * f * h.itemsize + max(packing_bytes(count, c, f, h.dtype) for count in _chunks(t, rows, 0))


def _parallel_mlp_bwd(_grad: Tensor, h: Tensor, weight: Tensor, _act: str, need_weight: bool) -> int:
    (t, f), c = h.shape, weight.shape[0]
    if not t:  # zeros beside the memory for a product
        return c * f * weight.itemsize * need_weight
    rows = _hidden_rows(h)
    sums = 4 * c * f if need_weight and h.dtype != torch.float32 and rows < t else 0
    packing = 0
    for count in _chunks(t, rows, 0):
        of_weight = packing_bytes(c, f, count, h.dtype, transposed=True) if need_weight else 0
        packing = max(packing, packing_bytes(count, f, c, h.dtype), of_weight)
    return rows * f * h.itemsize + sums + packing


def _nothing(*_args) -> int:
    return 0


STATED = {
    "similarity_loss_fwd": _similarity_loss_fwd,
    "similarity_loss_bwd": _similarity_loss_bwd,
    "similarity_rows": _similarity_rows,
    "feature_loss_fwd": _nothing,
    "feature_loss_bwd": _nothing,
    "shaped_attention_fwd": _nothing,
    "shaped_attention_bwd": _nothing,
    "parallel_mlp_fwd": _parallel_mlp_fwd,
    "parallel_mlp_bwd": _parallel_mlp_bwd,
}
