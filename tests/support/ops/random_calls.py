"""Random calls of every op: shapes, dtypes, memory layouts, options, gradients.

A call can be made again from its number.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import partial

import torch

from simplclip.common.terms import SWEPT as TERMS
from simplclip.ops import backends
from simplclip.ops.checks import FLOATS
from simplclip.ops.feature.op import DISTANCES
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.selftest.calls import (
    Call,
    attention_call,
    block_call,
    drawing,
    mlp_call,
    of_lengths,
    similarity_call,
)
from simplclip.selftest.compare import forced, outputs_of
from support.ops import layouts, plain
from support.ops.compare import PLAIN, Case, function_of

# primes, and on and off the tiles
SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 23, 31, 33, 47, 64, 65)
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 65)


def _similarity(r: random.Random, dtype: torch.dtype) -> Call:
    n = r.choice(SIZES)
    m = n if r.random() < 0.6 else n + r.randrange(40)
    terms = tuple(r.sample(TERMS, r.choice((1, 1, 2, 3, len(TERMS)))))
    teacher_width = r.choice(WIDTHS) if r.random() < 0.4 else None
    largest_scale = 20 if dtype in (torch.bfloat16, torch.float16) else 100
    call = similarity_call(
        n,
        m,
        r.randrange(m - n + 1),
        terms=terms,
        teacher_width=teacher_width,
        ids=r.random() < 0.4,
        scale=r.uniform(0.5, largest_scale),
        width=r.choice(WIDTHS),
        seed=r.randrange(10**6),
    )
    tensors, options = call.tensors, call.options
    if "text_ids" in tensors and n == m and r.random() < 0.5:
        tensors["ids"] = tensors.pop("text_ids")
    if "sigmoid" in terms and r.random() < 0.5:
        tensors["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)
    for name in ("logit_scale", "teacher_scale"):
        if name in tensors and r.random() < 0.15:
            options[name] = tensors.pop(name).item()
    options |= {"symmetric": r.random() < 0.7, "divergence": r.choice(("kl", "cross_entropy"))}
    if r.random() < 0.3:
        options["weights"] = {term: r.choice((0.0, 0.5, 1.0, 2.0)) for term in terms}
    if r.random() < 0.4:
        options |= {
            "scratch_bytes": r.choice((0, 1 << 12, 1 << 16)),
            "store_bytes": r.choice((0, 1 << 10, 1 << 14)),
        }
    return call


def _lengths(r: random.Random, batch: int, length: int) -> list[int] | None:
    if r.random() >= 0.4:
        return None
    return [r.randint(0, length) for _ in range(batch)]


def _attention(r: random.Random, dtype: torch.dtype) -> Call:
    b, length = r.choice((1, 2, 3)), r.choice((*SIZES, 77, 241))
    call = attention_call(b, length, r.choice((1, 2, 3)), r.choice(WIDTHS), seed=r.randrange(10**6))
    call.options = {"causal": r.random() < 0.5, "scale": r.choice((None, None, 0.3, -0.7))}
    of_lengths(call, _lengths(r, b, length))
    wide = torch.promote_types(dtype, torch.float32)
    call.dtypes = {name: r.choice((wide, dtype)) for name in ("alpha", "beta", "gamma")}
    return call


def _mlp(r: random.Random, dtype: torch.dtype) -> Call:
    t = r.choice((*SIZES, 130))
    c = r.choice(WIDTHS)
    f = r.choice((*WIDTHS, 200))
    out = r.choice(WIDTHS)
    call = mlp_call(t, c, f, out, seed=r.randrange(10**6))
    for name in ("fc1_bias", "fc2_bias"):
        if r.random() < 0.25:
            del call.tensors[name]
    shapes = [(t,), (1, t), (t, 1), (1, 1, t), (t,)]
    if t == 1:
        shapes[-1] = ()
    shape = r.choice(shapes)
    call.tensors["x"] = call.tensors["x"].reshape(*shape, c)
    call.options = {"act": r.choice(list(ACTIVATIONS))}
    return call


def _block(r: random.Random, dtype: torch.dtype) -> Call:
    b = r.choice((1, 2, 3))
    length = r.choice(SIZES)
    heads = r.choice((1, 2, 3))
    norm = r.choice(("layernorm", "rmsnorm"))
    width = heads * r.choice((2, 3, 8, 16, 20))
    call = block_call(
        b, length, width, heads, r.choice((1, 7, 32, 65)), seed=r.randrange(10**6), norm=norm
    )
    for name in ("norm_bias", "value_weight", "output_weight", "attention_gain", "mlp_gain"):
        if name in call.tensors and r.random() < 0.4:
            del call.tensors[name]
    call.options |= {"act": r.choice(list(ACTIVATIONS)), "recompute": r.random() < 0.4}
    call.options |= {"causal": r.random() < 0.5, "eps": r.choice((1e-5, 1e-3))}
    return of_lengths(call, _lengths(r, b, length))


def _feature(r: random.Random, dtype: torch.dtype) -> Call:
    n = r.choice((*SIZES, 130))
    d = r.choice((*WIDTHS, 513))
    draw = drawing(r.randrange(10**6))
    teacher = draw(n, d, size=r.choice((0.1, 1, 3)))
    if r.random() < 0.3:
        width = r.choice(WIDTHS)
        tensors = {"student": draw(n, width), "projection": draw(d, width, size=width**-0.5)}
    else:
        tensors = {"student": teacher + draw(n, d, size=r.choice((0.1, 1)))}
    options = {"distance": r.choice(DISTANCES), "beta": r.choice((0.05, 0.7))}
    # a unit vector of width 1 has no gradient but rounding errors
    wide = min(d, tensors["student"].shape[1]) > 1
    options["normalize"] = wide and r.random() < 0.7
    return Call(
        "feature_loss", tensors | {"teacher": teacher}, options, {"teacher": r.choice(FLOATS)}
    )


# A random call of each op.
DRAW: dict[str, Callable[[random.Random, torch.dtype], Call]] = {
    "similarity_loss": _similarity,
    "shaped_attention": _attention,
    "parallel_mlp": _mlp,
    "simplified_block": _block,
    "feature_loss": _feature,
}


# How often each op is drawn.
OFTEN = {
    "similarity_loss": 10,
    "shaped_attention": 4,
    "parallel_mlp": 3,
    "simplified_block": 4,
    "feature_loss": 3,
}
# What backends lack.
WITHOUT = {
    "triton": ("shaped_attention", "feature_loss"),
    "sdpa": ("similarity_loss", "parallel_mlp", "feature_loss"),
}


def make(seed: int, backend: str = "", device: str = "cpu") -> Case:
    """Makes the call of a number. backend: replaces the backend that is drawn."""
    r = random.Random(seed)
    often = [4, 3, 2, 1]
    if backend:  # no kernel computes in float64
        often[-1] = 0
    (dtype,) = r.choices(FLOATS, often)
    weights = OFTEN | dict.fromkeys(WITHOUT.get(backend, ()), 0)
    call = DRAW[r.choices(list(weights), weights.values())[0]](r, dtype)
    drawn = r.choices(("cpu", "reference"), (5, 1))[0]
    if dtype == torch.float64 or backends.extension is None:
        drawn = r.choice(("", "reference"))
    chosen = {}
    for name in (*call.tensors, *(f"grad {name}" for name in ("out", *TERMS))):
        if r.random() < 0.4:
            forms = layouts.SAME if r.random() < 0.85 else layouts.OTHER
            chosen[name] = r.choice(list(forms))
    if call.op == "feature_loss" and chosen.get("projection") == "expanded":
        # a unit vector of equal entries has no gradient but rounding errors
        call.options["normalize"] = False
    need = call.needed()
    if r.random() >= 0.5:
        need = r.sample(need, r.randint(0, len(need)))
    return Case(call, dtype, backend or drawn, need, seed, device=device, layouts=chosen)


# plain torch's attention multiplies what a query does not see by 0, so that NaN spreads
NONFINITE_FORMS = PLAIN | {
    "shaped_attention": plain.attention_by_loops,
    "simplified_block": partial(PLAIN["simplified_block"], attention=plain.attention_by_loops),
}


def check_nonfinite(case: Case) -> None:
    """Checks that results with a NaN or infinity are non-finite where plain torch's are."""
    call, r = case.call, random.Random(case.seed)
    tensors = call.typed(case.dtype)
    # padded tokens have no gain
    ignored = {"attention_gain"} if "lengths" in tensors else set()
    for name, t in tensors.items():
        if not t.is_floating_point() or name in ignored or t.numel() > 500:
            continue
        index, value = r.randrange(t.numel()), r.choice((math.inf, -math.inf, math.nan))
        spoiled = tensors | {name: t.clone()}
        spoiled[name].view(-1)[index] = value
        wide = {k: t.double() if t.is_floating_point() else t for k, t in spoiled.items()}
        with forced(case.backend), torch.no_grad():
            on_device = {k: t.to(case.device) for k, t in spoiled.items()}
            results = outputs_of(function_of(call), call, on_device)
        for term, expected in outputs_of(NONFINITE_FORMS[call.op], call, wide).items():
            lost = results[term].cpu().isfinite() & ~expected.isfinite()
            assert not lost.any(), f"{term} is finite: {name}[{index}] = {value}"


def check(case: Case) -> None:
    case.check(roundings=True)


def failures(
    seeds: range, check: Callable[[Case], None] = check, backend: str = "", device: str = "cpu"
) -> list[str]:
    """Returns an error for each of the calls with these numbers that fails."""
    errors = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes unwritten memory NaN
    try:
        for seed in seeds:
            case = make(seed, backend, device)
            try:
                check(case)
            except Exception as error:
                errors.append(f"case {seed}: {type(error).__name__}: {error}\n    {case}")
    finally:
        torch.use_deterministic_algorithms(False)
    return errors
