"""What every op's registration shares: the library `simplclip` and the step from a call to its backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simplclip import backends

library = torch.library.Library("simplclip", "DEF")

# Ops by their full name: what runs a call, with `through` standing between it and the backends' functions; and what such a
# function returns for fake tensors. simplclip.plan runs ops by these to see what they allocate.
DISPATCH: dict[str, Callable] = {}
NATIVE_FAKES: dict[str, Callable] = {}
counted = False  # while it does


def define(
    name: str,
    arguments: str,
    returns: str,
    run: Callable,
    fake: Callable,
    *,
    native: str | None = None,
    native_fake: Callable | None = None,
    facts: Callable[..., dict] | None = None,
) -> None:
    """Registers `simplclip::name`, which runs on the backend named by its last argument, and the schemas that C++ implements.

    `run(function, *arguments)` prepares the call for a backend's function. `native`: schema of the functions of C++ where it
    is another than the op's, then with its `native_fake`. `facts(*arguments)`: what the backends' predicates want to know
    beside device and dtype.
    An op without a row in the table is made of others: its `run` gets `pick(op, **facts)`, which gives their functions.
    """
    library.define(f"{name}({arguments}, str backend) -> {returns}")
    for backend in ("cpu", "cuda"):
        library.define(f"{name}_{backend}{native or f'({arguments}) -> {returns}'}")

    def dispatch(*args, through: Callable[[str, str, Callable], Callable] | None = None):
        first: Tensor = next(arg for arg in args if isinstance(arg, Tensor))

        def pick(op: str, **call) -> Callable:
            backend, function = backends.select(op, first.device.type, first.dtype, args[-1], **call)
            return through(op, backend, function) if through else function

        function = pick(name, **(facts(*args[:-1]) if facts else {})) if name in backends.TABLE else pick
        with torch.autocast(first.device.type, enabled=False):
            return run(function, *args[:-1])

    library.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simplclip::{name}", fake, lib=library)
    DISPATCH[f"simplclip::{name}"] = dispatch
    if name in backends.TABLE:
        NATIVE_FAKES[name] = native_fake or (lambda *args: fake(*args, ""))


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as autocast hands them to an op: in its dtype where it is on for the first one's device; float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t for t in tensors]
