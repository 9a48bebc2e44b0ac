"""Calls of the public ops as data, with inputs in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.common.terms import PLANE_TERMS, SWEPT, TEACHER_TERMS, TERMS

TEACHER = ("teacher_image", "teacher_text", "teacher_scale")
ATTENTION = ("q", "k", "v", "alpha", "beta", "gamma")
MLP = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
# Scalars, and tensors that act on statistics: float32 beside half features.
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "plane_weight", "plane_bias"}
WIDE |= {"alpha", "beta", "gamma", "norm_weight", "norm_bias", "attention_gain", "mlp_gain"}


@dataclass
class Call:
    """A call of an op: float64 tensors, and int64 ids and lengths; options, its other arguments.

    dtypes: of tensors whose dtype is not the call's.
    """

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors.items())
        return f"{self.op}: {shapes}; {self.options}; dtypes {self.dtypes}"

    def needed(self) -> list[str]:
        """Returns the names of tensors that have a gradient."""
        floats = [name for name, t in self.tensors.items() if t.is_floating_point()]
        return [name for name in floats if not name.startswith("teacher")]

    def typed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the tensors in a call's dtype."""
        tensors = dict(self.tensors)
        for name, t in tensors.items():
            if t.is_floating_point():
                tensors[name] = t.to(self.dtype_of(name, dtype))
        return tensors

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of a tensor in a call of `dtype`."""
        if name in self.dtypes:
            return self.dtypes[name]
        return torch.promote_types(dtype, torch.float32) if name in WIDE else dtype

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the op's arguments, with these tensors."""
        named: dict[str, Any] = {**tensors, **self.options}
        if "plane_bias" in named:
            named["plane"] = (named.pop("plane_weight"), named.pop("plane_bias"))
        if self.op == "parallel_mlp":
            named = {"fc1_bias": None, "fc2_bias": None, **named}
        return named


