"""The specialisations of every Triton kernel that are compiled and gated, by op."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simplclip.kernels import tuning
from simplclip.kernels.attention import op as attention
from simplclip.kernels.launch import COMPILE
from simplclip.kernels.mlp import op as mlp
from simplclip.kernels.mlp.activations import ACTIVATIONS
from simplclip.kernels.similarity.backward import (
    _similarity_factors_kernel,
    _similarity_gradient_kernel,
    _similarity_kept_kernel,
)
from simplclip.kernels.similarity.forward import _similarity_statistics_kernel
from simplclip.kernels.similarity.gradients import RANGE, _similarity_range_kernel
from simplclip.kernels.similarity.launch import Launch, Slots, Tiling
from simplclip.kernels.similarity.merge import _similarity_diagonal_kernel, _similarity_merge_kernel
from simplclip.kernels.similarity.op import DIAGONAL, GROUP, KEPT, MERGE, MERGE_WARPS, NEAR
from simplclip.kernels.similarity.sigmoid import _similarity_sigmoid_kernel
from simplclip.kernels.similarity.terms import BLOCK as TERMS_BLOCK
from simplclip.kernels.similarity.terms import _similarity_terms_kernel
from simplclip.kernels.similarity.tile import Pairs, Sigmoids

DTYPES = {"bfloat16": ("bf16", "half"), "float16": ("fp16", "half"), "tf32": ("fp32", "tf32"), "float32": ("fp32", "ieee")}
# Types of arguments by name, where "element" is the kernel's dtype; a name that is not listed is an integer.
_TYPES = {
    **dict.fromkeys(("image", "text", "teacher_image", "teacher_text", "projected_image", "projected_text"), "*element"),
    **dict.fromkeys(("out", "student", "d_student"), "*element"),
    **dict.fromkeys(("scale", "teacher_scale", "cross_scale", "row_parts"), "*fp32"),
    **dict.fromkeys(
        ("column_parts", "rows", "columns", "grad_rows", "grad_columns", "factors", "factor", "sums", "parts"), "*fp32"
    ),
    **dict.fromkeys(("inv_norms", "grad"), "*fp32"),
    "teacher": "*fp16",  # stored features
    "entropy": "fp32",
    "kept": "*bf16",  # *fp32 if the kernel's dtype is float32
    "positives": "*fp32",
}
# Arguments that are multiples of 16 in any call that tables are made for, like the strides.
_ALIGNED = ("d", "width", "teacher_width", "hidden", "kept_stride")
_ALIGNED += ("out_stride", "matrix_stride", "h_stride", "weight_stride", "grad_stride")


@dataclass
class Kernel:
    """A specialisation to compile. constants: by argument name; None stands for a tensor that is not given."""

    name: str
    function: object
    constants: dict[str, object]
    tile: tuning.Tile
    dtype: str
    matrices: str = ""
    tensor_cores: bool = True
    types: dict[str, str | tuple] = field(default_factory=dict)  # override the types in the table


# letters of the formulas, for a column of the table
MATRICES = {"Z": "HAS_STUDENT", "T": "HAS_TEACHER", "U": "HAS_IMAGE_TO_TEACHER", "V": "HAS_TEACHER_TO_TEXT"}


def launches(everything: bool) -> list[Launch]:
    """Returns launches by flags: all that simplclip.kernels.similarity.launch.launches can return, or only the heaviest."""
    flags = list(itertools.product((True, False), repeat=2)) if everything else [(True, True)]  # columns, ids
    found = []
    cross = {"HAS_IMAGE_TO_TEACHER": True}
    for columns, ids in flags:
        both = {"COLUMNS": columns, "DROP_IDS": ids}
        for terms in ({"SIGMOIDS": 1}, {"SIGMOIDS": 2}, {"SIGMOIDS": 2, "HAS_SHARES": ids}):
            found.append(Launch(HAS_STUDENT=True, **terms, **both))
        if ids:
            found.append(Launch(HAS_STUDENT=True, SIGMOIDS=2, HAS_SHARES=True, COLUMNS=columns))
        found.append(Launch(HAS_STUDENT=True, **both))
        found.append(Launch(HAS_STUDENT=True, RELATIONAL=True, **both))
        found.append(Launch(HAS_STUDENT=True, **cross, RELATIONAL=True, **both))
        found += [Launch(**cross, **both), Launch(HAS_STUDENT=True, DROP_IDS=ids)]
    return list(dict.fromkeys(found))


def has_ids(launch: Launch) -> bool:
    return launch.DROP_IDS or launch.HAS_SHARES


def absent(launch: Launch) -> dict[str, None]:
    """Returns the arguments that are missing in a call with this launch alone."""
    names = []
    if not launch.HAS_STUDENT:
        names += ["image", "text", "scale"]
    if not launch.HAS_TEACHER:
        names += ["teacher_image", "teacher_text", "teacher_scale"]
    if not launch.HAS_IMAGE_TO_TEACHER:
        names += ["projected_image", "projected_text", "cross_scale"]
    return dict.fromkeys(names)


def of_pairs(ids: bool, shares: bool) -> dict[str, tuple]:
    """Returns the types of the argument `pairs`; None stands for a tensor that is not given."""
    return {"pairs": Pairs(*2 * ["*i64" if ids else None], *2 * ["*fp32" if shares else None])}


def of_sigmoids(given: bool) -> dict[str, tuple]:
    return {"sigmoids": Sigmoids(*4 * ["*fp32" if given else None])}


def similarity(
    launch: Launch,
    dtype: str,
    architecture: int,
    backward: bool,
    tile: tuning.Tile | None = None,
    even: bool = True,
    attend: bool = False,
    kept: bool = False,
) -> Kernel:
    """Returns a launch's large kernel. tile: replaces the tile of the table."""
    precision = DTYPES[dtype][1]
    tile = tile or tuning.lookup(*launch.entry(backward, kept), precision, architecture)
    tiling = Tiling(*tile[:3], even, even, "tf32" if precision == "tf32" else "ieee", INTERPRETED=False)
    constants = {**absent(launch), "LAUNCH": launch, "TILE": tiling}
    if backward:
        constants |= {
            "ATTEND": attend,
            "KEPT": kept,
            **({"factors": None} if launch.HAS_TEACHER else {}),
            **({} if dtype == "float16" else {"factor": None}),
        }
    else:
        constants |= {} if kept else {"kept": None, "positives": None}
        constants |= {"SLOTS": Slots.of(launch), "GROUP": GROUP, **({} if launch.COLUMNS else {"column_parts": None})}
    what = "".join(letter for letter, name in MATRICES.items() if getattr(launch, name))
    what += f"+{launch.SIGMOIDS} sigmoids" * (launch.SIGMOIDS > 0) + "+shares" * launch.HAS_SHARES + "+ids" * has_ids(launch)
    what += "" if launch.COLUMNS or launch.HAS_IMAGE_TO_TEACHER else " attend" if attend else " rows"
    function = _similarity_gradient_kernel if backward else _similarity_statistics_kernel
    types = of_pairs(has_ids(launch), launch.HAS_SHARES) | of_sigmoids(launch.SIGMOIDS > 0)
    return Kernel(function.__name__, function, constants, tile, dtype, what if even else what + " odd D", types=types)


