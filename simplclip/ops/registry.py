"""Registration of the ops in the library `simplclip`, and the dispatch of a call to its backend."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.autograd import forward_ad

from simplclip.ops import backends, distributed
from simplclip.ops.calls import schema_of, tensors_of

library = torch.library.Library("simplclip", "DEF")

# DISPATCH: an op's full name -> the function that runs a call, whose argument `through` may wrap the backend's function.
# NATIVE_FAKES: an op's short name -> a function that makes the results of a backend's function for fake tensors.
# simplclip.memory runs ops through both to measure their allocations.
DISPATCH: dict[str, Callable] = {}
NATIVE_FAKES: dict[str, Callable] = {}
counted = False  # True while simplclip.memory runs ops with fake tensors, to count the memory that they take


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
) -> None:
    """Registers `simplclip::name`, which runs on the backend named by its last argument, and the schemas that C++ implements.

    call_type: the dataclass of a call, from whose fields the schema is generated.
    run(function, call): runs a backend's function, whose argument is a call too; a function of C++ gets the call's fields.
    fake(call, backend): makes the op's results for fake tensors; backend: the name that was asked for.
    row: the op's backends, for the table. An op without a row is composed of other ops: its `run` gets `pick(op, **facts)`,
    which returns the function of such an op. Each of these ops runs on the backend that was asked for, if the op has it.
    native: the dataclass and the result types of the backends' functions, if they differ from the op's; `native_fake(call)`
    makes their results for fake tensors.
    facts(call): returns the facts of a call, besides device and dtype, that the backends' predicates need.
    """
    if row:
        backends.TABLE[name], NATIVE_FAKES[name] = row, native_fake or (lambda call: fake(call, ""))
    library.define(f"{name}({schema_of(call_type)}, str backend) -> {returns}")
    native_type, results = native or (call_type, returns)
    arguments = schema_of(native_type).replace("SymInt", "int")  # C++ runs with numbers, never traced
    unwritten = re.sub(r"\(\w!\)", "", arguments)
    for backend in {"cpu", "cuda"} & set(row or ()):
        library.define(f"{name}_{backend}({arguments}) -> {results}")
        # Returns the bytes that the op above allocates besides its results; called with meta tensors.
        library.define(f"{name}_{backend}_workspace({unwritten}) -> int")

    def dispatch(*args, through: Callable[[str, str, Callable], Callable] | None = None):
        first: Tensor = next(arg for arg in args if isinstance(arg, Tensor))
        call = call_type(*args[:-1])

        def pick(op: str, **of_call) -> Callable:
            asked = args[-1] if op == name else backends.backend_of_part(op, args[-1])
            backend, function = backends.select(op, first.device.type, first.dtype, asked, **of_call)
            return through(op, backend, function) if through else function

        function = pick(name, **(facts(call) if facts else {})) if row else pick
        with no_autocast(first.device):
            return run(function, call)

    library.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simplclip::{name}", lambda *args: fake(call_type(*args[:-1]), args[-1]), lib=library)
    DISPATCH[f"simplclip::{name}"] = dispatch


FIRST_ORDER = (
    "{op}: expected a first derivative in reverse mode, got {got}; "
    'run the forward under simplclip.backend("reference"), which has all derivatives'
)


def transforms() -> set[str]:
    """Returns the transforms of torch.func around the present call: "grad", "jvp", "vmap"."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return set()
    return {level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack()}


def check_reverse_mode(name: str, values: Sequence, *, vmap: bool = True) -> None:
    """Raises NotImplementedError under torch.func.grad and in forward mode, where torch would return derivatives of zero.

    vmap: whether torch.vmap is supported; if not, torch.vmap raises the error too.
    """
    got = None
    if inside := transforms() & ({"grad", "jvp"} if vmap else {"grad", "jvp", "vmap"}):
        got = f"torch.func.{min(inside)}"
    elif forward_ad._current_level >= 0:
        tensors = (value for value in values if isinstance(value, Tensor))
        got = "a forward-mode tangent" if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors) else None
    if got:
        raise NotImplementedError(FIRST_ORDER.format(op=_public(name), got=got))


def call(name: str, *args):
    """Runs `simplclip::name`; if "reference" is forced, runs its definition directly, so that autograd differentiates it.

    The other backends have first derivatives in reverse mode alone; asking for other derivatives raises an error.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.simplclip, name)(*args)
    if args[-1] == "reference":
        return DISPATCH[f"simplclip::{name}"](*args)
    check_reverse_mode(name, args)
    return getattr(torch.ops.simplclip, name)(*args)


def first_order_only(name: str, gradients: Sequence[Tensor | None], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the gradients. Differentiating them again, with respect to anything that a source depends on, raises an error.

    Autograd runs a node only if the node lies on a path to a tensor whose gradient is asked for. So the node that raises has
    the sources as inputs: the tensors that the gradients were computed from, or a result of the op that depends on these.
    """
    message = FIRST_ORDER.format(op=name, got="a double backward")
    node = torch._C._functions.DelayedError(message.encode(), len(gradients) + len(sources))
    return node(*gradients, *sources)[: len(gradients)]


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers backward(ctx, saved, *grads) for `simplclip::name`; `saved` are the saved tensors.

    Differentiating the returned gradients again raises an error instead of giving zero. For this the differentiable inputs,
    or a differentiable result, must be among the saved tensors.
    """

    def once(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # read only once: under torch.utils.checkpoint, every access runs the forward again
        with torch.no_grad():
            out = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():  # it is enabled with create_graph=True
            return out
        return first_order_only(_public(name), out, *saved, *grads)

    torch.library.register_autograd(f"simplclip::{name}", once, setup_context=setup_context)


def register_gradient(
    name: str, call_type: type, backward: Callable, forget: Sequence[str] = (), keep_result: bool = False
) -> None:
    """Registers the gradient of the first result of `simplclip::name`. The other results are for backward: no gradients.

    backward(call, results, grad, need, backend) returns gradients by field. `results` are the other results; `need` maps a
    field to whether its gradient is needed. All tensors of the call are saved except those in `forget`, which are None in
    backward's `call`. If a forgotten tensor may need a gradient, set `keep_result`: then the first result, a number, is saved
    too, as register_autograd requires.
    """
    names = [*(field.name for field in fields(call_type)), "backend"]
    tensors = tensors_of(call_type)

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        saved = (None if field in forget else value for field, value in zip(tensors, inputs))
        ctx.save_for_backward(*saved, *output[1:], *output[:keep_result])
        ctx.options = inputs[len(tensors) :]

    def of_fields(ctx, saved, grad, *_):
        *options, backend = ctx.options
        call, results = call_type(*saved[: len(tensors)], *options), saved[len(tensors) :]
        results = results[:-1] if keep_result else results
        found = backward(call, results, grad, dict(zip(names, ctx.needs_input_grad)), backend)
        return tuple(found.get(field) for field in names)

    register_autograd(name, of_fields, setup_context)


def _public(name: str) -> str:
    return "similarity_loss" if name.startswith("similarity") else name.removesuffix("_fwd")


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow. True under torch.func, which hides whether a tensor requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled. There is no autocast for meta tensors: torch raises when asked about it."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts the tensors to autocast's dtype, except float64, if autocast is enabled on the device of the first one."""
    device = tensors[0].device
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    cast = [t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in tensors]
    for t, copy in zip(tensors, cast):
        if copy is not t:
            distributed.follow(t, copy)
    return cast
