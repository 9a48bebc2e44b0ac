"""Calls of the public ops as data, with inputs in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.similarity import TERMS
from simplclip.ops import registry

TEACHER = ("teacher_image", "teacher_text", "teacher_scale")
ATTENTION = ("q", "k", "v", "alpha", "beta", "gamma")
MLP = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
# Scalars, and tensors that act on statistics: float32 beside half features.
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "plane_weight", "plane_bias"}
WIDE |= {"alpha", "beta", "gamma", "norm_weight", "norm_bias", "attention_gain", "mlp_gain"}


@dataclass
class Call:
    op: str
    tensors: dict[str, Tensor]  # float64, and int64 ids, lengths
    options: dict[str, Any] = field(default_factory=dict)
    # of tensors whose dtype is not the call's
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
    """Returns a function that draws tensors of a shape, times a size."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, size=1.0: size * torch.randn(*shape, generator=g, dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def similarity_call(
    n: int,
    m: int,
    offset: int = 0,
    *,
    terms: Sequence[str] = TERMS[:2],
    plane: str = "scalar",
    teacher_width: int | None = None,
    ids: bool = False,
    scale: float = 20.0,
    width: int = 48,
    seed: int = 0,
    **options: Any,
) -> Call:
    """Returns a call with unit features, partly matched. options: arguments of similarity_loss."""
    draw = drawing(seed)

    def matched(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text[offset : offset + n] += 4 * F.normalize(image, dim=1)
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    image, text = matched(draw(n, width), draw(m, width))
    tensors = {"image": image, "text": text, "logit_scale": number(scale)}
    if "pair_matching" in terms:
        plane_width = width if plane == "hadamard" else 1
        tensors["plane_weight"] = draw(plane_width).squeeze() + 3
        tensors["plane_bias"] = number(-1.0)
    if "relational" in terms:
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
    draw = drawing(seed)
    tensors = *(draw(b, length, h, k) for _ in range(3)), *(draw(h) for _ in range(3))
    return Call("shaped_attention", dict(zip(ATTENTION, tensors)), options)


def mlp_call(
    t: int = 7, c: int = 6, f: int = 10, out: int = 5, seed: int = 0, **options: Any
) -> Call:
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


def feature_call(n: int, d: int, **options: Any) -> Call:
    draw = drawing(0)
    teacher = draw(n, d, size=3)
    return Call("feature_loss", {"student": teacher + draw(n, d), "teacher": teacher}, options)


def of_lengths(call: Call, lengths: Sequence[int] | None) -> Call:
    """Gives a call the lengths of its sequences, unless these are None."""
    if lengths is not None:
        call.tensors["lengths"] = torch.tensor(lengths)
    return call


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Returns a list to which each call of an op from here on is added, as (name, call)."""
    recorded, original = [], registry.call

    def recording(op: Any, call: Any, *spec: Any) -> Any:
        recorded.append((op.name, call))
        return original(op, call, *spec)

    monkeypatch.setattr(registry, "call", recording)
    return recorded


# Calls of several tiles, strips and chunks, of which the last is partial. The first calls of an op
# have the most options.
LARGE: dict[str, Callable[[], Call]] = {
    "similarity, all": lambda: similarity_call(257, 257, terms=TERMS, ids=True),
    "similarity, 100 x 333": lambda: similarity_call(
        100, 333, 57, terms=TERMS, teacher_width=31, symmetric=False
    ),
    "similarity, hadamard": lambda: similarity_call(
        257, 257, terms=TERMS, plane="hadamard", ids=True
    ),
    "similarity, 1000": lambda: similarity_call(1000, 1000, terms=TERMS[:2]),
    "attention, 77": lambda: attention_call(2, 77, 2, 64),
    "attention, 288": lambda: of_lengths(attention_call(2, 288, 1, 80, causal=True), [288, 285]),
    "attention, 197": lambda: attention_call(2, 197, 2, 64),
    "attention, 250": lambda: of_lengths(attention_call(4, 250, 2, 8), [250, 0, 125, 1]),
    "mlp": lambda: mlp_call(130, 24, 1000, 17),
    "mlp, several chunks": lambda: mlp_call(1300, 8, 4096, 8),  # more hidden rows than 8 MiB hold
    "block": lambda: of_lengths(block_call(3, 77, 64, 2, 300, causal=True), [77, 0, 30]),
    "block, recompute": lambda: block_call(2, 130, 48, 3, 100, recompute=True),
    "feature": lambda: feature_call(3001, 65),
    "feature, smooth": lambda: feature_call(
        31, 1000, distance="smooth_l1", beta=0.05, normalize=False
    ),
}