def sigmoid_kernels(dtype: str, architecture: int) -> Iterator[Kernel]:
    """Yields kernels of one and two terms; without ids, with ids that drop out or are positives; with gradients or not."""
    precision = DTYPES[dtype][1]
    for terms, ids, gradient in itertools.product((1, 2), ("", "+ids", "+positives"), (True, False)):
        tile = tuning.lookup("similarity_sigmoid", terms, precision, architecture)
        missing = [] if gradient and dtype == "float16" else ["factor"]
        tiling = Tiling(*tile[:3], True, True, "tf32" if precision == "tf32" else "ieee", INTERPRETED=False)
        constants = {"TERMS": terms, "GRADIENT": gradient, "TILE": tiling, **dict.fromkeys(missing)}
        function = _similarity_sigmoid_kernel
        what = f"{terms} terms{ids}" + " gradient" * gradient
        types = {"mix": "*fp32", **of_sigmoids(True), **of_pairs(bool(ids), ids == "+positives")}
        yield Kernel(function.__name__, function, constants, tile, dtype, what, types=types)


def small_kernels(dtype: str) -> Iterator[Kernel]:
    everything = next(launch for launch in launches(False) if launch.tiles == 4 and launch.COLUMNS)
    tile = tuning.Tile(0, 0, 0, 4, 1, 1)
    for of_rows in (True, False):
        constants = {"LAUNCH": everything, "SLOTS": Slots.of(everything), "OF_ROWS": of_rows, **MERGE}
        yield Kernel(
            "_similarity_merge_kernel", _similarity_merge_kernel, constants, tile._replace(warps=MERGE_WARPS), "float32",
            "rows" if of_rows else "columns", False, {"out": "*fp32"},
        )  # fmt: skip
    near = {"COLUMNS": True, "ATTEND": False, "KEPT": True, **NEAR}
    yield Kernel(
        "_similarity_factors_kernel", _similarity_factors_kernel, near, tile._replace(warps=8), "float32", "L", False,
        {"out": "*fp32"},
    )  # fmt: skip
    constants = {"LAUNCH": dataclasses.replace(everything, SIGMOIDS=2), "mix": None, **RANGE}
    yield Kernel(
        "_similarity_range_kernel", _similarity_range_kernel, constants, tile._replace(warps=8), "float32", "ZTUV", False,
        {"out": "*fp32", **of_sigmoids(True), **of_pairs(False, True)},
    )  # fmt: skip
    for of_terms in ({"grad": None, "grad_rows": None, "grad_columns": None}, {}):
        constants = {"SIGMOIDS": 2, "BLOCK": TERMS_BLOCK, "INTERPRETED": False, **of_terms}
        yield Kernel(
            "_similarity_terms_kernel", _similarity_terms_kernel, constants, tile, "float32", "" if of_terms else "gradient",
            False, {"out": "*fp32", "margin": "fp32"},
        )  # fmt: skip
    kept = {"COLUMNS": True, "INTERPRETED": False, **KEPT, **({} if dtype == "float16" else {"factor": None})}
    yield Kernel("_similarity_kept_kernel", _similarity_kept_kernel, kept, tile, dtype, "Z", False)
    yield Kernel(
        "_similarity_diagonal_kernel", _similarity_diagonal_kernel, dict(DIAGONAL), tile, dtype, "L", False, {"out": "*fp32"}
    )


