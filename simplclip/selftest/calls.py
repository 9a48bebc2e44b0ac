"""Calls of the public ops as data, and random calls: shapes, options, dtypes of single tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops.checks import FLOATS
from simplclip.ops.feature.op import DISTANCES
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.ops.similarity.call import TERMS

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 23, 31, 33, 47, 64, 65)  # primes, and on and off the tiles
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 65)
FEATURES = ("image", "text", "teacher_image", "teacher_text", "projected_image", "projected_text")
TEACHER = ("teacher_image", "teacher_text", "teacher_scale")
ATTENTION = ("q", "k", "v", "alpha", "beta", "gamma")
MLP = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
# Scalars, and tensors that act on statistics: float32 beside half features.
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "interactive_scale", "plane_weight", "plane_bias", "prior"}
WIDE |= {"alpha", "beta", "gamma", "norm_weight", "norm_bias", "attention_gain", "mlp_gain"}


@dataclass
class Call:
    op: str
    tensors: dict[str, Tensor]  # float64, and int64 ids, lengths
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of tensors whose dtype is not the call's

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors.items())
        return f"{self.op}: {shapes}; {self.options}; dtypes {self.dtypes}"

    def needed(self) -> list[str]:
        """Returns the names of tensors that have a gradient."""
        return [name for name, t in self.tensors.items() if t.is_floating_point() and not name.startswith("teacher")]

    def typed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        of = {name: wide if name in WIDE else dtype for name in self.tensors} | self.dtypes
        return {name: t.to(of[name]) if t.is_floating_point() else t for name, t in self.tensors.items()}

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Returns the op's arguments, with these tensors."""
        named: dict[str, Any] = {**tensors, **self.options}
        if "plane_bias" in named:
            named["plane"] = (named.pop("plane_weight"), named.pop("plane_bias"))
        return {"fc1_bias": None, "fc2_bias": None, **named} if self.op == "parallel_mlp" else named

    def facts(self) -> dict[str, Any]:
        """Returns the facts that the backends' predicates need, besides device and dtype."""
        if "alpha" not in self.tensors:
            return {}
        length, width = (self.tensors["q"].shape[i] for i in (1, 3)) if "q" in self.tensors else self.tensors["x"].shape[1:]
        heads = 1 if "q" in self.tensors else len(self.tensors["alpha"])
        return {"length": length, "width": width // heads, "lengths": "lengths" in self.tensors}


def make_inputs(n, m, offset=0, *, terms, plane="scalar", teacher_width=None, ids=False, scale=20.0, width=48, seed=0):
    """Tensors of similarity_loss by name (plane: plane_weight, plane_bias), and options. Unit features, partly matched."""
    g = torch.Generator().manual_seed(seed)

    def features(d, noise, base=None):
        image = torch.randn(n, d, generator=g, dtype=torch.float64)
        text = torch.randn(m, d, generator=g, dtype=torch.float64)
        if base is not None:
            image, text = base[0] + noise * image, base[1] + noise * text
        text[offset : offset + n] += 4 * F.normalize(image, dim=1)
        return F.normalize(image, dim=1), F.normalize(text, dim=1)

    number = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731
    image, text = features(width, 0)
    leaves = {"image": image, "text": text, "logit_scale": number(scale)}
    if "pair_matching" in terms:
        shape = (width,) if plane == "hadamard" else ()
        leaves["plane_weight"] = torch.randn(shape, generator=g, dtype=torch.float64) + 3
        leaves["plane_bias"] = number(-1.0)
    if {"relational", "interactive"} & set(terms):
        teacher = features(teacher_width or width, 0.5, None if teacher_width else (image, text))
        leaves |= dict(zip(TEACHER, (*teacher, number(1.4 * scale))))
    if "interactive" in terms:
        leaves["interactive_scale"] = number(0.8 * scale)
        if teacher_width:
            leaves |= dict(zip(FEATURES[4:], features(teacher_width, 0.5, teacher)))
    options = {"terms": tuple(terms), "label_offset": offset}
    if ids:
        columns = torch.randint(0, max(m // 2, 1), (m,), generator=g) * 10**12
        options |= {"ids": columns[offset : offset + n].clone(), "text_ids": columns}
    return leaves, options


def similarity_call(n: int, m: int, offset: int = 0, **options) -> Call:
    """Returns a call. options: arguments of make_inputs and of similarity_loss."""
    made = ("terms", "plane", "teacher_width", "ids", "scale", "width", "seed")
    leaves, fixed = make_inputs(n, m, offset, **{name: options.pop(name) for name in made if name in options})
    tensors = leaves | {name: fixed.pop(name) for name in ("ids", "text_ids") if name in fixed}
    return Call("similarity_loss", tensors, fixed | options)


def attention_inputs(b=2, length=5, h=3, k=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k_, v = (torch.randn(b, length, h, k, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    gains = [torch.randn(h, generator=g, dtype=torch.float64) for _ in range(3)]
    return q, k_, v, *gains


def attention_call(*shape: int, **options) -> Call:
    return Call("shaped_attention", dict(zip(ATTENTION, attention_inputs(*shape))), options)


def mlp_inputs(t=7, c=6, f=10, out=5, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, d=1.0: torch.randn(*shape, generator=g, dtype=torch.float64) * d  # noqa: E731
    tensors = [draw(t, c), 2 * draw(f, c, d=c**-0.5), draw(f), draw(out, f, d=f**-0.5), draw(out)]
    return tensors if bias else [tensors[0], tensors[1], None, tensors[3], None]


def mlp_call(*shape: int, **options) -> Call:
    return Call("parallel_mlp", dict(zip(MLP, mlp_inputs(*shape))), options)


def block_inputs(b=2, length=5, c=12, heads=3, f=20, norm="layernorm", projections=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape, d=1.0: torch.randn(*shape, generator=g, dtype=torch.float64) * d  # noqa: E731
    found = {"x": draw(b, length, c), "qk_weight": draw(2 * c, c, d=c**-0.5), "fc1_weight": draw(f, c, d=c**-0.5)}
    found |= {"fc1_bias": draw(f), "fc2_weight": draw(c, f, d=f**-0.5), "fc2_bias": draw(c)}
    found |= {name: draw(heads) for name in ("alpha", "beta", "gamma")}
    found |= {"norm_weight": 1 + draw(c, d=0.1), "attention_gain": draw(1)[0], "mlp_gain": draw(1)[0]}
    if norm == "layernorm":
        found["norm_bias"] = draw(c)
    if projections:
        found |= {name: draw(c, c, d=c**-0.5) for name in ("value_weight", "output_weight")}
    return found


def feature_call(n: int, d: int, **options) -> Call:
    g = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(n, d, generator=g, dtype=torch.float64)
    student = teacher + torch.randn(n, d, generator=g, dtype=torch.float64)
    return Call("feature_loss", {"student": student, "teacher": teacher}, options)


def _block_call(lengths: list[int] | None, *shape: int, **options) -> Call:
    return of_lengths(Call("simplified_block", block_inputs(*shape), options), lengths)


def of_lengths(call: Call, lengths: list[int] | None) -> Call:
    if lengths is not None:
        call.tensors["lengths"] = torch.tensor(lengths)
    return call


_KL: dict[str, Any] = {"interactive": "kl"}
# Calls of several tiles, strips and chunks, of which the last is partial. The first calls of an op have the most options.
LARGE: dict[str, Callable[[], Call]] = {
    "similarity, all": lambda: similarity_call(257, 257, terms=TERMS, ids=True),
    "similarity, 100 x 333": lambda: similarity_call(100, 333, 57, terms=TERMS, teacher_width=31, symmetric=False, **_KL),
    "similarity, hadamard": lambda: similarity_call(257, 257, terms=TERMS, plane="hadamard", ids=True, **_KL),
    "similarity, 1000": lambda: similarity_call(1000, 1000, terms=TERMS[:2]),
    "attention, 77": lambda: attention_call(2, 77, 2, 64),
    "attention, 288": lambda: of_lengths(attention_call(2, 288, 1, 80, causal=True), [288, 285]),
    "attention, 197": lambda: attention_call(2, 197, 2, 64),
    "attention, 250": lambda: of_lengths(attention_call(4, 250, 2, 8), [250, 0, 125, 1]),
    "mlp": lambda: mlp_call(130, 24, 1000, 17),
    "mlp, several chunks": lambda: mlp_call(1300, 8, 4096, 8),  # more hidden rows than 8 MiB hold
    "block": lambda: _block_call([77, 0, 30], 3, 77, 64, 2, 300, causal=True),
    "block, recompute": lambda: _block_call(None, 2, 130, 48, 3, 100, recompute=True),
    "feature": lambda: feature_call(3001, 65),
    "feature, smooth": lambda: feature_call(31, 1000, distance="smooth_l1", beta=0.05, normalize=False),
}


def _similarity(r: random.Random, dtype: torch.dtype) -> Call:
    n = r.choice(SIZES)
    m, terms = (n if r.random() < 0.6 else n + r.randrange(40)), tuple(r.sample(TERMS, r.choice((1, 1, 2, 3, 4, 5))))
    teacher_width = r.choice(WIDTHS) if r.random() < 0.4 else None
    half = dtype in (torch.bfloat16, torch.float16)
    call = similarity_call(
        n, m, r.randrange(m - n + 1), terms=terms, plane=r.choice(("scalar", "hadamard")), teacher_width=teacher_width,
        ids=r.random() < 0.4, scale=r.uniform(0.5, 20 if half else 100), width=r.choice(WIDTHS), seed=r.randrange(10**6),
    )  # fmt: skip
    leaves, options = call.tensors, call.options
    if "text_ids" in leaves and n == m and r.random() < 0.5:
        leaves["ids"] = leaves.pop("text_ids")
    if r.random() < 0.2:
        leaves["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)
    if "interactive_scale" in leaves and r.random() < 0.3:
        del leaves["interactive_scale"]
    for name in ("logit_scale", "interactive_scale", "teacher_scale"):
        if name in leaves and r.random() < 0.15:
            options[name] = leaves.pop(name).item()
    options |= {"symmetric": r.random() < 0.7, "divergence": r.choice(("kl", "cross_entropy"))}
    options["interactive"] = r.choice(("infonce", "kl"))
    _of_contrastive(r, call)
    if r.random() < 0.4:
        options |= {"scratch_bytes": r.choice((0, 1 << 12, 1 << 16)), "store_bytes": r.choice((0, 1 << 10, 1 << 14))}
    return call


def _of_contrastive(r: random.Random, call: Call) -> None:
    """Adds random options of the contrastive term, several positives and weights to `call`."""
    leaves, options, n = call.tensors, call.options, len(call.tensors["image"])
    terms, grouped = options["terms"], "ids" in options or "ids" in leaves
    if r.random() < 0.4:
        options["positives"] = r.choice(("drop", "ids", "sum"))
    if "contrastive" in terms and r.random() < 0.4:
        options["label_smoothing"] = r.choice((0.0, 0.1, 0.5))
        options["decoupled"] = not grouped and n > 1 and r.random() < 0.5  # each row needs a negative
        if options.get("positives", "drop") == "drop":
            options["margin"] = r.choice((0.0, 0.2))
            if r.random() < 0.3:
                options["prior"] = r.choice((0.0, 0.05))
            elif r.random() < 0.5:
                leaves["prior"] = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) / 10
    if r.random() < 0.3:
        options["weights"] = {term: r.choice((0.0, 0.5, 1.0, 2.0)) for term in terms}


def _lengths(r: random.Random, batch: int, length: int) -> list[int] | None:
    return [r.randint(0, length) for _ in range(batch)] if r.random() < 0.4 else None


def _attention(r: random.Random, dtype: torch.dtype) -> Call:
    b, length = r.choice((1, 2, 3)), r.choice((*SIZES, 77, 241))
    tensors = attention_inputs(b, length, r.choice((1, 2, 3)), r.choice(WIDTHS), seed=r.randrange(10**6))
    options = {"causal": r.random() < 0.5, "scale": r.choice((None, None, 0.3, -0.7))}
    call = of_lengths(Call("shaped_attention", dict(zip(ATTENTION, tensors)), options), _lengths(r, b, length))
    wide = torch.promote_types(dtype, torch.float32)
    call.dtypes = {name: r.choice((wide, dtype)) for name in ("alpha", "beta", "gamma")}
    return call


def _mlp(r: random.Random, dtype: torch.dtype) -> Call:
    t, c, f, out = r.choice((*SIZES, 130)), r.choice(WIDTHS), r.choice((*WIDTHS, 200)), r.choice(WIDTHS)
    tensors = dict(zip(MLP, mlp_inputs(t, c, f, out, seed=r.randrange(10**6))))
    for name in ("fc1_bias", "fc2_bias"):
        if r.random() < 0.25:
            del tensors[name]
    shape = r.choice(((t,), (1, t), (t, 1), (1, 1, t), () if t == 1 else (t,)))
    tensors["x"] = tensors["x"].reshape(*shape, c)
    return Call("parallel_mlp", tensors, {"act": r.choice(list(ACTIVATIONS))})


def _block(r: random.Random, dtype: torch.dtype) -> Call:
    b, length, heads, norm = r.choice((1, 2, 3)), r.choice(SIZES), r.choice((1, 2, 3)), r.choice(("layernorm", "rmsnorm"))
    width = heads * r.choice((2, 3, 8, 16, 20))
    tensors = block_inputs(b, length, width, heads, r.choice((1, 7, 32, 65)), norm, seed=r.randrange(10**6))
    for name in ("norm_bias", "value_weight", "output_weight", "attention_gain", "mlp_gain"):
        if name in tensors and r.random() < 0.4:
            del tensors[name]
    options = {"norm": norm, "act": r.choice(list(ACTIVATIONS)), "recompute": r.random() < 0.4}
    options |= {"causal": r.random() < 0.5, "eps": r.choice((1e-5, 1e-3))}
    return of_lengths(Call("simplified_block", tensors, options), _lengths(r, b, length))


def _feature(r: random.Random, dtype: torch.dtype) -> Call:
    n, d = r.choice((*SIZES, 130)), r.choice((*WIDTHS, 513))
    g = torch.Generator().manual_seed(r.randrange(10**6))
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    teacher = r.choice((0.1, 1, 3)) * draw(n, d)
    if r.random() < 0.3:
        width = r.choice(WIDTHS)
        tensors = {"student": draw(n, width), "projection": draw(d, width) / width**0.5}
    else:
        tensors = {"student": teacher + r.choice((0.1, 1)) * draw(n, d)}
    options = {"distance": r.choice(DISTANCES), "beta": r.choice((0.05, 0.7))}
    wide = min(d, tensors["student"].shape[1]) > 1  # a unit vector of width 1 has no gradient but rounding errors
    options["normalize"] = wide and r.random() < 0.7
    return Call("feature_loss", tensors | {"teacher": teacher}, options, {"teacher": r.choice(FLOATS)})


# A random call of each op.
DRAW: dict[str, Callable[[random.Random, torch.dtype], Call]] = {
    "similarity_loss": _similarity,
    "shaped_attention": _attention,
    "parallel_mlp": _mlp,
    "simplified_block": _block,
    "feature_loss": _feature,
}
