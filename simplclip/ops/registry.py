"""Registration of the ops in the library `simplclip`, and the way of a call to its backend.

A call on plain tensors takes the short way: an autograd.Function calls the backend's function.
torch.compile, export, tracing, fake tensors, subclasses and torch.func take the registered op,
which has the same forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from simplclip.calls.fields import flat, schema_of, tensors_of
from simplclip.ops import backends
from simplclip.ops.extension import warn_without_cuda
from simplclip.ops.modes import (
    autocasts,
    check_reverse_mode,
    first_order_only,
    is_transformed,
    no_autocast,
)

_PLAIN = (Tensor, nn.Parameter)
_selected: dict[tuple, type[backends.Backend]] = {}  # the backends that earlier calls selected


def _select(
    op: str, facts: backends.Facts = backends.NO_FACTS, *, first: Tensor, spec: str, part: bool
) -> Callable:
    """Returns the function of the backend that backends.select chooses, cached by kind of call."""
    # CUDA attention's why_not() reads it
    tf32 = first.is_cuda and torch.backends.cuda.matmul.fp32_precision
    key = op, spec, part, first.device, first.dtype, tf32, facts
    backend = _selected.get(key)
    if backend is None:
        backend = backends.select(op, first.device, first.dtype, spec, facts, part=part)
        _selected[key] = backend
        if first.is_cuda and op.startswith("shaped_attention"):
            _warn_without_cuda()
    function: Callable = getattr(backend, op)
    return function


def forget_calls() -> None:
    """Lets `backends_of_calls` begin anew."""
    _selected.clear()


def backends_of_calls(device: torch.device) -> dict[str, list[str]]:
    """Returns public ops -> names of the backends that ran their calls on such a device so far."""
    names: dict[str, set[str]] = {}
    for (op, _, _, where, *_), backend in _selected.items():
        if where.type == device.type:
            names.setdefault(backends.public_name(op), set()).add(backend.name)
    return {op: sorted(names[op]) for op in sorted(names)}


def _warn_without_cuda() -> None:
    """Warns, once per process, if torch has CUDA but the CUDA extension is not loaded."""
    if torch.version.cuda and backends.cuda_extension is None:
        warn_without_cuda(backends.cuda_extension_error)


def _getter(names: Sequence[str]) -> Callable[[Any], tuple]:
    """Returns a function of an object that returns its attributes of these names."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


class Op:
    """An op of the library; see `define`."""

    def __init__(
        self,
        name: str,
        call_type: type,
        run: Callable,
        facts: Callable[..., backends.Facts] | None,
        *,
        composed: bool,
        differentiable: int,
    ):
        self.name = name
        self.call_type: Callable = call_type
        self.run = run
        self.facts = facts
        self.composed = composed
        self.differentiable = differentiable
        self.names = [field.name for field in fields(call_type)]
        self.values = attrgetter(*self.names)
        # a tensor in every call: its device and dtype are the call's
        self.first = self.names[0]
        self.tensors = tensors_of(call_type)
        self.tensor_values = _getter(self.tensors)
        self.others = [name for name in self.names if name not in self.tensors]
        self.other_values = _getter(self.others)
        order = [*self.tensors, *self.others]
        self.order = [order.index(name) for name in self.names]
        # position of a tensor among the fields, and whether only its rows are contiguous
        self.layouts: list[tuple[int, bool]] = []
        for position, field in enumerate(fields(call_type)):
            kind = str(field.type)
            if kind.startswith(("Tensor", "Strided")):
                self.layouts.append((position, kind.startswith("Strided")))
        # set by `register_gradient`, before which the op has none
        self.keeps_call = False
        self.backward: Callable | None = None

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered op, torch.ops.simplclip.<name>.default."""
        return getattr(torch.ops.simplclip, self.name).default

    def dispatch(self, call: Any, spec: str) -> Any:
        """Runs a laid out call on its backend, without autocast and autograd."""
        first = getattr(call, self.first)
        function: Callable
        if self.composed:
            function = partial(_select, first=first, spec=spec, part=True)
        else:
            facts = self.facts(call) if self.facts else backends.NO_FACTS
            function = _select(self.name, facts, first=first, spec=spec, part=False)
        if not autocasts(first.device):
            return self.run(function, call)
        with no_autocast(first.device):
            return self.run(function, call)

    def laid_out(self, values: Sequence) -> Any:
        """Returns a call of the fields' values; tensors that kernels could not read are copied."""
        values = list(values)
        for position, strided in self.layouts:
            t = values[position]
            if t is None:
                continue
            is_laid_out = t.stride(-1) == 1 if strided else t.is_contiguous()
            if not is_laid_out:
                values[position] = t.contiguous()
        return self.call_type(*values)

    def dispatch_flat(self, *args: Any) -> Any:
        """Runs a call from the dispatcher's arguments: its fields in their order, and `spec`."""
        return self.dispatch(self.laid_out(args[:-1]), args[-1])

    def keep(self, ctx: Any, call: Any, spec: str, results: Sequence[Tensor]) -> None:
        """Keeps in ctx what `gradients` reads; the first `differentiable` results have some."""
        others = results[self.differentiable :]
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        if self.keeps_call:
            ctx.save_for_backward(*self.tensor_values(call), *others)
            ctx.options = self.other_values(call)
        else:
            ctx.save_for_backward(*results)
        ctx.spec = spec

    def gradients(
        self, ctx: Any, grads: Sequence[Tensor | None], needed: Mapping[str, bool]
    ) -> dict[str, Tensor | None]:
        """Returns the gradients of the call's tensors by name, once differentiable.

        needed: whether a gradient is needed, by the names of tensors. Those not needed may be
        missing.
        """
        grads = grads[: self.differentiable]
        if self.backward is None or (grads[0] is None and grads[-1] is None):
            return {}
        # read only once: under torch.utils.checkpoint, every access runs the forward again
        saved = ctx.saved_tensors
        call, kept = None, saved
        if self.keeps_call:
            count = len(self.tensors)
            kept = saved[count:]
            values = (*saved[:count], *ctx.options)
            call = self.call_type(*[values[i] for i in self.order])
        with torch.no_grad():
            by_name = self.backward(call, kept, grads, needed, ctx.spec)
        if not torch.is_grad_enabled():
            return by_name
        names = [name for name, need in needed.items() if need and name in by_name]
        gradients = [by_name[name] for name in names]  # with create_graph=True
        return dict(zip(names, first_order_only(self.name, gradients, *saved, *grads)))


