"""The specialisations of every Triton kernel that are compiled and gated, by op."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simplclip.kernels import tuning
from simplclip.kernels.attention import launch as attention
from simplclip.kernels.attention.terms import Heads
from simplclip.kernels.mlp import launch as mlp
from simplclip.kernels.mlp.activations import ACTIVATIONS
from simplclip.kernels.runtime import COMPILE
from simplclip.kernels.similarity.blocks import RANGE
from simplclip.kernels.similarity.gradient import (
    _similarity_gradient_kernel,
    _similarity_range_kernel,
)
from simplclip.kernels.similarity.launch import DIAGONAL, MERGE, MERGE_WARPS
from simplclip.kernels.similarity.plan import PARTS, ROW_SLOTS, Tiling
from simplclip.kernels.similarity.sigmoid import _similarity_sigmoid_kernel
from simplclip.kernels.similarity.statistics import (
    _similarity_diagonal_kernel,
    _similarity_merge_kernel,
    _similarity_statistics_kernel,
)

DTYPES = {
    "bfloat16": ("bf16", "half"),
    "float16": ("fp16", "half"),
    "tf32": ("fp32", "tf32"),
    "float32": ("fp32", "ieee"),
}
# Types of arguments by name, where "element" is the kernel's dtype; a name that is not listed is an
# integer.
_TYPES = {
    **dict.fromkeys(("image", "text", "teacher_image", "teacher_text", "out"), "*element"),
    **dict.fromkeys(("scale", "teacher_scale", "plane", "sigmoids", "factor"), "*fp32"),
    **dict.fromkeys(("rows", "columns", "grad_rows", "grad_columns"), "*fp32"),
    **dict.fromkeys(("row_parts", "column_parts", "parts", "sums"), "*fp32"),
    **dict.fromkeys(("ids", "text_ids"), "*i64"),
    "entropy": "fp32",
}
# Arguments that are multiples of 16 in any call that tables are made for, like the strides.
_ALIGNED = {"width", "teacher_width", "hidden", "count"}
_ALIGNED |= {f"{name}_stride" for name in ("out", "h", "weight", "grad")}


@dataclass
class Kernel:
    """A specialisation to compile."""

    function: object
    constants: dict[str, object]  # by argument; None stands for a tensor that is not given
    tile: tuning.Tile
    dtype: str
    matrices: str = ""
    tensor_cores: bool = True
    types: dict[str, str | tuple] = field(default_factory=dict)  # override the types in the table

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def options(self) -> dict[str, int | bool | None]:
        """With which it is compiled."""
        return {
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
            "maxnreg": self.tile.registers,
            **COMPILE,
        }


class Form(NamedTuple):
    """The parts of a call that make other kernels of it."""

    teacher: bool
    plane: bool
    columns: bool
    ids: bool
    even: bool  # whether D and D̂ are multiples of the tile

    def __str__(self) -> str:
        parts = (
            "+teacher" * self.teacher,
            "+plane" * self.plane,
            "+ids" * self.ids,
            " rows" * (not self.columns),
        )
        return "".join(("Z", *parts, " odd D" * (not self.even)))


SIMPLEST = Form(teacher=False, plane=False, columns=True, ids=False, even=True)


def forms(everything: bool) -> list[Form]:
    """Returns all forms, or only those that fill the registers most and the simplest."""
    every = [Form(*flags) for flags in itertools.product((True, False), repeat=5)]
    # the op has a sweep of its own for the plane then
    every = [form for form in every if not (form.teacher and form.plane)]
    if everything:
        return every
    return [form for form in every if form.ids and not form.even] + [SIMPLEST]


def absent(names: str, missing: bool) -> dict[str, None]:
    """Returns these arguments as constants if they are missing."""
    return dict.fromkeys(names.split()) if missing else {}


def tiling(tile: tuning.Tile, even: bool, precision: str) -> Tiling:
    return Tiling(*tile[:3], even, "tf32" if precision == "tf32" else "ieee")


def similarity(
    form: Form, dtype: str, architecture: int, backward: bool, tile: tuning.Tile | None = None
) -> Kernel:
    """Returns the large kernel of a form. tile: replaces the tile of the table."""
    precision = DTYPES[dtype][1]
    kernel = "gradient" if backward else "statistics"
    parts = [part for part in PARTS if getattr(form, part)]
    tile = tile or tuning.lookup(precision, architecture, kernel, *parts)
    constants = {"TILE": tiling(tile, form.even, precision), **absent("ids text_ids", not form.ids)}
    constants |= absent("teacher_image teacher_text teacher_scale", not form.teacher) | absent(
        "plane", not form.plane
    )
    if backward:
        function = _similarity_gradient_kernel
        constants |= absent("columns grad_columns", not form.columns) | absent(
            "factor", dtype != "float16"
        )
    else:
        function = _similarity_statistics_kernel
        constants |= {"ROW_SLOTS": ROW_SLOTS, "COLUMN_SLOTS": 5 if form.teacher else 2}
        constants |= absent("column_parts", not form.columns)
    return Kernel(function, constants, tile, dtype, str(form))


def sigmoid_kernels(dtype: str, architecture: int, everything: bool) -> Iterator[Kernel]:
    """Yields kernels of one and two terms, with gradients or not."""
    precision = DTYPES[dtype][1]
    for terms, gradient, ids, even in itertools.product(
        (1, 2), (True, False), (True, False), (True, False)
    ):
        if everything or (ids and not even):
            tile = tuning.lookup(precision, architecture, "sigmoid", *["ids"] * ids)
            constants = {"TERMS": terms, "GRADIENT": gradient}
            constants |= {"TILE": tiling(tile, even, precision), **absent("ids text_ids", not ids)}
            constants |= absent("factor", not gradient or dtype != "float16")
            what = f"{terms} terms" + "+ids" * ids + " gradient" * gradient + " odd D" * (not even)
            yield Kernel(_similarity_sigmoid_kernel, constants, tile, dtype, what)


def small_kernels(dtype: str) -> Iterator[Kernel]:
    tile, types = tuning.Tile(0, 0, 0, 4, 3), {"out": "*fp32"}
    eight = tile._replace(warps=8)
    for of_rows in (True, False):
        constants = {"SLOTS": ROW_SLOTS if of_rows else 5, "HAS_TEACHER": True, **MERGE}
        constants |= {"HAS_PLANE": of_rows, "PREVIOUS": not of_rows}
        what = "rows" if of_rows else "columns", False, types
        merge = tile._replace(warps=MERGE_WARPS)
        yield Kernel(_similarity_merge_kernel, constants, merge, "float32", *what)
    for terms in (0, 2):
        constants = {"HAS_TEACHER": True, "TERMS": terms, **RANGE, **absent("sigmoids", not terms)}
        constants |= absent("scale plane grad_rows grad_columns", terms > 0)
        what = f"{terms} terms", False, types
        yield Kernel(_similarity_range_kernel, constants, eight, "float32", *what)
    yield Kernel(_similarity_diagonal_kernel, dict(DIAGONAL), tile, dtype, "", False)


def products(tile: tuning.Tile, precision: str) -> dict[str, object]:
    """Returns constants of the MLP's product: its precision and its tile."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return {"PRECISION": "tf32" if precision == "tf32" else "ieee", **blocks}


