"""A backward pass in Python, since autograd's engine asks a tensor's device for its streams, and there may be no device.

It runs the nodes in the engine's order, frees a node's saved tensors after it has run, and adds gradients in place where the
engine does, so that the same tensors are live at any time.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

_KEEPS_GRAPH = "_get_current_graph_task_keep_graph"  # older versions of torch lack it
_LAST = 1 << 62  # the order of AccumulateGrad, which runs first


class Saved:
    """A tensor that autograd saves until its node has run."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class Engine:
    """`installed()` makes it the engine of all backward passes over graphs that are made within that context.

    on_gradient: called with a parameter's gradient whenever it has been accumulated.
    """

    def __init__(self, on_gradient: Callable[[Tensor], None]) -> None:
        self._on_gradient = on_gradient
        self._unpacked: list[Saved] = []
        self._task = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        def of_tensor(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
            self.backward([tensor], [gradient], retain_graph, create_graph, inputs)

        def of_autograd(tensors, grad_tensors=None, retain_graph=None, create_graph=False, grad_variables=None, inputs=None):
            tensors, gradients = ([x] if isinstance(x, Tensor) else x for x in (tensors, grad_tensors))
            self.backward(tensors, gradients or [None] * len(tensors), retain_graph, create_graph, inputs)

        def task() -> int:
            return self._task

        def keeps_graph() -> bool:
            return False

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Saved, self._unpack))
            stack.enter_context(mock.patch.object(Tensor, "backward", of_tensor))
            stack.enter_context(mock.patch.object(torch.autograd, "backward", of_autograd))
            # Checkpointing and our ops ask for the number of the task, and whether it keeps its graph.
            stack.enter_context(mock.patch.object(torch._C, "_current_graph_task_id", task))
            if hasattr(torch._C._autograd, _KEEPS_GRAPH):
                stack.enter_context(mock.patch.object(torch._C._autograd, _KEEPS_GRAPH, keeps_graph))
            yield

    def _unpack(self, saved: Saved) -> Tensor:
        if saved.tensor is None:
            raise RuntimeError("backward: expected a graph that has not run yet, got one whose saved tensors are freed")
        self._unpacked.append(saved)
        return saved.tensor

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None], retain=None, create=False, inputs=None):
        if retain or create or inputs is not None:
            raise NotImplementedError("backward: expected no retain_graph, create_graph or inputs in a plan, got some")
        self._task += 1
        with torch.no_grad():
            self._run(roots, gradients)

    def _run(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        waiting = _uses([root.grad_fn for root in roots if root.grad_fn is not None])
        buffers: dict[object, dict[int, Tensor]] = {}
        ready: list[tuple[int, int, object]] = []
        tie = itertools.count()

        def push(node: object) -> None:
            # The node that was made last runs first.
            order = _LAST if hasattr(node, "variable") else node._sequence_nr()
            heapq.heappush(ready, (-order, next(tie), node))

        for root, gradient in zip(roots, gradients):
            node = root.grad_fn
            gradient = torch.ones_like(root) if gradient is None else gradient
            if node is None:
                _accumulate(root, gradient)
                continue
            _add(buffers.setdefault(node, {}), root.output_nr, gradient)
        del root, gradient, gradients
        for node in list(buffers):
            if not waiting.get(node):
                push(node)
        del node
        while ready:
            _, _, node = heapq.heappop(ready)
            for following in self._visit(node, buffers.pop(node, {}), buffers):
                waiting[following] -= 1
                if not waiting[following]:
                    del waiting[following]
                    push(following)

    def _visit(self, node: object, buffer: dict[int, Tensor], buffers: dict[object, dict[int, Tensor]]) -> list[object]:
        """Runs a node and passes its gradients on; returns the nodes at its edges."""
        if hasattr(node, "variable"):
            if 0 in buffer:
                _accumulate(node.variable, buffer.pop(0))
                if isinstance(node.variable, nn.Parameter):
                    self._on_gradient(node.variable.grad)
            return []
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        for (following, place), gradient in zip(edges, self._call(node, buffer)):
            if gradient is not None:
                gradient = _fitted(gradient, following._input_metadata[place])
                _add(buffers.setdefault(following, {}), place, gradient)
        return [following for following, _ in edges]

    def _call(self, node: object, buffer: dict[int, Tensor]) -> list[Tensor | None]:
        """The gradients for a node's edges; frees its saved tensors."""
        count = len(node._input_metadata)
        if not buffer:
            return [None] * len(node.next_functions)
        inputs = [buffer.pop(place, None) for place in range(count)]
        self._unpacked = []
        python = isinstance(node, torch.autograd.function.BackwardCFunction)
        outputs = node.apply(*inputs) if python else node(*inputs)
        for saved in self._unpacked:
            saved.tensor = None
        self._unpacked = []
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        # A C++ node has an edge for each output; a Python node has none for inputs that are not tensors.
        wanted = node.needs_input_grad if python else [edge[0] is not None for edge in node.next_functions]
        return [gradient for gradient, asked in zip(outputs, wanted) if asked]


def _fitted(gradient: Tensor, meta) -> Tensor:
    """The gradient in the shape and dtype of its tensor; broadcast dimensions are summed, as in the engine."""
    if gradient.shape != meta.shape:
        gradient = gradient.sum_to_size(meta.shape)
    return gradient if gradient.dtype == meta.dtype else gradient.to(meta.dtype)


def _uses(roots: list[object]) -> dict[object, int]:
    """The number of edges to each node that is reachable from `roots`."""
    uses: dict[object, int] = {}
    seen, stack = set(roots), list(roots)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                uses[node] = uses.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    return uses


def _add(buffer: dict[int, Tensor], place: int, gradient: Tensor) -> None:
    """Adds in place if only the buffer refers to the sum, as in the engine's input buffers."""
    have = buffer.get(place)
    if have is None:
        buffer[place] = gradient
    elif _alone(have):
        have.add_(gradient)
    else:
        buffer[place] = have + gradient


def _alone(tensor: Tensor) -> bool:
    """Whether only the buffer (and two callers) refer to this tensor, and the tensor covers a storage of its own."""
    referred = sys.getrefcount(tensor) > 4 or torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2
    return not referred and _dense(tensor)


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Sets leaf.grad to the gradient itself if only the buffer has it and its strides are the leaf's, else to a copy."""
    if leaf.grad is not None:
        leaf.grad.add_(gradient)
        return
    own = _alone(gradient) and gradient.stride() == leaf.stride()
    gradient = gradient.detach()
    if not own:
        laid = torch.empty_like(leaf, requires_grad=False)
        laid.copy_(gradient)
        gradient = laid
    leaf.grad = gradient


def _dense(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
