"""Counts a forward pass on fake tensors of a card that need not be there: live bytes, and work."""

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

aten = torch.ops.aten
ROUNDED_TO = 512  # bytes, by torch's allocator
NO_KERNEL = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "detach", "lift_fresh")


class Work(NamedTuple):
    """What an op of a forward pass does."""

    kind: str  # a key of rates.RATES
    flops: float
    bytes: float  # that it reads and writes, each tensor once
    half: bool  # whether tensor cores multiply half types
    runs: int  # 0: without backward; 1: backward follows; 2: in backward it runs once more
    times: int = 1


class Meter(TorchDispatchMode):
    """A mode that counts the storages which ops return until they are freed, and the ops' work.

    Values of tensors are read as 1. live, peak: bytes. largest: of a single result.
    """

    def __init__(self, device: str) -> None:
        """Counts nothing yet; device: the type of the device, "cuda" or "cpu"."""
        super().__init__()
        self.device = device
        self.live = self.peak = self.largest = 0
        self.works: list[Work] = []
        self.checkpointed = 0  # bytes of the largest checkpointed part, which backward computes
        self._inputs: list[Any] = []  # of checkpointed parts, which they keep
        self._again = False
        self._autograd = True
        self._seen: set[int] = set()

    def start(self) -> int:
        """Begins a new pass, with autograd or without as it is now; returns the live bytes."""
        self._autograd = torch.is_grad_enabled()
        self.works, self._inputs = [], []
        self.checkpointed = self.largest = 0
        self.peak = self.live
        return self.live

    def hold(self, tensors: Any) -> None:
        """Counts the storages of a nest of tensors from now until they are freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._seen:
                size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
                self._seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                self.largest = max(self.largest, size)
                weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def checkpoint(self, function: Callable, *args: Any, **options: Any) -> Any:
        """In place of torch's: returns function(*args) without its graph; keeps `args` alone."""
        for name in ("use_reentrant", "preserve_rng_state", "determinism_check", "debug"):
            options.pop(name, None)
        before, self._again = self.live, True
        out = function(*args, **options)
        self._again = False
        self.checkpointed = max(self.checkpointed, self.live - before)
        self._inputs.append(args)
        return out.detach().requires_grad_(out.requires_grad)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 1.0
        out = func(*args, **kwargs)
        if func is aten.convolution.default and _channels_last(args[0]):
            # without a device torch picks a library that would not keep this layout
            out = out.contiguous(memory_format=torch.channels_last)
        self.hold(out)
        runs = 1 + self._again if self._autograd else 0
        self.works += _works(func, args, kwargs, out, runs)
        return out


def _channels_last(image: Tensor) -> bool:
    """Whether an image [N, C, H, W] has its channels next to each other."""
    return image.dim() == 4 and image.stride(1) == 1


def _works(func: OpOverload, args: tuple, kwargs: dict, out: Any, runs: int) -> list[Work]:
    """Returns the work of an op that has run; none if it starts no kernel on the card."""
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
    name = func.name().partition("::")[2]
    if func.is_view or func.namespace == "prim" or name.startswith(NO_KERNEL):
        return []
    tensors = {id(t): t for t in (*inputs, *results)}
    moved = sum(t.nbytes for t in tensors.values())
    half = any(t.itemsize == 2 for t in results)
    if not any(t.requires_grad for t in inputs):
        runs = 0
    if func.namespace == "simplclip":
        return [Work(*parts, half, runs) for parts in _own(name, args, moved)]
    formula = flop_registry.get(func._overloadpacket)
    flops = formula(*args, **kwargs, out_val=out) if formula else 0
    kind = "norm" if "norm" in name else "bytes"
    if func is aten.convolution.default:
        kind = _convolution_kind(args[0], args[1], args[8])
    elif flops:
        kind = "attention" if "attention" in name else "product"
    return [Work(kind, flops, moved, half, runs)]


def _convolution_kind(image: Tensor, weight: Tensor, groups: int) -> str:
    """Returns the kind of a convolution, by its groups and the layout of the image."""
    kind = "convolution"
    if groups > 1:
        kind = "depthwise" if weight.shape[1] == 1 else "grouped"
    return kind if _channels_last(image) else f"{kind} nchw"