def products(tile: tuning.Tile, precision: str) -> dict[str, object]:
    """Returns constants of the MLP's product: its precision and its tile."""
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    return {"PRECISION": "tf32" if precision == "tf32" else "ieee", "INTERPRETED": False, **blocks}


def mlp_kernels(
    dtype: str, architecture: int, acts: tuple[str, ...] = ("gelu",), even: tuple[bool, ...] = (True, False)
) -> Iterator[Kernel]:
    """Yields kernels for a C that is a multiple of a block, and for other C."""
    precision = DTYPES[dtype][1]
    types = dict.fromkeys(("h", "activated", "weight", "grad"), "*element")
    tile = tuning.lookup("parallel_mlp_hidden", 1, precision, architecture)
    for act in acts:
        function, constants = mlp._parallel_mlp_activate_kernel, {"ACT": act, "INTERPRETED": False, "BLOCK": mlp.BLOCK}
        yield Kernel(function.__name__, function, constants, tuning.Tile(0, 0, 0, 4, 3), dtype, act, False, types)
        function = mlp._parallel_mlp_hidden_kernel
        for whole in even:
            constants = {"ACT": act, "EVEN": whole, "GROUP": mlp.GROUP, **products(tile, precision)}
            yield Kernel(function.__name__, function, constants, tile, dtype, act + " odd C" * (not whole), types=types)


def attention_kernels(dtype: str) -> Iterator[Kernel]:
    """Yields kernels for the widths of CLIP's heads."""
    heads = attention.Heads("*element", *3 * ["i32"])
    names = ("v", "av", "out", "grad", "q_grad", "k_grad", "v_grad", "dq", "dk", "dv")
    types = {**dict.fromkeys(names, heads), "gains": "*fp32", "lengths": "*i32", "sign": "fp32"}
    for width, causal in itertools.product((64, 128), (False, True)):
        blocks = attention.tile(width)
        constants = {"CAUSAL": causal, "INTERPRETED": False, "ROWS": blocks["ROWS"], "COLUMNS": blocks["COLUMNS"]}
        for function in (attention._shaped_attention_terms_kernel, attention._shaped_attention_gradients_kernel):
            yield Kernel(
                function.__name__, function, constants, tuning.Tile(0, 0, 0, attention.WARPS, 3), dtype,
                f"K={width}" + " causal" * causal, False, types,
            )  # fmt: skip


def compile_kernel(kernel: Kernel, architecture: int):
    element = DTYPES.get(kernel.dtype, ("fp32",))[0]
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.function.arg_names):
        if name in kernel.constants:
            signature[name], constants[name] = "constexpr", kernel.constants[name]
            continue
        kind = {**_TYPES, **kernel.types}.get(name, "i32")
        kind = "*fp32" if name == "kept" and element == "fp32" else kind
        if isinstance(kind, tuple):  # a tuple of pointers
            signature[name] = type(kind)(*(each.replace("element", element) if each else "constexpr" for each in kind))
            constants |= {(place, at): None for at, each in enumerate(kind) if each is None}
            attributes |= {(place, at): [["tt.divisibility", 16]] for at, each in enumerate(kind) if each}
            continue
        signature[name] = kind.replace("element", element)
        if signature[name].startswith("*") or name in _ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel.function, signature, constants, attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": kernel.tile.warps, "num_stages": kernel.tile.stages, **COMPILE},
    )


def kernels(dtype: str, architecture: int, everything: bool) -> Iterator[Kernel]:

    def with_each_tile(launch: Launch, backward: bool, **how: bool) -> Iterator[Kernel]:
        precision = DTYPES[dtype][1]
        entry = launch.entry(backward, how.get("kept", False))
        for tile in tuning.candidates(*entry, precision, architecture).values():
            yield similarity(launch, dtype, architecture, backward, tile, **how)

    for launch in launches(everything):
        for backward in (False, True):
            yield from with_each_tile(launch, backward)
            if everything:
                yield from with_each_tile(launch, backward, even=False)
        if launch == Launch(HAS_STUDENT=True, DROP_IDS=launch.DROP_IDS):
            yield from with_each_tile(launch, True, attend=True)
    for columns, backward, kept in itertools.product((True, False), repeat=3):
        if kept or not everything:
            yield from with_each_tile(Launch(HAS_STUDENT=True, COLUMNS=columns), backward, kept=kept)
    yield from sigmoid_kernels(dtype, architecture)
    yield from small_kernels(dtype)
    if dtype != "tf32":
        yield from attention_kernels(dtype)
    yield from mlp_kernels(dtype, architecture, ACTIVATIONS if everything else ("gelu",))
