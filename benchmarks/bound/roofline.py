"""The roofline of a trace: a kernel takes the longest of its products, its bytes and a launch; a call takes the sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.bound.cards import Card
from benchmarks.bound.trace import Stand, Step

LAUNCH_MS = 2e-3  # assumed: the least that a kernel takes on the device
CUDA_PRODUCTS = {"shaped_attention_fwd": 2, "shaped_attention_bwd": 5}  # of [L, L, K] for each head


def work(step: Step) -> tuple[int, int]:
    """Returns the multiply-adds of a kernel's matrix products, and its bytes of memory, in which each tensor counts once."""
    moved = sum(size for _, size in (*step.read, *step.operands, *step.written))
    if step.kind == "torch":
        return step.multiply_adds, moved
    if step.kind == "cuda":
        batch, length, heads, width = step.launch.call.q.shape
        return CUDA_PRODUCTS[step.launch.op] * batch * heads * length**2 * width, moved
    launch = step.launch
    given = {**dict(zip(launch.kernel.arg_names, launch.args)), **launch.options}
    if step.name == "parallel_mlp_hidden":
        return math.prod(given["grad"].shape) * given["h"].shape[1], _bytes(given)
    if "TILE" not in given:
        return 0, _bytes(given)
    # A kernel of similarities: forward takes some rows of the matrix, backward a block of it, which it may write.
    if "row_count" in given:
        rows, columns = given["row_count"], given["m"]
    else:
        rows, columns = (given[f"{side}_blocks"] * size for side, size in zip(("row", "column"), _tile(given)))
    width, itemsize = given["width"] + given.get("teacher_width", 0), given["image"].itemsize
    written = itemsize * rows * columns if math.prod(getattr(given.get("out"), "shape", (0,))) else 0
    return rows * columns * width, itemsize * (rows + columns) * width + written


def _tile(given: dict) -> tuple[int, int]:
    return given["TILE"].BLOCK_M, given["TILE"].BLOCK_N


def _bytes(given: dict) -> int:
    return sum(t.touched()[1] for t in tree_leaves(list(given.values())) if isinstance(t, Stand))


def peak(card: Card, dtype: torch.dtype | None) -> float:
    """Returns the vendor's TFLOP/s of products; of float32 as torch is set to compute them."""
    if dtype == torch.float32:
        return card.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else card.float32
    return card.half


def roofline(steps: Sequence[Step], card: Card) -> tuple[list[dict], dict]:
    """Returns a row for each name of a kernel, the slowest first; and the columns of the whole call."""
    rows: dict[tuple[str, str], dict] = {}
    bounds = dict.fromkeys(("products", "bytes", "launches"), 0.0)
    for step in (step for step in steps if step.kind != "host"):
        multiply_adds, moved = work(step)
        times = (2 * multiply_adds / peak(card, step.dtype) / 1e9, moved / card.bandwidth / 1e6, LAUNCH_MS)
        bounds[max(zip(times, bounds))[1]] += max(times)
        zero = {"kernel": step.name, "by": step.kind, "launches": 0, "ms": 0.0, "gflop": 0.0, "mb": 0.0}
        row = rows.setdefault((step.kind, step.name), zero)
        row["launches"] += 1
        row["ms"] += max(times)
        row["gflop"] += 2e-9 * multiply_adds
        row["mb"] += moved / 1e6
    kernels = sorted(rows.values(), key=lambda row: -row["ms"])
    launches = sum(row["launches"] for row in kernels)
    own = sum(row["launches"] for row in kernels if row["by"] != "torch")
    return kernels, {
        "predicted_ms": round(sum(bounds.values()), 4),
        "bound": max(bounds, key=lambda name: bounds[name]),
        "tflop": round(sum(row["gflop"] for row in kernels) / 1e3, 4),
        "bytes": round(1e6 * sum(row["mb"] for row in kernels)),
        "launches": launches,
        "own_kernels": own,
        "torch_kernels": launches - own,
        "host_copies": sum(step.kind == "host" for step in steps),
    }
