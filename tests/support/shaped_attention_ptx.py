"""shaped_attention's CUDA C++ kernels as nvcc compiles them, executed by tests/ptx, and what they are compared with."""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from compare import assert_within
from paths import ROOT
from ptx.machine import Code, Launch, Machine
from ptx.memory import GlobalMemory
from ptx.parse import parse
from tf32 import ProductsInTF32

from simplclip.ops import backends
from simplclip.ops.attention import reference as attention_reference
from simplclip.ops.attention.call import AttentionCall, AttentionInto
from simplclip.ops.calls import flat

TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}
TOLERANCE = TYPES | {"tf32": "tf32"}


@dataclass(frozen=True)
class Case:
    type: str
    length: int
    width: int
    causal: bool = False
    lengths: tuple[int, ...] | None = None  # one for each sequence
    batch: int = 1
    heads: int = 1
    scale: float = 0.3


def heads_of(storage: torch.Tensor, index: int, heads: int, width: int) -> torch.Tensor:
    """Returns [B, L, H, K], a view of block `index` of a product's columns."""
    return storage.unflatten(2, (-1, heads, width))[:, :, index]


def nan(case: Case, blocks: int) -> torch.Tensor:
    """Returns NaN rows of `blocks` blocks of heads and one unused block, so that strides are not products of sizes."""
    shape = case.batch, case.length, (blocks + 1) * case.heads * case.width
    return torch.full(shape, torch.nan, dtype=TYPES[case.type])


def inputs(case: Case) -> dict:
    """Returns inputs: q and k are views of one product, and padded tokens hold NaN."""
    g = torch.Generator().manual_seed(case.length * 1000 + case.width)
    shape = case.batch, case.length, case.heads, case.width
    product, x, grads = nan(case, 2), nan(case, 1), nan(case, 1)
    tensors = {
        "q": heads_of(product, 0, case.heads, case.width),
        "k": heads_of(product, 1, case.heads, case.width),
        "v": heads_of(x, 0, case.heads, case.width),
        "grad": heads_of(grads, 0, case.heads, case.width),
    }
    lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(shape, generator=g))
        for b, length in enumerate(case.lengths or ()):
            tensor[b, length:] = torch.nan
    gains = 0.7 + torch.rand(3, case.heads, generator=g)
    return tensors | {"gains": gains, "lengths": lengths}


def by_reference(case: Case, given: dict, dtype: torch.dtype) -> dict:
    q, k, v, grad, gains = (given[name].to(dtype) for name in ("q", "k", "v", "grad", "gains"))
    mode = given["lengths"], case.scale, case.causal
    with mock.patch.object(attention_reference, "accumulate_dtype", return_value=dtype):
        call = AttentionCall(q, k, v, gains, *mode)
        out, lse = attention_reference.shaped_attention_fwd(call)
        grads = [torch.empty_like(q) for _ in range(3)]
        d_gains = attention_reference.shaped_attention_bwd(AttentionInto(*flat(call), grad, lse, grad.new_empty(0), *grads))
    return results(out, lse, *grads, d_gains)


def results(out, lse, dq, dk, dv, d_gains) -> dict:
    tensors = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return tensors | dict(zip(("dalpha", "dbeta", "dgamma"), d_gains))


def plain(case: Case, given: dict) -> dict:
    with ProductsInTF32() if case.type == "tf32" else contextlib.nullcontext():
        return by_reference(case, given, TYPES[case.type])


def nvcc() -> str | None:
    """Returns the compiler on the path, or PyPI's beside torch."""
    packaged = sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*/bin/nvcc"))
    return shutil.which("nvcc") or (str(packaged[-1]) if packaged else None)


def why_not() -> str | None:
    if nvcc() is None:
        return "nvcc was not found"
    return backends.cuda_extension_error  # the extension plans the launches


@functools.cache
def compiled(source: str, sm: int) -> dict[str, Code]:
    """Returns the kernels of a file of csrc/cuda/attention, compiled with the extension's flags."""
    (flags,) = re.findall(r'"nvcc": (\[.*?\])', (ROOT / "setup.py").read_text())
    with tempfile.NamedTemporaryFile(suffix=".ptx") as out:
        target = f"-gencode=arch=compute_{sm},code=sm_{sm}"
        command = [
            nvcc(),
            "-ptx",
            "-lineinfo",
            *ast.literal_eval(flags),
            target,
            f"csrc/cuda/attention/{source}.cu",
            "-o",
            out.name,
        ]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        kernels = parse(Path(out.name).read_text())
    return {name: Code(kernel) for name, kernel in kernels.items()}