def _own(name: str, args: tuple, moved: int) -> list[tuple[str, float, float]]:
    """Returns (kind, flops, bytes) of the kernels of an op of this library; moved: its bytes."""
    x = args[0]
    matrices = [t for t in args if isinstance(t, Tensor) and t.dim() == 2]
    if name == "simplified_block_fwd":  # x [B, L, C]; matrices: its weights
        tokens = x.numel() // x.shape[2]
        hidden = tokens * max(t.shape[0] for t in matrices) * x.itemsize
        return [
            ("norm", 0, 2 * x.nbytes),
            ("product", 2 * tokens * sum(t.numel() for t in matrices), moved + hidden),
            ("attention", 4 * x.numel() * x.shape[1], 4 * x.nbytes),
            ("bytes", 0, 2 * hidden),  # the activation
        ]
    if name == "parallel_mlp_fwd":  # x [T, C], and two weights
        _, fc1, fc2 = matrices
        hidden = len(x) * len(fc1) * x.itemsize
        flops = 2 * len(x) * (fc1.numel() + fc2.numel())
        return [("product", flops, moved), ("bytes", 0, 2 * hidden)]
    if name == "shaped_attention_fwd":  # q [B, L, H, K]
        return [("attention", 4 * x.numel() * x.shape[1], moved)]
    if name.startswith("similarity"):  # images [N, D], texts [M, D], perhaps those of a teacher
        flops = 2 * len(x) * len(args[1]) * sum(t.shape[1] for t in matrices[::2])
        return [("product", flops, moved)]
    return [("bytes", 0, moved)]


@contextlib.contextmanager
def fake_device(modules: Iterable[nn.Module], device: str) -> Iterator[Meter]:
    """Context of a forward pass on a device, "cuda" or "cpu"; yields the meter, not yet entered.

    The device need not be there: new tensors are fake, the modules' tensors are replaced by fake
    ones on the device, and functions of torch are replaced until the end.
    """
    mode, meter = FakeTensorMode(allow_fallback_kernels=False), Meter(device)
    patches: list[tuple[Any, str, Any]] = [
        (FakeTensor, "tolist", lambda t: [0.0] * t.numel()),
    ]
    if device == "cuda":
        attention = _attention_of_card(F.scaled_dot_product_attention)
        patches += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", attention),
        ]
    for module in list(sys.modules.values()):
        if vars(module).get("checkpoint") is checkpoint:
            patches.append((module, "checkpoint", meter.checkpoint))
    tables = [
        table
        for outer in modules
        for inner in outer.modules()
        for table in (inner._parameters, inner._buffers)
    ]
    former = [dict(table) for table in tables]
    fakes: dict[Tensor, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        # an optimizer may compile functions of its own
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mode)
        try:
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        if tensor not in fakes:
                            fakes[tensor] = _fake(tensor, device)
                        table[name] = fakes[tensor]
            yield meter
        finally:
            for table, before in zip(tables, former):
                table.update(before)


def _fake(tensor: Tensor, device: str) -> Tensor:
    """Returns a fake tensor on a device with the shape, dtype and strides of a tensor."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake


def _attention_of_card(plain: Callable) -> Callable:
    """Returns a function in place of F.scaled_dot_product_attention, `plain`, as on a card.

    Without a device torch would compute plain products, which keep the attention weights.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        inputs = (query, key, value)  # [B, H, L, K]
        if enable_gqa or query.dim() != 4:
            return plain(*inputs, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        width = query.shape[-1]
        flash = query.itemsize == 2 and width % 8 == 0 and width <= 256
        if flash and attn_mask is None:
            return aten._scaled_dot_product_flash_attention(
                *inputs, dropout_p, is_causal, False, scale=scale
            )[0]
        if attn_mask is not None:  # as an additive mask, in rows padded to multiples of 16 numbers
            length = attn_mask.shape[-1]
            padded = F.pad(attn_mask.to(query.dtype), (0, -length % 16))[..., :length]
            attn_mask = padded.expand(*query.shape[:3], length)
        has_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(*inputs, attn_mask, has_gradient, dropout_p, is_causal, scale=scale)[0]

    return attention
