"""Registration of the ops in the library `simplclip`, and the dispatch of a call to its backend."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from simplclip.ops import backends

library = torch.library.Library("simplclip", "DEF")

# By the full name of an op: the function that runs a call, whose `through` may wrap the backends' functions. By name: what
# those return for fake tensors. simplclip.memory runs ops by these to measure what they allocate.
DISPATCH: dict[str, Callable] = {}
NATIVE_FAKES: dict[str, Callable] = {}
counted = False  # True while simplclip.memory does so

_SCHEMA = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "SymInt", "bool": "bool", "float": "float", "str": "str"}


def schema_of(call: type) -> str:
    """The schema of a call's dataclass for the dispatcher: its fields in their order."""
    return ", ".join(f"{_SCHEMA[str(field.type)]} {field.name}" for field in fields(call))


def flat(call: Any) -> tuple:
    """The values of a call's fields, the dispatcher's arguments."""
    return tuple([getattr(call, name) for name in call.__match_args__])


def define(
    name: str,
    arguments: str | type,
    returns: str,
    run: Callable,
    fake: Callable,
    *,
    row: dict[str, backends.Implementation] | None = None,
    native: str | None = None,
    native_fake: Callable | None = None,
    facts: Callable[..., dict] | None = None,
) -> None:
    """Registers `simplclip::name`, which runs on the backend named by its last argument, and the schemas that C++ implements.

    arguments: the arguments of the schema, or the dataclass of a call from which they are generated. With a dataclass, `run`,
    `fake` and the functions of the backends get an object of it, except C++, which gets its fields.
    run(function, *arguments): prepares the call for a backend's function.
    row: the op's backends, for the table. An op without them is composed of other ops: its `run` gets `pick(op, **facts)`,
    which returns their functions.
    native: the schema of the C++ functions if it differs from that of the op; `native_fake` is then their fake.
    facts(*arguments): facts of the call, besides device and dtype, that the backends' predicates need.
    """
    as_call: Callable = lambda *args: args  # noqa: E731
    if isinstance(arguments, type):
        call_type, arguments, of_call = arguments, schema_of(arguments), fake
        as_call = lambda *args: (call_type(*args),)  # noqa: E731
        fake = lambda *args: of_call(call_type(*args[:-1]))  # noqa: E731
        native_fake = native_fake or of_call
    if row:
        backends.TABLE[name] = row
    library.define(f"{name}({arguments}, str backend) -> {returns}")
    schema = (native or f"({arguments}) -> {returns}").replace("SymInt", "int")  # C++ runs with numbers, never traced
    given = re.sub(r"\(\w!\)", "", schema.split(" -> ")[0])
    for backend in {"cpu", "cuda"} & set(row or ()):
        library.define(f"{name}_{backend}{schema}")
        # Returns the bytes that it takes besides its results; it is called with meta tensors.
        library.define(f"{name}_{backend}_workspace{given} -> int")

    def dispatch(*args, through: Callable[[str, str, Callable], Callable] | None = None):
        first: Tensor = next(arg for arg in args if isinstance(arg, Tensor))

        def pick(op: str, **call) -> Callable:
            backend, function = backends.select(op, first.device.type, first.dtype, args[-1], **call)
            return through(op, backend, function) if through else function

        function = pick(name, **(facts(*args[:-1]) if facts else {})) if row else pick
        meta = first.device.type == "meta"  # it has no autocast
        with contextlib.nullcontext() if meta else torch.autocast(first.device.type, enabled=False):
            return run(function, *as_call(*args[:-1]))

    library.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simplclip::{name}", fake, lib=library)
    DISPATCH[f"simplclip::{name}"] = dispatch
    if row:
        NATIVE_FAKES[name] = native_fake or (lambda *args: fake(*args, ""))


_FIRST_ORDER = (
    "{op}: expected a first derivative in reverse mode, got {got}; "
    'run the forward under simplclip.backend("reference"), which has all derivatives'
)


def call(name: str, *args):
    """Runs `simplclip::name`; if "reference" is forced, runs its definition directly, so that autograd differentiates it.

    The other backends have no forward-mode derivative, which torch would take for zero, and no torch.func.grad: both raise.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.simplclip, name)(*args)
    if args[-1] == "reference":
        return DISPATCH[f"simplclip::{name}"](*args)
    got = None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        transforms = {level.key().name.lower() for level in torch._C._functorch.get_interpreter_stack()}
        got = next((f"torch.func.{which}" for which in ("grad", "jvp") if which in transforms), None)
    elif forward_ad._current_level >= 0:
        tensors = (arg for arg in args if isinstance(arg, Tensor))
        got = "a forward-mode tangent" if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors) else None
    if got:
        raise NotImplementedError(_FIRST_ORDER.format(op=_public(name), got=got))
    return getattr(torch.ops.simplclip, name)(*args)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers `backward` for `simplclip::name`. Differentiating its gradients again is an error, not a zero."""

    @functools.wraps(backward)
    def once(ctx, *grads):
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # it is enabled with create_graph=True
            return out
        message = _FIRST_ORDER.format(op=_public(name), got="a double backward")
        marked = torch._C._functions.DelayedError(message.encode(), len(out))
        return marked(*(None if t is None else t.detach().requires_grad_() for t in out))

    torch.library.register_autograd(f"simplclip::{name}", once, setup_context=setup_context)


def _public(name: str) -> str:
    return "similarity_loss" if name.startswith("similarity") else name.removesuffix("_fwd")


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow; under torch.func, which hides whether a tensor requires a gradient, True."""
    if not torch.is_grad_enabled():
        return False
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts the tensors to autocast's dtype, except float64, if autocast is enabled on the device of the first one."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in tensors]