def start(source: str, sm: int, name: str, programs: int, threads: int, shared: int, tensors: list, *values: object) -> None:
    """Runs the kernel whose name contains `name`. values: its parameters in the layout of attention.h."""
    (code,) = (code for kernel, code in compiled(source, sm).items() if name in kernel)
    memory, machine = GlobalMemory(tensors, code.granules["global"]), Machine()
    fields = b"".join(_bytes(value, memory) for value in values)
    parameters = np.zeros(code.kernel.parameter_bytes, np.uint8)
    assert 0 <= len(parameters) - len(fields) < 8, (len(parameters), len(fields))
    parameters[: len(fields)] = np.frombuffer(fields, np.uint8)
    machine.run(Launch(code, programs, threads, shared, parameters, memory))
    memory.write_back()
    assert not machine.hazards, "\n".join(map(str, machine.hazards.values()))


def _bytes(value: object, memory: GlobalMemory) -> bytes:
    """Returns a field: HeadsView of a tensor [B, L, H, K], a pointer, a float, an int, or bytes as they are."""
    if value is None:
        return bytes(8)
    if isinstance(value, torch.Tensor):
        strides = [step * value.element_size() for step in value.stride()[:3]] if value.dim() == 4 else []
        return struct.pack(f"<{1 + len(strides)}q", memory.address(value), *strides)
    return value if isinstance(value, bytes) else struct.pack("<f" if isinstance(value, float) else "<i", value)


def execute(case: Case, given: dict, sm: int = 86) -> dict:
    """Runs the kernels on outputs that hold NaN."""
    storage = nan(case, 1), nan(case, 2), nan(case, 1)
    out, dq, dk, dv = (heads_of(storage[i], j, case.heads, case.width) for i, j in ((0, 0), (1, 0), (1, 1), (2, 0)))
    lse = torch.full((case.batch, case.heads, case.length), torch.nan)
    parts, d_gains = torch.full((case.batch, 3, case.heads), torch.nan), torch.full((3, case.heads), torch.nan)
    q, k, v, grad, gains, lengths = (given[name] for name in ("q", "k", "v", "grad", "gains", "lengths"))
    common = [q, k, v, gains, *([] if lengths is None else [lengths]), lse]
    sizes = case.batch, case.length, case.heads, case.width, float(case.scale), struct.pack("<?3x", case.causal)
    fields = q, k, v, gains, lengths, lse, *sizes
    blocks, wide = case.batch * case.heads, case.type == "tf32"
    plan = backends.cuda_extension.shaped_attention_plan(case.length, case.width, wide, False)
    start(case.type, sm, "forward", blocks, plan["threads"], plan["shared"], [*common, out], *fields, out, plan["slice"])
    plan = backends.cuda_extension.shaped_attention_plan(case.length, case.width, wide, True)
    written = grad, dq, dk, dv, parts
    start(case.type, sm, "backward", blocks, plan["threads"], plan["shared"], [*common, *written], *fields, *written)
    start("gains", sm, "gains", 3 * case.heads, 32, 0, [parts, d_gains], parts, d_gains, case.batch, 3 * case.heads)
    return results(out, lse, dq, dk, dv, d_gains)


def check(case: Case, sm: int = 86) -> None:
    given = inputs(case)
    found = execute(case, given, sm)
    truth = by_reference(case, given, torch.float64)
    for name, value in found.items():
        assert value.isfinite().all(), f"{case}: {name} is not finite"
    # A lone key's dq is 0. dalpha and dbeta are sums over all tokens and columns that may nearly cancel: their error is
    # relative to a sum of terms with random signs.
    tokens = sum(case.lengths) if case.lengths else case.batch * case.length
    compared = found, plain(case, given), truth
    sums = [{name: result.pop(name) for name in ("dalpha", "dbeta")} for result in compared]
    assert_within(*compared, TOLERANCE[case.type], str(case), least=0.01)
    assert_within(*sums, TOLERANCE[case.type], str(case), least=(tokens * case.width) ** 0.5)
