"""Workspaces of the launchers of Triton kernels (kernels/) and of the CUDA C++ functions (csrc/cuda); see workspaces.

Each function here goes through what its launcher allocates and frees, in that order. Nothing imports Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.kernels import launch, tuning
from simplclip.kernels.similarity.launch import Call, Launch, launches
from simplclip.ops.similarity.call import ColumnStat, RowStat

# Architecture and multiprocessors of the device that is planned for where there is none to ask: an RTX 3090.
ASSUMED = (86, 82)
_GRAIN = 512  # bytes that CUDA's allocator rounds to
_SCALARS = 4  # sums of a program of similarity_backward
_TILE = 16  # steps over tokens, of parallel_mlp
_HALF, _FLOAT, _DOUBLE = 2, 4, 8


def _device(tensor: Tensor) -> tuple[int, int]:
    if launch.interpreted() or torch.cuda.is_available():
        return launch.architecture_and_processors(tensor)
    return ASSUMED


def _parts(size: int, of: int) -> int:
    return -(-size // of)


class _Memory:
    """Live bytes of an allocator and their peak."""

    def __init__(self, like: Tensor):
        self.grain = _GRAIN if like.device.type == "cuda" else 1
        self.live = self.peak = 0

    def take(self, elements: int, itemsize: int) -> int:
        """The bytes of an allocation, for `give`."""
        size = _parts(elements * itemsize, self.grain) * self.grain
        self.live += size
        self.peak = max(self.peak, self.live)
        return size

    def give(self, *sizes: int) -> None:
        self.live -= sum(sizes)

    def replace(self, before: int, elements: int, itemsize: int) -> int:
        """`x = new(...)` where x holds `before`, which is freed after the new one is there."""
        size = self.take(elements, itemsize)
        self.give(before)
        return size

    def copy(self, *tensors: Tensor | None) -> None:
        for t in tensors:
            if t is not None:
                self.take(t.numel(), t.itemsize)

    def beside(self, *results: int) -> int:
        return max(0, self.peak - sum(results))


def _feature_loss_fwd(student: Tensor, _teacher, _smooth, _beta, normalize: bool) -> int:
    n, d = student.shape
    block = min(8192, max(16, 1 << (d - 1).bit_length()))
    memory = _Memory(student)
    memory.take(_parts(n, max(1, 2048 // block)), _FLOAT)  # a sum of each program
    norms = memory.take(2 * n * normalize, _FLOAT)
    total = memory.take(1, _DOUBLE)
    mean = memory.replace(total, 1, _DOUBLE)
    loss = memory.replace(mean, 1, _FLOAT)
    return memory.beside(norms, loss)


def _nothing(*_args) -> int:
    return 0


def _attention_tile(op: str, q: Tensor) -> tuning.Tile:
    width = max(16, 1 << (q.shape[3] - 1).bit_length())
    return tuning.of_width(f"shaped_attention_{op}", width, launch.precision_of(q.dtype), _device(q)[0])


def _strided(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None and not t.is_contiguous()]


def _shaped_attention_fwd(q: Tensor, _k, _v, gains: Tensor, _lengths, _scale, _causal) -> int:
    sequences, tokens, heads, width = q.shape
    if not q.numel():
        return 0
    memory = _Memory(q)
    blocks = _parts(tokens, _attention_tile("fwd", q).block_m)
    if blocks > 1:
        memory.take(sequences * heads * blocks * width, _FLOAT)
    memory.copy(*_strided(gains))
    return memory.peak


def _shaped_attention_bwd(grad, q, _k, _v, gains, lse, _lengths, _scale, _causal, _dq, _dk, _dv) -> int:
    sequences, tokens, heads, _ = q.shape
    if not q.numel():
        return 0
    memory = _Memory(q)
    memory.copy(*_strided(grad, gains), lse)  # the last for sums of A dP, one for each row
    memory.take(3 * sequences * heads * _parts(tokens, _attention_tile("rows", q).block_m), _FLOAT)
    return memory.peak


def _unaligned(*tensors: Tensor) -> list[Tensor]:
    """Tensors [B, L, H, K] whose rows do not begin at multiples of 16 bytes, if the allocator's memory does."""

    def is_aligned(t: Tensor) -> bool:
        steps = [t.stride(i) for i in range(3) if t.shape[i] != 1] + [t.storage_offset()]
        return t.stride(3) == 1 and all(step * t.itemsize % 16 == 0 for step in steps)

    return [t for t in tensors if not is_aligned(t)]


def _shaped_attention_fwd_cuda(q: Tensor, k: Tensor, v: Tensor, *_args) -> int:
    memory = _Memory(q)
    memory.copy(*_unaligned(q, k, v))
    return memory.peak


def _shaped_attention_bwd_cuda(grad, q, k, v, _gains, _lse, _lengths, _scale, _causal, dq, dk, dv) -> int:
    memory = _Memory(q)
    memory.take(q.shape[0] * 3 * q.shape[2], _FLOAT)  # the gains' gradients of each sequence
    memory.copy(*_unaligned(q, k, v, grad, dq, dk, dv))
    return memory.peak


