"""Runs a step on fake tensors, which have shapes and no values, without the card: patches, and a
backward pass in Python.

Autograd's own engine asks a tensor's device for its streams, but there may be no device. `Engine`
replaces it: it runs the nodes in autograd's order, frees a node's saved tensors after the node has
run, and adds gradients in place where autograd does. So the same tensors are live at any time.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import Node, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from simplclip.kernels import runtime as launching
from simplclip.ops import backends, distributed, registry
from simplclip.plan.cards import CARDS, Card

aten = torch.ops.aten
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
# by node and output: the sum of the gradients that have arrived so far
Buffers = dict[Node, dict[int, Tensor]]


def faker(mode: FakeTensorMode, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns a function that makes a fake tensor on `device` of a tensor's shape and dtype.

    Strides stay too, and a parameter becomes a parameter. The function caches: the same tensor gets
    the same fake again.
    """

    @functools.cache
    def fake(tensor: Tensor) -> Tensor:
        """Returns the tensor's fake, without its values."""
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        like = FakeTensor(mode, meta, device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(like, tensor.requires_grad)
        return like

    return fake


@contextmanager
def fake_weights(modules: Iterable[nn.Module], fake: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context in which the modules have fake tensors in place of their parameters and buffers.

    fake: maps a tensor to its fake, as `faker` makes it. The modules are changed in place,
    submodules too; at the end they get their tensors back.
    """
    tables: list[dict[str, Any]] = []
    for outer in modules:
        for inner in outer.modules():
            tables += [inner._parameters, inner._buffers]
    former = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: fake(t) for name, t in table.items() if t is not None})
        yield
    finally:
        for table, before in zip(tables, former):
            table.update(before)


@contextmanager
def fake_step(
    mode: FakeTensorMode, device: torch.device, card: Card | None = None
) -> Iterator[None]:
    """Context in which new tensors are fake, values are read as 0, and a card seems to exist.

    mode: the fake mode, which is entered. card: which card a CUDA device seems to be; None: the
    device itself if it is there, else an RTX 3090. Functions of torch and of this library are
    replaced until the end, and the caches of device properties are cleared at the beginning and the
    end. Random generators have no state inside.
    """
    patches: list[tuple[Any, str, Any]] = [
        (FakeTensor, "tolist", lambda t: [0.0] * t.numel()),
        (torch, "get_rng_state", lambda: None),
        (torch, "set_rng_state", lambda state: None),
        (distributed.SameShapes, "check", lambda *_: None),
    ]
    if device.type == "cuda":
        patches += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", attention_of_card(F.scaled_dot_product_attention)),
            (torch.cuda, "device_of", lambda *_: nullcontext()),
            (torch._C, "_select_conv_backend", convolution_of_card(torch._C._select_conv_backend)),
        ]
        if OLD:
            patches.append((torch, "addmm", product_of_card(torch.addmm)))
        if card or not torch.cuda.is_available():
            patches += _properties(card or CARDS["rtx-3090"])
        _clear_device_caches()
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        # an optimizer may compile functions of its own
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mode)
        yield
    _clear_device_caches()


def _properties(card: Card) -> list[tuple[Any, str, Any]]:
    """Returns patches (object, attribute, replacement) by which CUDA devices seem to be `card`."""
    major, minor = divmod(card.architecture, 10)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=card.multiprocessors,
        total_memory=card.memory << 30,
        L2_cache_size=card.l2 << 20,
        name="fake",
    )
    return [
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (backends, "capability", lambda device: (major, minor)),
        (backends, "_has_binary", lambda index: card.triton),
    ]


def _clear_device_caches() -> None:
    """Clears the caches of launchers and backends, which hold properties of a device."""
    registry._selected.clear()
    for module in (launching, backends):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def product_of_card(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function in place of torch.addmm, `plain`, whose fake fails with `out_dtype`.

    That is in torch 2.11. With `out_dtype` the function returns `out` as it is.
    """

    def addmm(*args: Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return plain(*args, **options) if out_dtype is None else options["out"]

    return addmm


def convolution_of_card(plain: Callable) -> Callable:
    """Returns a function in place of torch's choice of a convolution's library, `plain`.

    It takes cuDNN for bfloat16 too. torch asks the device whether it may, and without a device
    takes a library that returns NCHW whatever the input's layout.
    """

    def in_half(tensor: Tensor) -> Tensor:
        return tensor.to(torch.float16) if tensor.dtype == torch.bfloat16 else tensor

    def select(*args: Any, **options: Any) -> Any:
        args, options = tree_map_only(Tensor, in_half, (args, options))
        return plain(*args, **options)

    return select


def attention_of_card(plain: Callable) -> Callable:
    """Returns a function in place of F.scaled_dot_product_attention, `plain`, as on a card.

    It takes FlashAttention for half types without a mask, else the memory-efficient kernel. Without
    a device torch would compute plain products, which keep the attention weights [B, H, L, L].
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
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return plain(*inputs, attn_mask, dropout_p, is_causal, **options)
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


class Engine:
    """An autograd engine in Python: within the context `installed()` it runs all backward passes,
    of graphs made there.

    on_gradient: called with a parameter's gradient whenever it has been accumulated.
    """

    def __init__(self, on_gradient: Callable[[Tensor], None]) -> None:
        """`installed` is what replaces torch's engine."""
        self._on_gradient = on_gradient
        self._unpacked: list[list[Tensor]] = []
        self._task = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context in which `torch.autograd.backward` and `Tensor.backward` run this engine.

        Graphs made inside save their tensors in a form that the engine frees; functions of torch
        are replaced until the end.
        """
        with (
            # A saved tensor is packed into a list, which is cleared after its node has run.
            saved_tensors_hooks(lambda tensor: [tensor], self._unpack),
            mock.patch.object(torch.autograd, "backward", self.backward),
            # Checkpointing and our ops ask for the id of the graph task, newer versions also if the
            # task keeps its graph.
            mock.patch.object(torch._C, "_current_graph_task_id", side_effect=lambda: self._task),
            mock.patch.object(
                torch._C._autograd,
                "_get_current_graph_task_keep_graph",
                return_value=False,
                create=True,
            ),
        ):
            yield

    def _unpack(self, saved: list[Tensor]) -> Tensor:
        """Returns the tensor in a list that autograd saved; notes the list, to clear it later."""
        if not saved:
            raise RuntimeError(
                "backward: expected a graph that has not run yet, got one whose saved tensors are "
                "freed"
            )
        self._unpacked.append(saved)
        return saved[0]

    @torch.no_grad()
    def backward(
        self,
        tensors: Tensor | Sequence[Tensor],
        grad_tensors: Tensor | Sequence[Tensor | None] | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: None = None,
        inputs: object = None,
    ) -> None:
        """In place of `torch.autograd.backward`, and so of `Tensor.backward`.

        Raises NotImplementedError for retain_graph, create_graph or inputs.
        """
        if retain_graph or create_graph or inputs is not None:
            raise NotImplementedError(
                "backward: expected no retain_graph, create_graph or inputs in a plan, got some"
            )
        self._task += 1
        buffers: Buffers = {}
        roots = [tensors] if isinstance(tensors, Tensor) else tensors
        if isinstance(grad_tensors, Tensor):
            grad_tensors = [grad_tensors]
        for root, gradient in zip(roots, grad_tensors or [None] * len(roots)):
            node, output = get_gradient_edge(root)[:2]
            if gradient is None:
                gradient = torch.ones_like(root)
            assert node is not None  # of a root
            _add(buffers.setdefault(node, {}), output, gradient)
        del tensors, grad_tensors, roots, root, gradient
        waiting = _edges_to(list(buffers))
        ready = [node for node in buffers if node not in waiting]
        while ready:
            # AccumulateGrad first, then the node made last
            node = max(ready, key=lambda node: node._sequence_nr())
            ready.remove(node)
            for following in self._run_node(node, buffers.pop(node, {}), buffers):
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)

    def _run_node(self, node: Node, buffer: dict[int, Tensor], buffers: Buffers) -> list[Node]:
        """Runs a node and passes its gradients on; returns the nodes at its edges, one per edge."""
        if hasattr(node, "variable"):
            if buffer:
                _accumulate(node.variable, buffer.pop(0))
                gradient = node.variable.grad
                if isinstance(node.variable, nn.Parameter) and gradient is not None:
                    self._on_gradient(gradient)
            return []
        edges = [(following, output) for following, output in node.next_functions if following]
        for (following, output), arrived in zip(edges, self._call(node, buffer)):
            if arrived is not None:
                meta = following._input_metadata[output]
                if list(arrived.shape) != list(meta.shape):  # meta.shape is a list
                    # over the dimensions that were broadcast
                    arrived = arrived.sum_to_size(meta.shape)
                _add(buffers.setdefault(following, {}), output, arrived.to(meta.dtype))
        return [following for following, _ in edges]

    def _call(self, node: Any, buffer: dict[int, Tensor]) -> list[Tensor | None]:
        """Runs a node and clears the tensors that it saved; returns a gradient for each edge."""
        if not buffer:
            return []
        # popped, so that they are freed as in autograd
        inputs = [buffer.pop(output, None) for output in range(len(node._input_metadata))]
        is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
        outputs = node.apply(*inputs) if is_python else node(*inputs)
        for saved in self._unpacked:
            saved.clear()
        self._unpacked = []
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        # A C++ node has an edge for each output; a Python node has none for inputs that are not
        # tensors.
        if is_python:
            has_edge = node.needs_input_grad
        else:
            has_edge = [edge[0] is not None for edge in node.next_functions]
        return list(itertools.compress(outputs, has_edge))


def _edges_to(roots: list[Node]) -> Counter[Node]:
    """Returns how many edges lead to each node that is reachable from `roots`."""
    uses: Counter[Node] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        following = [node for node, _ in stack.pop().next_functions if node is not None]
        uses.update(following)
        stack += set(following) - seen
        seen.update(following)
    return uses


def _add(buffer: dict[int, Tensor], output: int, gradient: Tensor) -> None:
    """Adds a gradient to the sum in `buffer`, {output of a node: sum}, for one of its outputs."""
    total = buffer.get(output)
    if total is None:
        buffer[output] = gradient
    elif _is_unshared(total, calls=1):  # as in autograd's input buffers
        total.add_(gradient)
    else:
        buffer[output] = total + gradient


def _is_unshared(tensor: Tensor, calls: int) -> bool:
    """Whether only a buffer refers to a tensor and its storage, so that it may be overwritten."""
    storage = tensor.untyped_storage()
    # Four references are the callers' and this call's; `calls` calls have passed the tensor on.
    # Calls that the interpreter does not inline keep one more reference to an argument, as after
    # torch.compile has set its evaluation of frames.
    probe = object()
    references = 4 + calls * (_references(probe) - sys.getrefcount(probe) - 1)
    referred = sys.getrefcount(tensor) > references
    shares = torch._C._storage_Use_Count(storage._cdata) > 2
    return not referred and not shares and tensor.nbytes == storage.nbytes()


def _references(value: object) -> int:
    """Returns the number of references to a value while a Python function has it as argument."""
    return sys.getrefcount(value)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Adds `gradient` to leaf.grad."""
    if leaf.grad is not None:
        leaf.grad.add_(gradient)
    elif _is_unshared(gradient, calls=2) and gradient.stride() == leaf.stride():
        leaf.grad = gradient.detach()
    else:
        leaf.grad = torch.empty_like(leaf, requires_grad=False).copy_(gradient)
