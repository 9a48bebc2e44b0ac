"""shaped_attention's CUDA C++ kernels, executed by tests/ptx as the backend "cuda"."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import ptx
from ptx.capture import Card
from ptx.machine import Code, Launch, Variant
from ptx.parse import Kernel, parse
from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops import backends
from support.ops import layouts
from support.paths import ROOT

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def nvcc() -> str | None:
    """Returns the compiler on the path, or PyPI's beside torch."""
    packaged = sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*/bin/nvcc"))
    return shutil.which("nvcc") or (str(packaged[-1]) if packaged else None)


def why_not() -> str | None:
    if nvcc() is None:
        return "nvcc was not found"
    return backends.cuda_extension_error  # the extension plans the launches


def built(name: str, options: list[str], file: Path, others: Iterable[Path]) -> Path:
    """Returns the file build/ptx/NAME that nvcc makes of a file, made once for the same content.

    others: what the file includes.
    """
    command = [nvcc(), *options, str(file.relative_to(ROOT))]
    contents = [(each.name, each.read_text()) for each in (file, *others)]
    digest = hashlib.sha256(repr((command, contents)).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "ptx"
    out = folder / f"{digest}-{name}"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{os.getpid()}.{name}"
        subprocess.run([*command, "-o", str(part)], check=True, cwd=ROOT, capture_output=True)
        for old in folder.glob(f"*-{name}"):
            old.unlink(missing_ok=True)
        part.replace(out)
    return out


@functools.cache
def compiled(source: str, sm: int) -> dict[str, Kernel]:
    """Returns the kernels of a file of csrc/cuda/attention, compiled with the extension's flags."""
    (flags,) = re.findall(r'"nvcc": (\[.*?\])', (ROOT / "setup.py").read_text())
    target = f"-gencode=arch=compute_{sm},code=sm_{sm}"
    options = ["-ptx", "-lineinfo", *ast.literal_eval(flags), target]
    file = ROOT / "csrc/cuda/attention" / f"{source}.cu"
    headers = sorted((ROOT / "csrc/cuda").rglob("*.*h"))
    return parse(built(f"{source}-{sm}.ptx", options, file, headers).read_text())


@functools.cache
def code_of(source: str, sm: int, name: str, variant: Variant | None) -> Code:
    """Returns the kernel of such a file whose name contains `name`, made executable."""
    (kernel,) = (each for full_name, each in compiled(source, sm).items() if name in full_name)
    return Code(kernel, variant)


def start(
    card: Card, source: str, name: str, programs: int, threads: int, shared: int, *values: object
) -> Launch:
    """Runs the kernel whose name contains `name`. values: as in attention.h, HeadsView a tensor."""
    fields = []
    for value in values:
        fields.append(value)
        if isinstance(value, Tensor) and value.dim() == 4:  # a HeadsView
            fields += [np.int64(step * value.itemsize) for step in value.stride()[:3]]
    return card.launch(
        code_of(source, card.sm, name, card.variant), programs, threads, shared, fields
    )


def start_shaped(
    card: Card, backward: bool, call: AttentionCall, lse: Tensor, *written: Tensor | np.int32
) -> Launch:
    batch, tokens, heads, width = call.q.shape
    (source,) = (name for name, dtype in TYPES.items() if dtype == call.q.dtype)
    plan = backends.cuda_extension.shaped_attention_plan(tokens, width, source == "tf32", backward)
    sizes = map(np.int32, call.q.shape)
    fields = (
        call.q,
        call.k,
        call.v,
        call.gains,
        call.lengths,
        lse,
        *sizes,
        np.float32(call.scale),
        np.bool_(call.causal),
    )
    values = [*fields, *written]
    if not backward:
        values.append(np.int32(plan["slice"]))
    name = "backward" if backward else "forward"
    return start(card, source, name, batch * heads, plan["threads"], plan["shared"], *values)


def _forward(card: Card, call: AttentionCall) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = call.q.shape
    out, lse = layouts.rows_apart(call.q), call.gains.new_empty(batch, heads, tokens)
    start_shaped(card, False, call, lse, out.fill_(torch.nan))
    return out.contiguous(), lse


def _backward(card: Card, call: AttentionInto) -> Tensor:
    batch, _, heads, _ = call.q.shape
    gradients = call.dq, call.dk, call.dv
    apart = [layouts.rows_apart(t) if t.is_contiguous() else t for t in gradients]
    parts = call.gains.new_empty(batch, 3, heads)
    start_shaped(card, True, call, call.lse, call.grad, *apart, parts)
    for out, written in zip(gradients, apart):
        out.copy_(written)
    return parts.sum(0)


@contextlib.contextmanager
def card(sm: int, *, tf32: bool, variant: Variant | None = None) -> Iterator[Card]:
    """Context in which the backend "cuda" runs on a machine; see ptx.card."""
    module = SimpleNamespace()
    served = backends.Backend("attention_on_a_machine", lambda *of_call: None)
    with (
        ptx.card(sm, tf32=tf32, variant=variant) as machine,
        mock.patch.dict(sys.modules, {served.module: module}),
        mock.patch.dict(backends.TABLE["shaped_attention"], cuda=served),
    ):
        module.shaped_attention_fwd = functools.partial(_forward, machine)
        module.shaped_attention_bwd = functools.partial(_backward, machine)
        yield machine
