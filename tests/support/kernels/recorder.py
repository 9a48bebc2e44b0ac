"""Records what calls start on a card that need not be there: Triton's launches, kernels of the CUDA
extension, ops of torch, and waits of the host for a value. Tensors are on the device "meta", which
stands for the card: no kernel runs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from simplclip.kernels import runtime
from simplclip.ops import backends, registry
from simplclip.ops.attention import op as attention
from simplclip.plan.cards import CARDS, Card
from simplclip.plan.meter import NO_KERNEL


class Started(NamedTuple):
    by: str  # "torch", "triton", "cuda", or "host" for a wait
    name: str
    arguments: dict[str, Any]  # of Triton's kernels, by name, with shape and dtype of tensors


class Recorder(TorchDispatchMode):
    """A mode that records in `started`."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[Started] = []

    def add(self, by: str, name: str, arguments: dict[str, Any] | None = None) -> None:
        self.started.append(Started(by, name, arguments or {}))

    def launch(self, kernel: Any, *args: Any, grid: tuple, warmup: bool, **options: Any) -> None:
        """In place of Triton's JITFunction.run."""
        named = dict(zip(kernel.arg_names, args)) | options
        described = lambda t: SimpleNamespace(shape=t.shape, dtype=t.dtype)  # noqa: E731
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        self.add("triton", name, tree_map_only(Tensor, described, named))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        in_python = torch._C.DispatchKey.CompositeExplicitAutograd
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        if func.namespace == "simplclip":
            if has_kernel(func.name(), in_python.name):
                with self:
                    return func._op_dk(in_python, *args, **kwargs)
            self.add(name.rpartition("_")[2], name.rpartition("_")[0])
            return result_of_attention(name, *args)
        elif func.namespace != "prim" and not has_kernel(func.name(), "CUDA"):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is torch.ops.aten._local_scalar_dense.default:
            self.add("host", name)
            return 0
        # torch 2.11 has no function on meta of addmm with a dtype
        out = kwargs["out"] if "out" in kwargs else func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        starts = func.namespace == "aten" and not func.is_view and not name.startswith(NO_KERNEL)
        if "copy" in name and len(devices) > 1:
            self.add("host", name)
        elif starts and "meta" in devices and any(t.numel() for t in tensors):
            self.add("torch", name)
        return out


def result_of_attention(name: str, q: Tensor, k: Tensor, v: Tensor, gains: Tensor, *_: Any) -> Any:
    """Returns memory for what CUDA C++ would return."""
    batch, length, heads, _ = q.shape
    if name == "shaped_attention_fwd_cuda":
        return q.new_empty(q.shape), gains.new_empty(batch, heads, length)
    return gains.new_empty(batch, *gains.shape)


def served_as(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device.type == "meta" else device


@contextlib.contextmanager
def on_card(card: Card) -> Iterator[Recorder]:
    """Context in which the device "meta" seems to be `card`, and calls are recorded."""
    from triton.runtime import JITFunction

    recorder = Recorder()
    select, why_not = backends.select, backends.why_not_kernels

    def launch(kernel: Any, *args: Any, **options: Any) -> None:
        recorder.launch(kernel, *args, **options)

    def select_for_card(op: str, device: torch.device, *of_call: Any, **options: Any) -> Any:
        return select(op, served_as(device), *of_call, **options)

    def why_not_on_card(serves: str, device: torch.device, dtype: torch.dtype) -> str | None:
        return why_not(serves, served_as(device), dtype)

    major, minor = divmod(card.architecture, 10)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
        L2_cache_size=card.l2 << 20,
    )
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(backends, "select", select_for_card),
        mock.patch.object(attention, "select", select_for_card),
        mock.patch.object(backends, "why_not_kernels", why_not_on_card),
        mock.patch.object(JITFunction, "run", launch),
        recorder,
    ):
        runtime._card.cache_clear()
        registry.forget_calls()
        yield recorder
    runtime._card.cache_clear()
    registry.forget_calls()


def trace(
    run: Callable[[dict[str, Any]], object], tensors: dict[str, Any], card: str = "rtx-3090"
) -> list[Started]:
    """Runs `run` with tensors like `tensors` on a card; returns what it started."""
    given = tree_map_only(Tensor, lambda t: t.detach().to("meta"), tensors)
    with on_card(CARDS[card]) as recorder:
        run(given)
    return recorder.started


def names(started: list[Started], *kinds: str) -> Counter[str]:
    """Counts what was started of some kinds, by name."""
    return Counter(each.name for each in started if each.by in kinds)
