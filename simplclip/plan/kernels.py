"""The kernels that an op of torch starts on a card, with their multiply-adds and bytes, from shapes
and strides alone.

The work of a kernel has two kinds, for which time.py has rates: of its multiply-adds (`rate`) and
of its bytes (`traffic`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from simplclip.kernels.similarity.plan import PARTS


@dataclass
class Stand:
    """A stand-in for a tensor with all that Triton and the predictions read of it.

    It does not keep the tensor alive.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    strides: Sequence[int]
    storage: int
    allocated: int = 0  # bytes of the storage
    offset: int = 0  # bytes before the first element

    @classmethod
    def of(cls, tensor: Tensor, storage: int) -> Stand:
        """Returns the stand-in for a tensor. storage: the number of the tensor's storage."""
        offset = int(tensor.storage_offset()) * tensor.itemsize
        size = tensor.untyped_storage().nbytes()
        return cls(tensor.dtype, tensor.shape, tensor.stride(), storage, size, offset)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes that are accessed; an expanded dimension is read once."""
        sizes = [n for n, step in zip(self.shape, self.strides) if step or not n]
        return math.prod(sizes) * self.itemsize

    @property
    def order(self) -> list[int]:
        """The dimensions with more than one element, by their strides, the smallest first."""
        dims = [i for i, n in enumerate(self.shape) if n > 1]
        return sorted(dims, key=lambda i: self.strides[i])

    @property
    def channels_last(self) -> bool:
        """Whether an image [N, C, H, W] has its channels next to each other."""
        return math.prod(self.shape[2:]) == 1 or self.strides[1] == 1 < self.shape[1]

    def stride(self) -> Sequence[int]:
        """Returns the strides, like torch.Tensor.stride."""
        return self.strides

    def dim(self) -> int:
        """Returns the number of dimensions."""
        return len(self.shape)

    def data_ptr(self) -> int:
        """Returns the offset in bytes in the storage, of which Triton reads the alignment."""
        return self.offset

    def ptr_range(self) -> int:
        """Returns 0; Triton asks each tensor for it."""
        return 0


@dataclass
class Kernel:
    """One kernel, or a wait of the host for a value."""

    by: str  # "torch", "triton", "cuda" or "host"
    name: str
    dtype: torch.dtype | None = None
    rate: str = "product"
    multiply_adds: int = 0
    traffic: str = "elementwise"
    bytes: int = 0  # what it reads, each tensor once, and what it writes
    launch: Launch | ExtensionCall | None = None  # of kernels of this library
    times: int = 1


class JITFunction(Protocol):
    """A Triton kernel."""

    __name__: str
    arg_names: list[str]


@dataclass
class Launch:
    """A kernel that a launcher of Triton started, and its arguments."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ExtensionCall:
    """A call of a C++ or CUDA function: its op, and its fields with a Stand for each tensor."""

    op: str
    call: SimpleNamespace


def _words(*lines: str) -> tuple[str, ...]:
    """Returns the words of the lines."""
    return tuple(" ".join(lines).split())


PRODUCTS = _words("linear mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv dot vdot")
# By the beginnings of names, as are MOVES and REDUCTIONS.
NO_KERNEL = _words(
    "empty new_empty resize_ set_ as_strided_ record_stream prim",
    "_unsafe_view _reshape_alias lift_fresh",
)
COPIES = ("clone", "copy_", "_to_copy", "contiguous")
# They write some elements from others.
MOVES = _words(
    "cat stack roll repeat flip constant_pad_nd reflection_pad pixel_ im2col col2im upsample",
    "index _index _unsafe_index gather embedding scatter unbind_copy split_with_sizes_copy",
    "slice_scatter select_scatter as_strided_scatter",
)
REDUCTIONS = _words("sum mean var std amax amin argmax linalg_vector_norm _foreach_norm")
NORMS = ("batch_norm", "layer_norm", "group_norm")


def started_by(op: OpOverload) -> tuple[str, bool]:
    """Returns the name of an op's overload and whether it starts kernels; views start none.

    The name is without "aten::" and the overload: "add" for aten::add.Tensor.
    """
    name = op.name().removeprefix("aten::").split(".")[0]
    changed = [a.alias_info for a in op._schema.arguments if a.alias_info is not None]
    view = bool(changed) and not any(a.is_write for a in changed)
    return name, not view and not name.startswith(NO_KERNEL)


