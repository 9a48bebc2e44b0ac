"""Calls of shaped_attention's CUDA kernels under the emulator, and the results that they are compared with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import torch
from compare import assert_within
from torch.overrides import TorchFunctionMode

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


class ProductsInTF32(TorchFunctionMode):
    """A mode that rounds the operands of products, as plain torch's products in TF32 do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            args = [((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for t in args]
        return function(*args, **(kwargs or {}))


def plain(case: Case, given: dict) -> dict:
    with ProductsInTF32() if case.type == "tf32" else contextlib.nullcontext():
        return by_reference(case, given, TYPES[case.type])


def strides(*tensors: torch.Tensor) -> torch.Tensor:
    """Returns addresses and strides in bytes, as the emulated functions take them."""
    return torch.tensor([[t.data_ptr(), *(s * t.element_size() for s in t.stride()[:3])] for t in tensors])


def emulate(kernels, case: Case, given: dict, seed: int) -> dict:
    """Runs the kernels on outputs that hold NaN, and checks that memory beyond the outputs still holds NaN."""
    sizes = torch.tensor([case.batch, case.length, case.heads, case.width], dtype=torch.int32)
    q, k, v, grad, gains, lengths = (given[name] for name in ("q", "k", "v", "grad", "gains", "lengths"))
    storage = nan(case, 1), nan(case, 2), nan(case, 1)
    out, dq, dk, dv = (heads_of(storage[i], j, case.heads, case.width) for i, j in ((0, 0), (1, 0), (1, 1), (2, 0)))
    lse = torch.full((case.batch, case.heads, case.length), torch.nan)
    parts, d_gains = torch.full((case.batch, 3, case.heads), torch.nan), torch.full((3, case.heads), torch.nan)
    mode = case.scale, case.causal
    replays = kernels.forward(case.type, strides(q, k, v, out), gains, lengths, lse, sizes, *mode, seed)
    tensors = strides(q, k, v, grad, dq, dk, dv)
    replays += kernels.backward(case.type, tensors, gains, lengths, lse, sizes, *mode, parts, seed)
    kernels.sum_gains(parts, d_gains, case.batch, 3 * case.heads, seed)
    for whole in storage:
        assert whole[:, :, -case.heads * case.width :].isnan().all(), "wrote beyond a row"
    assert replays == 0, f"{case}: bank conflicts of ldmatrix cost {replays} replays"
    return results(out, lse, dq, dk, dv, d_gains)


def check(kernels, case: Case, seeds=(0, 1)) -> None:
    given = inputs(case)
    runs = [emulate(kernels, case, given, seed) for seed in seeds]
    for seed, other in zip(seeds[1:], runs[1:]):
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), f"{case}: {name} differs with seed {seed}"
    truth = by_reference(case, given, torch.float64)
    for name, value in runs[0].items():
        assert value.isfinite().all(), f"{case}: {name} is not finite"
    # A lone key's dq is 0. dalpha and dbeta are sums over all tokens and columns that may nearly cancel: their error is
    # relative to a sum of terms with random signs.
    tokens = sum(case.lengths) if case.lengths else case.batch * case.length
    compared = runs[0], plain(case, given), truth
    sums = [{name: result.pop(name) for name in ("dalpha", "dbeta")} for result in compared]
    assert_within(*compared, TOLERANCE[case.type], str(case), least=0.01)
    assert_within(*sums, TOLERANCE[case.type], str(case), least=(tokens * case.width) ** 0.5)