def drawing(seed: int) -> Callable[..., Tensor]:
    """Returns a function that draws normal numbers of a shape, times a size."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, size=1.0: size * torch.randn(*shape, generator=g, dtype=torch.float64)


def number(value: float) -> Tensor:
    """Returns a scalar tensor in float64."""
    return torch.tensor(value, dtype=torch.float64)


def similarity_call(
    n: int,
    m: int,
    offset: int = 0,
    *,
    terms: Sequence[str] = SWEPT[:2],
    teacher_width: int | None = None,
    ids: bool = False,
    scale: float = 20.0,
    bias: float | None = None,
    width: int = 48,
    seed: int = 0,
    **options: Any,
) -> Call:
    """Returns a call of unit features [n, width] and [m, width], partly matched.

    offset: the label_offset. ids: whether pairs of rows have equal ids. bias: None for none.
    """
    draw = drawing(seed)

    def matched(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text[offset : offset + n] += 4 * F.normalize(image, dim=1)
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    image, text = matched(draw(n, width), draw(m, width))
    tensors = {"image": image, "text": text, "logit_scale": number(scale)}
    if bias is not None:
        tensors["logit_bias"] = number(bias)
    if not PLANE_TERMS.isdisjoint(terms):
        tensors["plane_weight"] = draw(1).squeeze() + 3
        tensors["plane_bias"] = number(-1.0)
    if not TEACHER_TERMS.isdisjoint(terms):
        if teacher_width:
            teacher = matched(draw(n, teacher_width), draw(m, teacher_width))
        else:
            teacher = matched(image + 0.5 * draw(n, width), text + 0.5 * draw(m, width))
        tensors |= dict(zip(TEACHER, (*teacher, number(1.4 * scale))))
    if ids:
        groups = max(m // 2, 1)
        generator = torch.Generator().manual_seed(seed)
        columns = torch.randint(0, groups, (m,), generator=generator) * 10**12
        tensors |= {"ids": columns[offset : offset + n].clone(), "text_ids": columns}
    options = {"terms": tuple(terms), "label_offset": offset} | options
    return Call("similarity_loss", tensors, options)


def attention_call(
    b: int = 2, length: int = 5, h: int = 3, k: int = 4, seed: int = 0, **options: Any
) -> Call:
    """Returns a call of q, k and v of [b, length, h, k]."""
    draw = drawing(seed)
    tensors = *(draw(b, length, h, k) for _ in range(3)), *(draw(h) for _ in range(3))
    return Call("shaped_attention", dict(zip(ATTENTION, tensors)), options)


def mlp_call(
    t: int = 7, c: int = 6, f: int = 10, out: int = 5, seed: int = 0, **options: Any
) -> Call:
    """Returns a call of x [t, c] with f hidden units and results [t, out]."""
    draw = drawing(seed)
    tensors = (
        draw(t, c),
        draw(f, c, size=2 * c**-0.5),
        draw(f),
        draw(out, f, size=f**-0.5),
        draw(out),
    )
    return Call("parallel_mlp", dict(zip(MLP, tensors)), options)


def block_call(
    b: int = 2,
    length: int = 5,
    c: int = 12,
    heads: int = 3,
    f: int = 20,
    projections: bool = True,
    seed: int = 0,
    **options: Any,
) -> Call:
    """Returns a call of x [b, length, c] with f hidden units.

    projections: whether attention has weights of values and outputs.
    """
    draw = drawing(seed)
    tensors = {
        "x": draw(b, length, c),
        "qk_weight": draw(2 * c, c, size=c**-0.5),
        "fc1_weight": draw(f, c, size=c**-0.5),
        "fc1_bias": draw(f),
        "fc2_weight": draw(c, f, size=f**-0.5),
        "fc2_bias": draw(c),
        "alpha": draw(heads),
        "beta": draw(heads),
        "gamma": draw(heads),
        "norm_weight": 1 + draw(c, size=0.1),
        "attention_gain": draw(1)[0],
        "mlp_gain": draw(1)[0],
    }
    if options.get("norm") != "rmsnorm":
        tensors["norm_bias"] = draw(c)
    if projections:
        tensors |= {name: draw(c, c, size=c**-0.5) for name in ("value_weight", "output_weight")}
    return Call("simplified_block", tensors, options)


def feature_call(n: int, d: int, seed: int = 0, **options: Any) -> Call:
    """Returns a call of features [n, d]."""
    draw = drawing(seed)
    teacher = draw(n, d, size=3)
    return Call("feature_loss", {"student": teacher + draw(n, d), "teacher": teacher}, options)


def of_lengths(call: Call, lengths: Sequence[int] | None) -> Call:
    """Gives a call the lengths of its sequences, unless these are None."""
    if lengths is not None:
        call.tensors["lengths"] = torch.tensor(lengths)
    return call


SIGMOID = tuple(term.name for term in TERMS if "sigmoid" in term.sweeps)
# op -> calls, of which the first two have the most options. Sizes are 1, primes, and beside the
# kernels' tiles.
CALLS: dict[str, list[Callable[[], Call]]] = {
    "similarity_loss": [
        partial(similarity_call, 257, 257, terms=SWEPT, teacher_width=72, ids=True, width=65),
        partial(similarity_call, 100, 333, 57, terms=SWEPT, teacher_width=31, symmetric=False),
        partial(similarity_call, 67, 67, terms=SIGMOID, bias=-5.0, ids=True, scale=50.0, width=33),
        partial(similarity_call, 131, 200, 69, terms=("contrastive", *SIGMOID), bias=-5.0),
        partial(similarity_call, 1, 5, 4, terms=SWEPT, width=8),
    ],
    "shaped_attention": [
        partial(attention_call, 3, 77, 2, 64, causal=True),
        lambda: of_lengths(attention_call(3, 50, 2, 16), [50, 0, 7]),
        lambda: of_lengths(attention_call(2, 197, 1, 32, causal=True), [197, 3]),
        partial(attention_call, 1, 1, 1, 1),
    ],
    "parallel_mlp": [
        partial(mlp_call, 67, 33, 127, 33),
        partial(mlp_call, 130, 24, 1000, 17, act="quickgelu"),
        partial(mlp_call, 1, 1, 1, 1, act="silu"),
    ],
    "simplified_block": [
        lambda: of_lengths(block_call(3, 77, 64, 2, 300, causal=True), [77, 0, 30]),
        partial(block_call, 2, 130, 48, 3, 100, projections=False, recompute=True),
    ],
    "feature_loss": [
        partial(feature_call, 301, 65),
        partial(feature_call, 31, 1000, distance="smooth_l1", beta=0.05, normalize=False),
    ],
}