def _loose(*tensors: Tensor) -> list[Tensor]:
    return [t for t in tensors if t.stride(-1) != 1]


def _parallel_mlp_fwd(h: Tensor, weight: Tensor, bias: Tensor | None, _act: str, out: Tensor, _accumulate: bool) -> int:
    if not out.numel():
        return 0
    memory = _Memory(h)
    memory.copy(*_loose(weight), *_strided(bias))
    return memory.peak


def _parallel_mlp_bwd(grad: Tensor, h: Tensor, weight: Tensor, _act: str, need_weight: bool) -> int:
    (tokens, hidden), width = h.shape, weight.shape[0]
    memory = _Memory(h)
    memory.copy(*_loose(grad, weight))
    if not (need_weight and tokens):
        return memory.peak
    architecture, processors = _device(h)
    tile = tuning.lookup("parallel_mlp_weight", 1, launch.precision_of(h.dtype), architecture)
    blocks = _parts(width, tile.block_m) * _parts(hidden, tile.block_n)
    ranges, _ = launch.splits(blocks, _parts(tokens, _TILE * tile.block_k), processors * tile.blocks)
    if ranges == 1:
        return memory.peak
    memory.take(ranges * width * hidden, _FLOAT)
    result = memory.take(width * hidden, _FLOAT)
    if weight.itemsize != _FLOAT:
        result = memory.take(width * hidden, weight.itemsize)
    return memory.beside(result)


