"""Prints as JSON what benchmarks.bound finds for a product of 96 x 160 x 64 in Triton, to which a vector is added."""

import json

import torch
import triton
import triton.language as tl

from benchmarks.bound import machine, predict, trace
from benchmarks.bound.cards import CARDS
from simplclip.kernels.launch import launch

M, N, K, TILE, DEPTH = 96, 160, 64, 32, 16


@triton.jit
def _product_kernel(a, b, out, bias, k, m: tl.constexpr, n: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(0) % (m // TILE) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) // (m // TILE) * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    tile = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, k, DEPTH):
        left = tl.load(a + row[:, None] * k + first + depth[None, :])
        tile = tl.dot(left, tl.load(b + (first + depth)[:, None] * n + column[None, :]), tile)
    tile += tl.load(bias + row)[:, None]
    tl.store(out + row[:, None] * n + column[None, :], tile.to(out.dtype.element_ty))


def run(card: str) -> dict:
    with trace.on_card(CARDS[card]) as found:
        a, b, out = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((M, K), (K, N), (M, N)))
        bias = torch.empty(M, device="cuda")
        arguments = {"m": M, "n": N, "TILE": TILE, "DEPTH": DEPTH, "num_warps": 4, "num_stages": 2}
        launch(_product_kernel, M // TILE * (N // TILE), a, b, out, bias, K, **arguments)
        total = torch.zeros(M, K, dtype=torch.float32, device="cuda")
        total.addmm_(out.float(), b.float().T)
        total.copy_(torch.ones(M, K))
    predictor = predict.Predictor(card)
    rows = predict.predict(found.steps, predictor)
    made, work = next(iter(predictor.kernels.values()))[2:4]
    return {
        **predict.summary(rows, found.steps, predictor.card, torch.bfloat16),
        "asked": [size for _, size in sorted(work.asked["read"].items())],
        "stored": sum(work.asked["written"].values()),
        "multiply_adds": sum(part.multiply_adds for part in work.executed) * made.warps * (M // TILE) * (N // TILE),
        "tensor": machine.gate.spills_and_tensor_cores(list(made.code.all.elements()))[1],
    }


if __name__ == "__main__":
    print(json.dumps([run(card) for card in ("rtx-3090", "h100")]))
