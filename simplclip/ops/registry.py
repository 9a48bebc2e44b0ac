"""Registration of the ops in the library `simplclip`, and the way of a call to its backend.

A call on plain tensors takes the short way: an autograd.Function calls the backend's function.
torch.compile, export, tracing, fake tensors, subclasses and torch.func take the registered op,
which has the same forward and backward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

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

library = torch.library.Library("simplclip", "DEF")
_PLAIN = (Tensor, nn.Parameter)


class Choice(NamedTuple):
    """The backends of a kind of call."""

    names: str  # "cpu"; of an op that is composed of others, theirs: "sdpa,cpu"
    modules: tuple[ModuleType, ...]  # theirs, which `run` takes before the call


OPS: dict[str, Op] = {}  # by name
_choices: dict[tuple, Choice] = {}  # those of earlier calls


def forget_calls() -> None:
    """Lets `backends_of_calls` begin anew."""
    _choices.clear()


def backends_of_calls(device: torch.device) -> dict[str, list[str]]:
    """Returns public ops -> names of the backends that ran their calls on such a device so far."""
    names: dict[str, set[str]] = {}
    for (op, _, where, *_), choice in _choices.items():
        if where.type == device.type:
            for part, name in zip(OPS[op].parts, choice.names.split(",")):
                names.setdefault(part, set()).add(name)
    return {op: sorted(names[op]) for op in sorted(names)}


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
        public: str,
        call_type: type,
        run: Callable,
        facts: Callable[..., backends.Facts],
        differentiable: int,
    ):
        self.name = name
        self.public = public
        self.parts = backends.PARTS.get(public, (public,))
        self.call_type: Callable = call_type
        self.run = run
        self.facts = facts
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

    def choose(self, call: Any, names: str) -> Choice:
        """Returns the backends of a call; names: of those that are forced, see `define`."""
        first = getattr(call, self.first)
        facts = self.facts(call)
        # CUDA attention's why_not() reads it
        tf32 = first.is_cuda and torch.backends.cuda.matmul.fp32_precision
        key = self.name, names, first.device, first.dtype, tf32, facts
        choice = _choices.get(key)
        if choice is None:
            choice = _choices[key] = self._choice(first, names, facts)
        return choice

    def _choice(self, first: Tensor, names: str, facts: backends.Facts) -> Choice:
        """Returns what `choose` does, of a call with this tensor and these facts."""
        forced = dict(zip(self.parts, names.split(",")))
        chosen = []
        modules = []
        for part in self.parts:
            name = forced.get(part, "")
            # a backward runs on its forward's backend, also if that would not be chosen any more
            if not name or self.backward is not None:
                name = backends.select(part, first.device, first.dtype, name, facts)
            chosen.append(name)
            modules.append(importlib.import_module(backends.TABLE[part][name].module))
        without_cuda = torch.version.cuda and backends.cuda_extension is None
        if without_cuda and first.is_cuda and "shaped_attention" in self.parts:
            warn_without_cuda(backends.cuda_extension_error)
        return Choice(",".join(chosen), tuple(modules))

    def dispatch(self, call: Any, choice: Choice) -> Any:
        """Runs a laid out call on these backends, without autocast and autograd."""
        device = getattr(call, self.first).device
        if not autocasts(device):
            return self.run(*choice.modules, call)
        with no_autocast(device):
            return self.run(*choice.modules, call)

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
        """Runs a call from the dispatcher's arguments: its fields, and the names of backends."""
        call = self.laid_out(args[:-1])
        return self.dispatch(call, self.choose(call, args[-1]))

    def keep(self, ctx: Any, call: Any, names: str, results: Sequence[Tensor]) -> None:
        """Keeps in ctx what `gradients` reads; the first `differentiable` results have some."""
        ctx.set_materialize_grads(False)
        if self.keeps_call:
            others = results[self.differentiable :]
            ctx.save_for_backward(*self.tensor_values(call), *others)
            ctx.options = self.other_values(call)
        else:
            ctx.save_for_backward(*results)
        ctx.backends = names

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
            by_name = self.backward(call, kept, grads, needed, ctx.backends)
        if not torch.is_grad_enabled():
            return by_name
        names = [name for name, need in needed.items() if need and name in by_name]
        gradients = [by_name[name] for name in names]  # with create_graph=True
        return dict(zip(names, first_order_only(self.public, gradients, *saved, *grads)))