def mlp_kernels(
    dtype: str,
    architecture: int,
    acts: tuple[str, ...] = ("gelu",),
    even: tuple[bool, ...] = (True, False),
) -> Iterator[Kernel]:
    """Yields kernels for a C that is a multiple of a block, and for other C."""
    precision = DTYPES[dtype][1]
    types = dict.fromkeys(("h", "activated", "weight", "grad"), "*element")
    tile = tuning.lookup(precision, architecture, "parallel_mlp")
    for act in acts:
        activate, constants = mlp._parallel_mlp_activate_kernel, {"ACT": act, "BLOCK": mlp.BLOCK}
        yield Kernel(activate, constants, tuning.Tile(0, 0, 0, 4, 3), dtype, act, False, types)
        for whole in even:
            constants = {"ACT": act, "EVEN": whole, **products(tile, precision)}
            what = act + " odd C" * (not whole), True, types
            yield Kernel(mlp._parallel_mlp_hidden_kernel, constants, tile, dtype, *what)


def attention_kernels(dtype: str) -> Iterator[Kernel]:
    """Yields kernels for the widths of CLIP's heads."""
    heads = Heads("*element", *3 * ["i32"])
    names = ("v", "av", "out", "grad", "q_grad", "k_grad", "v_grad", "dq", "dk", "dv")
    types = {**dict.fromkeys(names, heads), "gains": "*fp32", "lengths": "*i32", "sign": "fp32"}
    for width, causal in itertools.product((64, 128), (False, True)):
        blocks = attention.tile(width)
        constants = {"CAUSAL": causal, "ROWS": blocks["ROWS"], "COLUMNS": blocks["COLUMNS"]}
        for function in (
            attention._shaped_attention_terms_kernel,
            attention._shaped_attention_gradients_kernel,
        ):
            tile = tuning.Tile(0, 0, 0, attention.WARPS, 3)
            what = f"K={width}" + " causal" * causal, False, types
            yield Kernel(function, constants, tile, dtype, *what)


def compile_kernel(kernel: Kernel, architecture: int):
    element = DTYPES.get(kernel.dtype, ("fp32",))[0]
    signature = {}
    constants = {}
    attributes = {}
    for place, name in enumerate(kernel.function.arg_names):
        if name in kernel.constants:
            signature[name], constants[name] = "constexpr", kernel.constants[name]
            continue
        kind = {**_TYPES, **kernel.types}.get(name, "i32")
        if isinstance(kind, tuple):  # a tuple of pointers
            signature[name] = type(kind)(
                *(each.replace("element", element) if each else "constexpr" for each in kind)
            )
            constants |= {(place, at): None for at, each in enumerate(kind) if each is None}
            attributes |= {
                (place, at): [["tt.divisibility", 16]] for at, each in enumerate(kind) if each
            }
            continue
        signature[name] = kind.replace("element", element)
        if signature[name].startswith("*") or name in _ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=kernel.options,
    )


def kernels(dtype: str, architecture: int, everything: bool) -> Iterator[Kernel]:
    for form, backward in itertools.product(forms(everything), (False, True)):
        yield similarity(form, dtype, architecture, backward)
    yield from sigmoid_kernels(dtype, architecture, everything)
    yield from small_kernels(dtype)
    if dtype != "tf32":
        yield from attention_kernels(dtype)
    yield from mlp_kernels(dtype, architecture, ACTIVATIONS if everything else ("gelu",))