def kernels_of(
    name: str, args: Sequence[Any], options: dict[str, Any], results: list[Stand]
) -> list[Kernel]:
    """Returns the kernels that torch's op `name` (without "aten::") starts, in their order.

    args, options: its positional and keyword arguments, with Stands for tensors. results: the
    Stands of its results; of an op that only changes lists of tensors, those of the first argument.
    """
    if name in ("convolution", "convolution_backward"):
        return _convolutions(name, args, results)
    inputs = [t for t in tree_leaves((args, options)) if isinstance(t, Stand)]
    if name in PRODUCTS:
        return [_product(name, inputs, results[0])]
    if name.startswith("_") and "attention" in name:
        return [_attention(name, inputs, results)]
    backward = " backward" if "backward" in name else ""
    large = max((*inputs, *results), key=lambda t: t.elements)
    large_inputs = [t for t in inputs if t.elements == large.elements]
    read = _distinct_bytes(inputs)
    written = _distinct_bytes(results)
    times = 1
    traffic = "elementwise"
    if any(norm in name for norm in NORMS):
        traffic = "norm" + backward
        in_training = name.endswith("batch_norm") and args[5]
        # a pass for the statistics, or for their gradients
        if backward or "group" in name or in_training:
            read += _distinct_bytes(large_inputs)
    elif "softmax" in name:
        traffic = "norm"
    elif "pool" in name:
        traffic = "pool" + backward
    elif name in ("slice_backward", "select_backward"):  # zeros and a copy
        return [Kernel("torch", name, large.dtype, bytes=b) for b in (written, 2 * read)]
    elif name in ("fill_", "zero_"):
        read = 0
    elif name in COPIES and inputs:
        source = inputs[-1]
        (target, *_) = results or inputs
        read = source.bytes
        if source.order[:1] != target.order[:1]:
            traffic = "transposed"
    elif name.startswith(MOVES):
        traffic = "moves"
        if name == "unbind_copy":
            times = 2
        if not name.startswith(("cat", "stack")):
            read = min(read, 2 * written)  # of a table only the rows that are taken
    elif name in ("max", "min", "all", "any") or name.startswith(REDUCTIONS):
        traffic = "reduction"
    elif len({tuple(t.order) for t in large_inputs}) > 1:
        traffic = "transposed"
    return [Kernel("torch", name, large.dtype, traffic=traffic, bytes=read + written, times=times)]


def _distinct_bytes(tensors: list[Stand]) -> int:
    """Returns the bytes of the tensors; of those that share a storage the largest one counts."""
    sizes: dict[int, int] = {}
    for t in tensors:
        sizes[t.storage] = max(sizes.get(t.storage, 0), t.bytes)
    return sum(sizes.values())


def _rounded_to_8(n: int) -> int:
    """Returns n rounded up to a multiple of 8: tensor cores multiply no fewer channels."""
    return n + -n % 8


def _product(name: str, inputs: list[Stand], out: Stand) -> Kernel:
    """Returns the kernel of an op in PRODUCTS. inputs: its tensor arguments in their order."""
    touched = 0
    left, right = inputs[:2]  # mm.out has `out` last, linear its bias
    if name.startswith(("add", "badd")):  # these ops add their first input
        addend, left, right = inputs[:3]
        if addend.elements >= out.elements:
            touched = addend.bytes
    touched += _distinct_bytes([left, right, out])
    work = out.elements // max(1, math.prod(out.shape[-2:]))
    for n in (*out.shape[-2:], left.shape[-1]):
        work *= _rounded_to_8(n) if left.dim() > 1 else n
    return Kernel("torch", name, left.dtype, "product", work, "product", touched)


def _attention(name: str, inputs: list[Stand], results: list[Stand]) -> Kernel:
    """Returns the kernel of one of torch's fused attention ops, forward or backward."""
    rate = "attention"
    products = 2
    q, k = inputs[:2]
    if "backward" in name:
        rate = "attention backward"
        products = 5
        q, k = inputs[1:3]  # after the gradient
    work = 0
    # packed sequences [T, H, K] have lengths in values, so that no work is counted
    if q.dim() == 4:
        tokens = 2 if name.startswith("_scaled") else 1  # [B, H, L, K] or [B, L, H, K]
        work = products * q.elements * k.shape[tokens]
    touched = _distinct_bytes(inputs) + _distinct_bytes(results)
    return Kernel("torch", name, q.dtype, rate, work, "product", touched)


