"""Registration of the ops in the library `simplclip`, and the way of a call to its backend.

A call on plain tensors takes the short way: an autograd.Function calls the backend's function.
torch.compile, export, tracing, fake tensors, subclasses and torch.func take the registered op,
which has the same forward and backward.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from simplclip.ops import backends
from simplclip.ops.calls import flat, schema_of, tensors_of
from simplclip.ops.extension import warn_without_cuda

library = torch.library.Library("simplclip", "DEF")

# DISPATCH: an op's full name -> the function that runs a call, whose argument `through` may wrap
# the backend's function. NATIVE_FAKES: an op's short name -> a function that makes the results of a
# backend's function for fake tensors. simplclip.plan runs ops through both to measure their
# allocations.
DISPATCH: dict[str, Callable] = {}
NATIVE_FAKES: dict[str, Callable] = {}
# True while simplclip.plan runs ops with fake tensors, to count the memory that they take
counted = False

_PLAIN = (Tensor, nn.Parameter)
_selected: dict[tuple, Callable] = {}  # the backends' functions that earlier calls selected


def _select(
    op: str, first: Tensor, spec: str, part: bool, facts: dict, through: Callable | None = None
) -> Callable:
    """Returns the function of a backend, or what `through` makes of it.

    It is selected once for each kind of call.
    """
    # the predicate of CUDA attention reads it
    tf32 = first.is_cuda and torch.backends.cuda.matmul.fp32_precision
    key = op, spec, part, first.device, first.dtype, tf32, *facts.values()
    selected = _selected.get(key)
    if selected is None or through:
        name, selected = backends.select(op, first.device, first.dtype, spec, part=part, **facts)
        if through:
            return through(op, name, selected)
        _selected[key] = selected
        if (
            first.is_cuda
            and op.startswith("shaped_attention")
            and backends.cuda_extension is None
            and torch.version.cuda
        ):
            warn_without_cuda(backends.cuda_extension_error)
    return selected


class Op:
    """An op of the library; see `define`."""

    def __init__(
        self, name: str, call_type: Any, run: Callable, facts: Callable | None, composed: bool
    ):
        self.name = name
        self.call_type = call_type
        self.run = run
        self.facts = facts
        self.composed = composed
        self.values = attrgetter(*call_type.__match_args__)
        # a tensor in every call: its device and dtype are the call's
        self.first = call_type.__match_args__[0]
        self.tensors = len(tensors_of(call_type))
        self.names = call_type.__match_args__[: self.tensors]
        types = [str(field.type) for field in fields(call_type)]
        self.layouts = [
            (i, t.startswith("Strided"))
            for i, t in enumerate(types)
            if t.startswith(("Tensor", "Strided"))
        ]
        self.backward: Any = None  # set by `register_gradient`, before which the op has none
        self.differentiable = 1
        self.saved_results = 1
        self.saves_tensors = True

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.simplclip, self.name).default

    def dispatch(self, call: Any, spec: str, through: Callable | None = None) -> Any:
        """Runs a call on its backend.

        `through(op, backend, function)` may return another function to call.
        """
        first = getattr(call, self.first)
        if self.composed:
            function = self.pick(first, spec, through)
        else:
            function = _select(
                self.name, first, spec, False, self.facts(call) if self.facts else {}, through
            )
        if not autocasts(first.device):
            return self.run(function, call)
        with no_autocast(first.device):
            return self.run(function, call)

    def laid_out(self, values: Sequence) -> Any:
        """Returns a call with tensors in the layout that their types promise: kernels read them
        through pointers.
        """
        values = list(values)
        for index, strided in self.layouts:
            t = values[index]
            if t is not None and not (t.stride(-1) == 1 if strided else t.is_contiguous()):
                values[index] = t.contiguous()
        return self.call_type(*values)

    def pick(self, first: Tensor, spec: str, through: Callable | None) -> Callable:
        """Returns `pick(op, **facts)`, which gives a composed op the function of one of its
        parts.
        """
        return lambda op, **facts: _select(op, first, spec, True, facts, through)

    def dispatch_through(self, *args: Any, through: Callable | None = None) -> Any:
        """Runs the dispatcher's arguments, see `dispatch`."""
        return self.dispatch(self.laid_out(args[:-1]), args[-1], through)

    def save(
        self,
        ctx: Any,
        tensors: Sequence[Tensor | None],
        options: Sequence,
        spec: str,
        results: Sequence[Tensor],
    ) -> None:
        ctx.mark_non_differentiable(*results[self.differentiable :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(tensors if self.saves_tensors else ()), *results[self.saved_results :]
        )
        ctx.options, ctx.spec = options, spec

    def gradients(
        self, ctx: Any, grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the call's tensors.

        Differentiating them again raises an error instead of giving zero. For this the
        differentiable inputs, or a differentiable result, must be among the saved tensors.
        """
        grads = grads[: self.differentiable]
        if grads[0] is None and grads[-1] is None:
            return (None,) * self.tensors
        # read only once: under torch.utils.checkpoint, every access runs the forward again
        saved = ctx.saved_tensors
        inputs = self.tensors if self.saves_tensors else 0
        call = self.call_type(*(saved[:inputs] or (None,) * self.tensors), *ctx.options)
        with torch.no_grad():
            by_name = self.backward(call, saved[inputs:], grads, needed, ctx.spec)
        gradients = tuple(
            [by_name.get(name) if need else None for name, need in zip(self.names, needed)]
        )
        if not torch.is_grad_enabled():
            return gradients
        return first_order_only(self.name, gradients, *saved, *grads)  # with create_graph=True


class _Eager(torch.autograd.Function):
    """A call of an op on plain tensors."""

    @staticmethod
    def forward(
        ctx: Any, op: Op, spec: str, call: Any, options: Sequence, *tensors: Tensor | None
    ) -> Any:
        results = op.dispatch(call, spec)
        ctx.op = op
        op.save(ctx, tensors, options, spec, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return None, None, None, None, *ctx.op.gradients(ctx, grads, ctx.needs_input_grad[4:])


def call(op: Op, of_call: Any, spec: str | None = None) -> Any:
    """Runs a call of an op, by default on the backends that are forced now."""
    spec = backends.forced() if spec is None else spec
    if torch.compiler.is_compiling():
        return op.overload(*flat(of_call), spec)
    values = op.values(of_call)
    if is_transformed():
        check_reverse_mode(op.name, values)
        return op.overload(*values, spec)
    plain = not (
        torch._C._len_torch_dispatch_stack() or values[0].is_meta or torch.jit.is_tracing()
    )
    requires_grad, contiguous = False, True
    for tensor in values[: op.tensors] if op.backward else values:
        if isinstance(tensor, Tensor):
            plain = plain and type(tensor) in _PLAIN and not tensor.is_neg()
            requires_grad = requires_grad or tensor.requires_grad
            contiguous = contiguous and tensor.is_contiguous()
    if not plain:
        return op.overload(*values, spec)
    if not contiguous:
        of_call = op.laid_out(values)
    if op.backward is None or not requires_grad or not torch.is_grad_enabled():
        return op.dispatch(of_call, spec)
    return _Eager.apply(op, spec, of_call, values[op.tensors :], *values[: op.tensors])


def define(
    name: str,
    call_type: type,
    returns: str,
    run: Callable,
    fake: Callable,
    *,
    row: dict[str, backends.Implementation] | None = None,
    native: tuple[type, str] | None = None,
    native_fake: Callable | None = None,
    facts: Callable[..., dict] | None = None,
) -> Op:
    """Registers `simplclip::name`, whose last argument says which backends are forced, and the
    schemas that C++ implements.

    call_type: the dataclass of a call, from whose fields the schema is generated.
    run(function, call): runs a backend's function, whose argument is a call too; a function of C++
    gets the call's fields. fake(call, spec): makes the op's results for fake tensors; spec: the
    backends that are forced. row: the op's backends, for the table. An op without a row is composed
    of other ops: its `run` gets `pick(op, **facts)`, which returns the function of such an op.
    native: the dataclass and the result types of the backends' functions, if they differ from the
    op's; `native_fake(call)` makes their results for fake tensors.
    facts(call): returns the facts of a call, besides device and dtype, that the backends'
    predicates need.
    """
    if row:
        backends.TABLE[name], NATIVE_FAKES[name] = row, native_fake or (lambda call: fake(call, ""))
    library.define(f"{name}({schema_of(call_type)}, str backend) -> {returns}")
    native_type, results = native or (call_type, returns)
    # C++ runs with numbers, never traced
    arguments = schema_of(native_type).replace("SymInt", "int")
    unwritten = re.sub(r"\(\w!\)", "", arguments)
    for backend in {"cpu", "cuda"} & set(row or ()):
        library.define(f"{name}_{backend}({arguments}) -> {results}")
        # Returns the bytes that the op above allocates besides its results; called with meta
        # tensors.
        library.define(f"{name}_{backend}_workspace({unwritten}) -> int")
    op = Op(name, call_type, run, facts, composed=row is None)
    library.impl(name, op.dispatch_through, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"simplclip::{name}", lambda *args: fake(call_type(*args[:-1]), args[-1]), lib=library
    )
    DISPATCH[f"simplclip::{name}"] = op.dispatch_through
    return op


def register_gradient(
    op: Op,
    backward: Callable,
    *,
    differentiable: int = 1,
    saved_results: int = 1,
    saves_tensors: bool = True,
) -> None:
    """Registers the gradients of the first `differentiable` results.

    The other results are for backward: no gradients.

    backward(call, results, grads, needed, spec) returns gradients of the call's tensors by the
    names of its fields. `results`: those from `saved_results` on. `needed`: for each tensor whether
    its gradient is needed; others may be returned too. The call has its tensors unless
    `saves_tensors` is False; then the differentiable results must be saved instead (see
    Op.gradients).
    """
    op.backward, op.differentiable = backward, differentiable
    op.saved_results, op.saves_tensors = saved_results, saves_tensors

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        op.save(ctx, inputs[: op.tensors], inputs[op.tensors : -1], inputs[-1], output)

    def of_all(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        gradients = op.gradients(ctx, grads, ctx.needs_input_grad[: op.tensors])
        return *gradients, *[None] * (len(fields(op.call_type)) + 1 - op.tensors)

    torch.library.register_autograd(f"simplclip::{op.name}", of_all, setup_context=setup_context)


FIRST_ORDER = (
    "{op}: expected a first derivative in reverse mode, got {got}; the ops have no other "
    "derivatives"
)


def transforms() -> set[str]:
    """Returns the transforms of torch.func around the present call: "grad", "jvp", "vmap"."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return set()
    return {level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack()}


def is_transformed() -> bool:
    """Whether the present call is one of forward mode or of a transform of torch.func."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def check_reverse_mode(name: str, values: Sequence, *, vmap: bool = True) -> None:
    """Raises NotImplementedError under torch.func.grad and in forward mode, where torch would
    return derivatives of zero.

    vmap: whether torch.vmap is supported; if not, torch.vmap raises the error too.
    """
    got = None
    if inside := transforms() & ({"grad", "jvp"} if vmap else {"grad", "jvp", "vmap"}):
        got = f"torch.func.{min(inside)}"
    elif forward_ad._current_level >= 0:
        tensors = (value for value in values if isinstance(value, Tensor))
        got = (
            "a forward-mode tangent"
            if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
            else None
        )
    if got:
        raise NotImplementedError(FIRST_ORDER.format(op=backends.public_name(name), got=got))


def first_order_only(
    name: str, gradients: Sequence[Tensor | None], *sources: Tensor | None
) -> tuple[Any, ...]:
    """Returns the gradients.

    Differentiating them again, with respect to anything that a source depends on, raises an error.

    Autograd runs a node only if the node lies on a path to a tensor whose gradient is asked for. So
    the node that raises has the sources as inputs: the tensors that the gradients were computed
    from, or a result of the op that depends on these.
    """
    message = FIRST_ORDER.format(op=backends.public_name(name), got="a double backward")
    node: Any = torch._C._functions.DelayedError(message.encode(), len(gradients) + len(sources))
    return node(*gradients, *sources)[: len(gradients)]


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow.

    True under torch.func, which hides whether a tensor requires a gradient.
    """
    if not torch.is_grad_enabled():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is not None
    )


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled.

    There is no autocast for meta tensors: torch raises when asked about it.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return (
        contextlib.nullcontext()
        if device.type == "meta"
        else torch.autocast(device.type, enabled=False)
    )


def autocast(first: Tensor, *others: Tensor | None) -> Sequence[Any]:
    """Casts the tensors to autocast's dtype, except float64, if autocast is enabled on the device
    of the first one.
    """
    tensors, device = (first, *others), first.device
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in tensors
    ]