class _Eager(torch.autograd.Function):
    """A call of an op on plain tensors that is differentiated."""

    @staticmethod
    def forward(ctx: Any, op: Op, choice: Choice, call: Any, *tensors: Tensor | None) -> Any:
        results = op.dispatch(call, choice)
        ctx.op = op
        op.keep(ctx, call, choice.names, results)
        if op.keeps_call:
            return results[: op.differentiable]
        ctx.mark_non_differentiable(*results[op.differentiable :])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        names = ctx.op.tensors
        needed = dict(zip(names, ctx.needs_input_grad[3:]))
        by_name = ctx.op.gradients(ctx, grads, needed)
        return None, None, None, *[by_name.get(name) if needed[name] else None for name in names]


def call(op: Op, arguments: Any, names: str | None = None) -> Any:
    """Runs an op and returns its results, with gradients if it has them and a tensor requires one:
    then those alone that have gradients, if the op keeps its call and is not compiled or traced.

    arguments: the dataclass of the call; a tensor that is not contiguous is copied, see
    `Op.laid_out`. names: of backends, see `define`; None: those that are forced now. Raises
    RuntimeError if no backend can run, NotImplementedError for a tensor with a forward-mode tangent
    and under torch.func.grad.
    """
    if names is None:
        names = backends.forced_for(op.public)
    if torch.compiler.is_compiling():
        return op.overload(*flat(arguments), names)
    tensors = op.tensor_values(arguments)
    if is_transformed():
        check_reverse_mode(op.public, tensors)
        return op.overload(*flat(arguments), names)
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
        return op.overload(*flat(arguments), names)
    if not contiguous:
        arguments = op.laid_out(flat(arguments))
    choice = op.choose(arguments, names)
    if op.backward is None or not requires_grad or not torch.is_grad_enabled():
        return op.dispatch(arguments, choice)
    return _Eager.apply(op, choice, arguments, *op.tensor_values(arguments))


def define(
    name: str,
    public: str,
    call_type: type,
    returns: str,
    run: Callable,
    empty: Callable,
    *,
    facts: Callable[..., backends.Facts] = lambda call: backends.NO_FACTS,
    differentiable: int = 1,
) -> Op:
    """Registers the op `simplclip::name` of a public op; returns the Op.

    Its last argument is the name of the backend that runs it; "" for the first that can. If the
    public op is composed of others (backends.PARTS), it has a name for each, with commas between
    them. call_type: the dataclass of a call, from whose fields the schema is generated. returns:
    the result types in the schema, e.g. "(Tensor, Tensor)".

    run(module, call): runs the call by functions of the backend's module. If the public op is
    composed of others, run(*modules, call) gets the module of each part's backend. empty(call,
    names): makes the op's results for fake tensors, uninitialised.

    facts(call): returns what the backends' why_not() needs besides device and dtype.
    differentiable: so many results, the first ones, have gradients; the others are for backward.
    """
    library.define(f"{name}({schema_of(call_type)}, str backend) -> {returns}")
    op = OPS[name] = Op(name, public, call_type, run, facts, differentiable)
    library.impl(name, op.dispatch_flat, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"simplclip::{name}",
        lambda *args: empty(call_type(*args[:-1]), args[-1]),
        lib=library,
    )
    return op


def register_gradient(op: Op, backward: Callable, *, keeps_call: bool = True) -> None:
    """Registers gradients of the op's differentiable results with torch and in `op`.

    backward(call, kept, grads, needed, names) returns gradients of the call's tensors by the names
    of its fields. kept: the results that are not differentiable. grads: of the differentiable
    results, None for one that was not used. needed: by the names of tensors whether a gradient is
    needed; others may be returned too. names: of the backends that ran forward, see `define`.

    keeps_call: whether backward needs the call; else `call` is None and `kept` are all results.
    """
    op.keeps_call = keeps_call
    op.backward = backward

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[op.differentiable :])
        op.keep(ctx, op.call_type(*inputs[:-1]), inputs[-1], output)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        of_fields = dict(zip(op.names, ctx.needs_input_grad))
        needed = {name: of_fields[name] for name in op.tensors}
        by_name = op.gradients(ctx, grads, needed)
        results = [by_name.get(name) if of_fields[name] else None for name in op.names]
        return *results, None  # of the names of backends

    torch.library.register_autograd(
        f"simplclip::{op.name}", gradients, setup_context=setup_context, lib=library
    )