def _convolutions(name: str, args: Sequence[Any], results: list[Stand]) -> list[Kernel]:
    """Returns the kernels of "convolution" or "convolution_backward"; args: the op's arguments."""
    if name == "convolution":
        x, weight, bias, _, _, _, transposed, _, groups = args
        y = results[0]
        kernels = [_convolution(name, x, weight, y, transposed, groups, "")]
        if bias is not None:  # cuDNN adds it after the convolution
            kernels.append(Kernel("torch", "bias", y.dtype, bytes=2 * y.bytes))
        return kernels
    gradient, x, weight, _, _, _, _, transposed, _, groups, output_mask = args
    kernels = [
        _convolution(name, x, weight, gradient, transposed, groups, " backward")
        for _ in range(sum(output_mask[:2]))
    ]
    if output_mask[2]:  # the gradient of the bias
        kernels.append(
            Kernel("torch", name, gradient.dtype, traffic="reduction", bytes=gradient.bytes)
        )
    return kernels


def _convolution(
    name: str, x: Stand, weight: Stand, y: Stand, transposed: bool, groups: int, direction: str
) -> Kernel:
    """Returns one of a convolution's kernels; backward, `y` is the result's gradient."""
    taps = math.prod(weight.shape[2:])
    if transposed:
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        positions = x.elements // x.shape[1]
    else:
        inputs, outputs = weight.shape[1], weight.shape[0] // groups
        positions = y.elements // y.shape[1]
    layout = "" if x.channels_last else " nchw"
    kind = _convolution_kind(groups, inputs, taps)
    work = positions * groups * taps * inputs * outputs
    if kind not in ("stem", "depthwise"):
        work = positions * groups * taps * _rounded_to_8(inputs) * _rounded_to_8(outputs)
    rate = kind
    if kind != "stem":
        rate += direction + layout
    traffic = kind if kind in ("depthwise", "grouped") else "convolution"
    traffic += direction + layout
    return Kernel("torch", name, x.dtype, rate, work, traffic, _distinct_bytes([x, weight, y]))


def _convolution_kind(groups: int, inputs: int, taps: int) -> str:
    """Returns the kind of products, by the input channels of a group and the filter's positions."""
    if groups > 1:
        return "depthwise" if inputs == 1 else "grouped"
    if inputs <= 4:
        return "stem"
    return "pointwise" if taps == 1 else "dense"


CUDA_PRODUCTS = {"shaped_attention_fwd": 2, "shaped_attention_bwd": 5}  # of [L, L, K] for each head


def extension_work(started: ExtensionCall) -> tuple[str, int, str]:
    """Returns rate, multiply-adds (of attention alone) and traffic of a C++ or CUDA function."""
    if started.op not in CUDA_PRODUCTS:
        return "own", 0, "own"
    batch, length, heads, width = started.call.q.shape
    work = CUDA_PRODUCTS[started.op] * batch * heads * length**2 * width
    rate = f"own attention {'backward' if started.op.endswith('bwd') else 'forward'}"
    return rate, work, "own"


# Forms of a kernel of similarities, by the part of the call; of several the first counts.
_FORMS = {"teacher": ", teacher", "plane": ", pair matching", "ids": ", ids"}


def _form(arguments: dict[str, Any]) -> str:
    """Returns the form of a kernel of similarities, as in the kinds of rates; mostly ""."""
    if arguments.get("TERMS", 1) > 1:
        return ", two terms"
    given = (form for part, form in _FORMS.items() if arguments.get(PARTS[part]) is not None)
    return next(given, "")


def launch_work(name: str, launch: Launch) -> tuple[str, int, str, int]:
    """Returns rate, multiply-adds, traffic and bytes of a Triton kernel of the library.

    Multiply-adds are 0 where bytes bound it. name: as in `Kernel`.
    """
    arguments = {**dict(zip(launch.kernel.arg_names, launch.args)), **launch.options}
    tensors = [t for t in tree_leaves(list(arguments.values())) if isinstance(t, Stand)]
    moved = sum(t.bytes for t in tensors)
    if name == "parallel_mlp_hidden":
        work = arguments["grad"].elements * arguments["h"].shape[1]
        return "own mlp hidden", work, "own", moved
    if "TILE" not in arguments:
        return "own", 0, "own", moved
    # A kernel of similarities: forward takes some rows of the matrix, backward a block of it, which
    # it may write.
    if "row_count" in arguments:
        rows, columns = arguments["row_count"], arguments["m"]
    else:
        rows = arguments["row_blocks"] * arguments["TILE"].BLOCK_M
        columns = arguments["column_blocks"] * arguments["TILE"].BLOCK_N
    width = arguments["width"] + arguments.get("teacher_width", 0)
    itemsize = arguments["image"].itemsize
    out = arguments.get("out")
    written = 0
    if out is not None and out.elements:
        written = itemsize * rows * columns
    rate = f"own {name.removeprefix('similarity_')}{_form(arguments)}"
    return rate, rows * columns * width, "own", itemsize * (rows + columns) * width + written
