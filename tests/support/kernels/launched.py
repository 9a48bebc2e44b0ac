"""Launches of the library's launchers on a card, recorded and not started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import JITFunction

import ptx
from support.kernels.calls import case_of, kernels_alone


class Launched(NamedTuple):
    kernel: JITFunction
    args: tuple
    options: dict[str, Any]  # arguments by name, and options of the compiler
    current: Tensor | None  # the one whose device the launcher has made the current one

    @property
    def named(self) -> dict[str, Any]:
        """The arguments and options by their names."""
        return dict(zip(self.kernel.arg_names, self.args)) | self.options


@contextlib.contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Context in which no kernel of Triton starts; yields the launches so far."""
    launches: list[Launched] = []
    current: list[Tensor] = []

    def run(kernel: JITFunction, *args: Any, grid: tuple, warmup: bool, **options: Any) -> None:
        launches.append(Launched(kernel, args, options, current[-1] if current else None))

    @contextlib.contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.cuda, "device_of", device_of),
    ):
        yield launches


def launches_of(name: str, kind: str, sm: int) -> list[Launched]:
    """Returns the launches of a call of CALLS, forward and backward."""
    case = case_of(name, kind)
    with kernels_alone(name), ptx.card(sm, tf32=case.tf32), recorded() as launches:
        case.run()
    return launches
