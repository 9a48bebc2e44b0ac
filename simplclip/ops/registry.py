"""What every op's registration shares: the library `simplclip` and the step from a call to its backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simplclip import backends

library = torch.library.Library("simplclip", "DEF")


def define(name: str, arguments: str, returns: str, run: Callable, fake: Callable) -> None:
    """Registers `simplclip::name` (runs on the backend named by its last argument) and the schema of its C++ twins.

    `run(function, *arguments)` prepares the call for a backend's function.
    """
    library.define(f"{name}({arguments}, str backend) -> {returns}")
    library.define(f"{name}_cpu({arguments}) -> {returns}")

    def dispatch(*args):
        first: Tensor = next(arg for arg in args if isinstance(arg, Tensor))
        _, function = backends.select(name, first.device.type, first.dtype, args[-1])
        with torch.autocast(first.device.type, enabled=False):
            return run(function, *args[:-1])

    library.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simplclip::{name}", fake, lib=library)