def _statistics(memory: _Memory, call: Call, plan: list[Launch], chunk: int) -> tuple[int, int]:
    """Goes through similarity_loss.statistics; the bytes of rows and columns."""
    n, m, image = call.image.shape[0], call.text.shape[0], call.image
    rows, columns = memory.take(len(RowStat) * n, _FLOAT), memory.take(len(ColumnStat) * m, _FLOAT)
    architecture, processors = _device(image)
    row_parts = column_parts = 0
    for step in plan:
        tile = tuning.lookup("similarity_forward", step.statistics_tiles, launch.precision_of(image.dtype), architecture)
        slots = step.slots()
        blocks = _parts(n, tile.block_m)
        if step.COLUMNS:
            blocks = min(blocks, max(1, chunk * image.itemsize // (_FLOAT * slots["COLUMN_SLOTS"])))
        for first in range(0, n, blocks * tile.block_m):
            count = min(n - first, blocks * tile.block_m)
            row_blocks = _parts(count, tile.block_m)
            ranges, _ = launch.splits(row_blocks, _parts(m, tile.block_n), processors * tile.blocks)
            row_parts = memory.replace(row_parts, ranges * slots["ROW_SLOTS"] * count, _FLOAT)
            column_parts = memory.replace(column_parts, row_blocks * slots["COLUMN_SLOTS"] * m * step.COLUMNS, _FLOAT)
    memory.give(row_parts, column_parts)
    return rows, columns


def _similarity_loss_fwd(*args) -> int:
    *shared, chunk, stored_rows = args
    call = Call(*shared)
    memory = _Memory(call.image)
    rows, columns = _statistics(memory, call, launches(call), chunk)
    planes = call.similarity + call.teacher + call.interactive * (1 + call.columns)
    stored = memory.take(planes * stored_rows * call.text.shape[0], call.image.itemsize)
    return memory.beside(rows, columns, stored)


def _gradient_scratch(memory: _Memory, call: Call, plan: list[Launch], chunk: int) -> None:
    rows, m = min(call.image.shape[0], chunk), call.text.shape[0]
    architecture, precision = _device(call.image)[0], launch.precision_of(call.image.dtype)
    tiles = [tuning.lookup("similarity_backward", step.gradient_tiles, precision, architecture) for step in plan]
    memory.take(max(step.students for step in plan) * rows * _parts(m, 8) * 8, call.image.itemsize)
    memory.take(max(_parts(rows, tile.block_m) * _parts(m, tile.block_n) for tile in tiles) * _SCALARS, _FLOAT)


def _similarity_rows(query: Tensor, keys: Tensor, scale, ids, key_ids, offset: int, attend: bool, chunk: int) -> int:
    call = Call(
        query, keys, scale, None, keys, None, None, None, scale, None, None, ids, key_ids, offset,
        softmax=False, columns=False, negatives=0, relational=False, interactive=True, entropy=0.0,
    )  # fmt: skip
    plan = [Launch(U=True, IDS=ids is not None)]
    n, d = query.shape
    memory = _Memory(query)
    _statistics(memory, call, plan, chunk)
    mean_keys = memory.take(n * d * attend, query.itemsize)
    if attend:
        _gradient_scratch(memory, call, plan, chunk)
        memory.take(len(RowStat) * n, _FLOAT)  # gradients to the statistics
    stats = memory.take(2 * n, _FLOAT)
    return memory.beside(mean_keys, stats)


class _Gradient:
    """Goes through similarity_gradients: the sum of products that make up a feature's gradient."""

    def __init__(self, memory: _Memory, like: Tensor, products: int, exact: bool, needed: bool = True):
        self.memory, self.like, self.needed, self.sum = memory, like, needed, 0
        self.rounded = products == 1 and exact  # one product in the features' dtype, with no factor to undo
        self.out = 0

    def allocate(self) -> None:
        """Of an image's gradient, that is; a text's is what its products come to."""
        self.out = self.memory.take(self.like.numel() * self.needed, self.like.itemsize)

    def add(self, rows: int, *, in_place: bool = False) -> None:
        """A product of so many rows; in_place: it is added as it is formed."""
        if not self.needed:
            return
        elements = rows * self.like.shape[1]
        if not self.sum:
            self.sum = self.memory.take(elements, self.like.itemsize if self.rounded else _FLOAT)
        elif not in_place:
            self.memory.give(self.memory.take(elements, _FLOAT))

    def flush(self) -> None:
        self.memory.give(self.sum)
        self.sum = 0

    def result(self) -> int:
        """The bytes of a text's gradient in the features' dtype."""
        if self.sum and (self.rounded or self.like.itemsize == _FLOAT):
            return self.sum
        return self.memory.take(self.like.numel() * self.needed, self.like.itemsize)


def _similarity_loss_bwd(_grad_rows: Tensor, _grad_columns: Tensor, *args) -> int:
    *shared, _rows, _columns, _stored = args[:16]
    *mode, need_image, need_text, chunk = args[16:]
    call = Call(*shared, *mode)
    image, text, weight = call.image, call.text, call.plane_weight
    n, m, d = image.shape[0], text.shape[0], image.shape[1]
    plan, memory = launches(call), _Memory(image)
    exact, wide = image.dtype != torch.float16, image.itemsize == _FLOAT
    chunks = _parts(n, chunk)

    def gradient(like: Tensor, names: str, times: int, needed: bool = True) -> _Gradient:
        products = times * sum(bool(getattr(step, name)) for step in plan for name in names)
        return _Gradient(memory, like, products, exact, needed)

    own_image, own_text = call.projected_image is None, call.projected_text is None
    d_image = gradient(image, "ZLU" if own_image else "ZL", 1, need_image)
    d_text = gradient(text, "ZLV" if own_text else "ZL", chunks, need_text)
    d_projected_image = d_image if own_image else gradient(call.projected_image, "U", 1)
    d_projected_text = d_text if own_text else gradient(call.projected_text, "V", chunks)
    images = [d_image] if own_image else [d_image, d_projected_image]
    for each in images:
        each.allocate()
    results = [each.out for each in images]
    d_weight = 0 if weight is None else memory.take(weight.numel(), _FLOAT)
    if call.hadamard:  # the weighted image, and that before it is rounded
        product = memory.take(n * d, _FLOAT)
        if not wide:
            memory.replace(product, n * d, _HALF)
    _gradient_scratch(memory, call, plan, chunk)

    def add_rows(to: _Gradient, count: int) -> None:
        if not to.rounded:  # else it is written where it belongs
            to.add(count)

    plane_product = 0
    for first in range(0, n, chunk):
        count = min(chunk, n - first)
        for step in plan:
            if step.Z:
                add_rows(d_image, count)
                d_text.add(m, in_place=wide)
            if step.L:
                plane_product = memory.replace(plane_product, count * d, _FLOAT)
                # Its product with the image, and the sum of that.
                memory.give(memory.take(count * d, _FLOAT), memory.take(d, _FLOAT))
                d_text.add(m, in_place=wide)
            if step.U:
                add_rows(d_projected_image, count)
            if step.V:
                d_projected_text.add(m, in_place=wide)
        for each in images:
            each.flush()

    scalars = [memory.take(1, _FLOAT) for _ in range(_SCALARS)]
    results += [d_text.result(), *([] if own_text else [d_projected_text.result()])]
    used = 4 if weight is not None and not call.hadamard else 3  # d_scale, d_cross_scale, d_plane_bias
    return memory.beside(*results, *scalars[:used], d_weight * call.hadamard)


TRITON = {
    "similarity_loss_fwd": _similarity_loss_fwd,
    "similarity_loss_bwd": _similarity_loss_bwd,
    "similarity_rows": _similarity_rows,
    "feature_loss_fwd": _feature_loss_fwd,
    "feature_loss_bwd": _nothing,
    "shaped_attention_fwd": _shaped_attention_fwd,
    "shaped_attention_bwd": _shaped_attention_bwd,
    "parallel_mlp_fwd": _parallel_mlp_fwd,
    "parallel_mlp_bwd": _parallel_mlp_bwd,
}
CUDA = {"shaped_attention_fwd": _shaped_attention_fwd_cuda, "shaped_attention_bwd": _shaped_attention_bwd_cuda}