class _Eager(torch.autograd.Function):
    """A call of an op on plain tensors that is differentiated."""

    @staticmethod
    def forward(ctx: Any, op: Op, spec: str, call: Any, *tensors: Tensor | None) -> Any:
        results = op.dispatch(call, spec)
        ctx.op = op
        op.keep(ctx, call, spec, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        names = ctx.op.tensors
        needed = dict(zip(names, ctx.needs_input_grad[3:]))
        by_name = ctx.op.gradients(ctx, grads, needed)
        return None, None, None, *[by_name.get(name) if needed[name] else None for name in names]


def call(op: Op, arguments: Any, spec: str | None = None) -> Any:
    """Runs an op and returns its results, with gradients if it has them and a tensor requires one.

    arguments: the dataclass of the call; a tensor that is not contiguous is copied, see
    `Op.laid_out`. spec: the forced backends, see backends.forced; None: those that are forced now.
    Raises RuntimeError if no backend can run, NotImplementedError for a tensor with a forward-mode
    tangent and under torch.func.grad.
    """
    if spec is None:
        spec = backends.forced()
    if torch.compiler.is_compiling():
        return op.overload(*flat(arguments), spec)
    tensors = op.tensor_values(arguments)
    if is_transformed():
        check_reverse_mode(op.name, tensors)
        return op.overload(*flat(arguments), spec)
    plain = not (
        torch._C._len_torch_dispatch_stack() or tensors[0].is_meta or torch.jit.is_tracing()
    )
    requires_grad, contiguous = False, True
    for t in tensors:
        if t is not None:
            plain = plain and type(t) in _PLAIN and not t.is_neg()
            requires_grad = requires_grad or t.requires_grad
            contiguous = contiguous and t.is_contiguous()
    if not plain:
        return op.overload(*flat(arguments), spec)
    if not contiguous:
        arguments = op.laid_out(flat(arguments))
    if op.backward is None or not requires_grad or not torch.is_grad_enabled():
        return op.dispatch(arguments, spec)
    return _Eager.apply(op, spec, arguments, *op.tensor_values(arguments))


def define(
    name: str,
    call_type: type,
    returns: str,
    run: Callable,
    empty: Callable,
    *,
    served_by: Sequence[type[backends.Backend]] = (),
    facts: Callable[..., backends.Facts] | None = None,
    differentiable: int = 1,
) -> Op:
    """Registers the op `simplclip::name`; returns the Op.

    Also adds its row to backends.TABLE. The last argument of the op is spec: the backends that are
    forced, see backends.forced. call_type: the dataclass of a call, from whose fields the schema is
    generated. returns: the result types in the schema, e.g. "(Tensor, Tensor)".

    run(function, call): runs a backend's method, whose argument is a call too. empty(call, spec):
    makes the op's results for fake tensors, uninitialised.

    served_by: the backends, in the order in which they are tried; one that has no method of the
    op's name is left out. Without any, the op is composed of other ops, and its `run` gets
    `pick(op, facts)`, which returns the function of such an op.

    facts(call): returns the facts of a call, besides device and dtype, that the backends'
    why_not() needs; None: there are none. differentiable: so many results, the first ones, have
    gradients; the others are for backward.
    """
    row = {backend.name: backend for backend in served_by if hasattr(backend, name)}
    if row:
        backends.TABLE[name] = row
    backends.library.define(f"{name}({schema_of(call_type)}, str backend) -> {returns}")
    op = Op(name, call_type, run, facts, composed=not row, differentiable=differentiable)
    backends.library.impl(name, op.dispatch_flat, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"simplclip::{name}",
        lambda *args: empty(call_type(*args[:-1]), args[-1]),
        lib=backends.library,
    )
    return op


def register_gradient(op: Op, backward: Callable, *, keeps_call: bool = True) -> None:
    """Registers gradients of the op's differentiable results with torch and in `op`.

    backward(call, kept, grads, needed, spec) returns gradients of the call's tensors by the names
    of its fields. kept: the results that are not differentiable. grads: of the differentiable
    results, None for one that was not used. needed: by the names of tensors whether a gradient is
    needed; others may be returned too. spec: the backends that were forced in forward, see
    backends.forced.

    keeps_call: whether backward needs the call; else `call` is None and `kept` are all results.
    """
    op.keeps_call = keeps_call
    op.backward = backward

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        op.keep(ctx, op.call_type(*inputs[:-1]), inputs[-1], output)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        of_fields = dict(zip(op.names, ctx.needs_input_grad))
        needed = {name: of_fields[name] for name in op.tensors}
        by_name = op.gradients(ctx, grads, needed)
        results = [by_name.get(name) if of_fields[name] else None for name in op.names]
        return *results, None  # of the backends that are forced

    torch.library.register_autograd(
        f"simplclip::{op.name}", gradients, setup_context=setup_context, lib=backends.library
    )
