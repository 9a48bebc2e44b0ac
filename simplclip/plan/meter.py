"""Counts live bytes and work of a forward pass on fake tensors of a device that may be absent."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from simplclip.plan.cards import Work

aten = torch.ops.aten
WIDE_GROUP = 64  # channels
ROUNDED_TO = 512  # bytes, by torch's allocator
NO_KERNEL = ("empty", "new_empty", "_unsafe_view")


class Pass(NamedTuple):
    """A forward pass. Sizes are bytes beside what lived before."""

    kept: float  # when it ends, for backward
    peak: float  # while it or the beginning of its backward runs
    works: list[Work]


class Meter(TorchDispatchMode):
    """A mode that counts storages which ops return until they are freed, and the ops' work.

    Bytes: live, peak, and margin, the most that a result takes or that a checkpoint drops. Values
    of tensors are read as 1.
    """

    def __init__(self, device: torch.device) -> None:
        """Counts nothing yet."""
        super().__init__()
        self.device = device
        self.live = self.peak = self.margin = 0
        self.works: list[Work] = []
        self._seen: set[int] = set()
        self._inputs: list[Any] = []  # of checkpoints, which keep them
        self._again = False

    def count(self, run: Callable[[], Any]) -> Pass:
        """Counts a forward pass, and what the beginning of its backward adds."""
        self.works, self._inputs, self.margin = [], [], 0
        before = self.peak = self.live
        with self:
            results = run()
        live = self.live
        del results
        # the gradient of the largest result, or a checkpointed part that runs again
        peak = max(self.peak, live + self.margin)
        return Pass(live - before, peak - before, self.works)

    def hold(self, tensors: Any) -> None:
        """Counts the storages of a nest of tensors from now until they are freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or tensor.device != self.device:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._seen:
                size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
                self._seen.add(storage._cdata)
                self.live += size
                self.peak, self.margin = max(self.peak, self.live), max(self.margin, size)
                weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def checkpoint(self, function: Callable, *args: Any, **options: Any) -> Any:
        """In place of torch's: returns function(*args) without its graph; keeps `args` alone."""
        options.pop("use_reentrant", None)
        before, self._again = self.live, True
        out = function(*args, **options)
        self._again = False
        self.margin = max(self.margin, self.live - before)
        self._inputs.append(args)
        return out.detach().requires_grad_(out.requires_grad)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 1.0
        out = func(*args, **kwargs)
        convolves = func is aten.convolution.default
        nhwc = convolves and args[0].dim() == 4 and args[0].stride(1) == 1
        if nhwc:  # without a device torch picks a library that would not keep this layout
            out = out.contiguous(memory_format=torch.channels_last)
        self.hold(out)
        name = func.name().partition("::")[2]
        if func.is_view or func.namespace == "prim" or name.startswith(NO_KERNEL):
            return out
        tensors = {t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        moved = sum(tensor.nbytes for tensor in tensors)
        half = any(tensor.itemsize == 2 for tensor in tensors)
        runs = 1 + self._again if any(tensor.requires_grad for tensor in tensors) else 0
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else _own_flops(name, args)
        kind = "norm" if "norm" in name or func.namespace == "simplclip" else "bytes"
        if convolves:
            kind = _kind_of_convolution(args[1].shape[1], args[8], runs, nhwc)
        elif flops:
            kind = "attention" if "attention" in name else "product"
        slow = convolves and not nhwc and kind != "grouped nchw"
        self.works.append(Work(kind, flops, moved, half, runs, slow))
        if name == "simplified_block_fwd":  # a norm, and an activation of hidden features
            hidden = args[0].nbytes // args[0].shape[-1] * len(args[4])
            self.works.append(Work("norm", 0, moved + 2 * hidden, half, runs))
        return out


def _kind_of_convolution(channels: int, groups: int, runs: int, nhwc: bool) -> str:
    """Returns the kind of a convolution; channels: of a group."""
    # forward of wide groups is about as fast as that of one group
    if groups == 1 or (not runs and channels >= WIDE_GROUP):
        return "convolution"
    if channels == 1:
        return "depthwise"
    return "grouped" if nhwc else "grouped nchw"


def _own_flops(name: str, args: tuple) -> int:
    """Returns the flops of the matrix products of an op of this library; 0 of any other op."""
    if not name.startswith(("similarity", "simplified_block_fwd")):
        return 0
    x = args[0]
    rows = x.numel() // x.shape[-1]
    matrices = [t for t in args[1:] if isinstance(t, Tensor) and t.dim() == 2]
    if x.dim() == 2:  # images [N, D]; texts [M, D], perhaps those of a teacher after its images
        return 2 * rows * sum(t.numel() for t in matrices[::2])
    # x [B, L, C] with weights, and attention
    return 2 * rows * sum(t.numel() for t in matrices) + 4 * x.numel() * x.shape[1]


@contextlib.contextmanager
def fake_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[Meter]:
    """Context of a pass on a device; yields the meter, which is not entered yet.

    New tensors are fake, and functions of torch are replaced, until the end; the modules' tensors
    become fake ones on the device, which the meter holds, and stay so.
    """
    meter = Meter(device)
    patches: list[tuple[Any, str, Any]] = [(FakeTensor, "tolist", lambda t: [0] * t.numel())]
    for module in list(sys.modules.values()):
        if vars(module).get("checkpoint") is checkpoint:
            patches.append((module, "checkpoint", meter.checkpoint))
    if device.type == "cuda":
        patches += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", attention_of_card),
        ]
    # of tensors on the meta device too
    mode = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
    for part in {inner for outer in modules for inner in outer.modules()}:
        part._apply(lambda t: FakeTensor(mode, t.to("meta"), device), recurse=False)
        meter.hold([*part.parameters(recurse=False), *part.buffers(recurse=False)])
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # optimizers compile
        stack.enter_context(mode)
        yield meter


def attention_of_card(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """In place of F.scaled_dot_product_attention: FlashAttention, or else the efficient kernel.

    Without a device torch would compute plain products, which keep the attention weights.
    query: [B, H, L, K].
    """
    if attn_mask is None and query.itemsize == 2 and query.shape[-1] % 8 == 0:
        return aten._scaled_dot_product_flash_attention(query, key, value)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], -1)
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, torch.is_grad_enabled())[0]
