"""Calls of the public ops as data, with inputs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops import registry
from simplclip.ops.similarity.call import TERMS

TEACHER = ("teacher_image", "teacher_text", "teacher_scale")
ATTENTION = ("q", "k", "v", "alpha", "beta", "gamma")
MLP = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
# Scalars, and tensors that act on statistics: float32 beside half features.
WIDE = {
    "logit_scale",
    "logit_bias",
    "teacher_scale",
    "plane_weight",
    "plane_bias",
    "alpha",
    "beta",
    "gamma",
}
WIDE |= {"norm_weight", "norm_bias", "attention_gain", "mlp_gain"}


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
        return [
            name
            for name, t in self.tensors.items()
            if t.is_floating_point() and not name.startswith("teacher")
        ]

    def typed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {name: wide if name in WIDE else dtype for name in self.tensors} | self.dtypes
        return {
            name: t.to(dtypes[name]) if t.is_floating_point() else t
            for name, t in self.tensors.items()
        }

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the op's arguments, with these tensors."""
        named: dict[str, Any] = {**tensors, **self.options}
        if "plane_bias" in named:
            named["plane"] = (named.pop("plane_weight"), named.pop("plane_bias"))
        return {"fc1_bias": None, "fc2_bias": None, **named} if self.op == "parallel_mlp" else named


def drawing(seed: int) -> Callable[..., Tensor]:
    """Returns a function that draws tensors of a shape, times a size."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, size=1.0: size * torch.randn(*shape, generator=g, dtype=torch.float64)


def similarity_call(
    n,
    m,
    offset=0,
    *,
    terms=TERMS[:2],
    plane="scalar",
    teacher_width=None,
    ids=False,
    scale=20.0,
    width=48,
    seed=0,
    **options,
) -> Call:
    """Returns a call with unit features, partly matched. options: arguments of similarity_loss."""
    draw = drawing(seed)

    def features(d, base=None):
        image, text = draw(n, d), draw(m, d)
        if base is not None:
            image, text = base[0] + 0.5 * image, base[1] + 0.5 * text
        text[offset : offset + n] += 4 * F.normalize(image, dim=1)
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    number = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    image, text = features(width)
    tensors = {"image": image, "text": text, "logit_scale": number(scale)}
    if "pair_matching" in terms:
        tensors["plane_weight"] = draw(width if plane == "hadamard" else 1).squeeze() + 3
        tensors["plane_bias"] = number(-1.0)
    if "relational" in terms:
        teacher = features(teacher_width or width, None if teacher_width else (image, text))
        tensors |= dict(zip(TEACHER, (*teacher, number(1.4 * scale))))
    if ids:
        columns = (
            torch.randint(0, max(m // 2, 1), (m,), generator=torch.Generator().manual_seed(seed))
            * 10**12
        )
        tensors |= {"ids": columns[offset : offset + n].clone(), "text_ids": columns}
    return Call(
        "similarity_loss", tensors, {"terms": tuple(terms), "label_offset": offset} | options
    )


def attention_call(b=2, length=5, h=3, k=4, seed=0, **options) -> Call:
    draw = drawing(seed)
    tensors = *(draw(b, length, h, k) for _ in range(3)), *(draw(h) for _ in range(3))
    return Call("shaped_attention", dict(zip(ATTENTION, tensors)), options)


def mlp_call(t=7, c=6, f=10, out=5, seed=0, **options) -> Call:
    draw = drawing(seed)
    tensors = (
        draw(t, c),
        draw(f, c, size=2 * c**-0.5),
        draw(f),
        draw(out, f, size=f**-0.5),
        draw(out),
    )
    return Call("parallel_mlp", dict(zip(MLP, tensors)), options)


def block_call(b=2, length=5, c=12, heads=3, f=20, projections=True, seed=0, **options) -> Call:
    draw = drawing(seed)
    tensors = {
        "x": draw(b, length, c),
        "qk_weight": draw(2 * c, c, size=c**-0.5),
        "fc1_weight": draw(f, c, size=c**-0.5),
    }
    tensors |= {"fc1_bias": draw(f), "fc2_weight": draw(c, f, size=f**-0.5), "fc2_bias": draw(c)}
    tensors |= {name: draw(heads) for name in ("alpha", "beta", "gamma")}
    tensors |= {
        "norm_weight": 1 + draw(c, size=0.1),
        "attention_gain": draw(1)[0],
        "mlp_gain": draw(1)[0],
    }
    if options.get("norm") != "rmsnorm":
        tensors["norm_bias"] = draw(c)
    if projections:
        tensors |= {name: draw(c, c, size=c**-0.5) for name in ("value_weight", "output_weight")}
    return Call("simplified_block", tensors, options)


def feature_call(n: int, d: int, **options) -> Call:
    draw = drawing(0)
    teacher = draw(n, d, size=3)
    return Call("feature_loss", {"student": teacher + draw(n, d), "teacher": teacher}, options)


def of_lengths(call: Call, lengths: list[int] | None) -> Call:
    if lengths is not None:
        call.tensors["lengths"] = torch.tensor(lengths)
    return call


def recorded_calls(monkeypatch) -> list:
    """Returns a list to which each call of an op from here on is added, as (name, call)."""
    recorded, call = [], registry.call

    def recording(op, of_call, *spec):
        recorded.append((op.name, of_call))
        return call(op, of_call, *spec)

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
