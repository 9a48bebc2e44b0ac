"""Random calls of every op: shapes, dtypes, memory layouts, options, gradients. A number makes a call, and makes it again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import calls
import layouts
import plain
import torch
from calls import (
    ATTENTION,
    MLP,
    PLAIN,
    TERMS,
    Call,
    attention_inputs,
    block_inputs,
    forced,
    function_of,
    mlp_inputs,
    outputs_of,
    similarity_call,
)
from torch import Tensor

from simplclip.ops import backends

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 23, 31, 33, 47, 64, 65)  # primes, and on and off the tiles
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 65)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Case:
    call: Call
    dtype: torch.dtype
    backend: str
    layouts: dict[str, str]  # of tensors, and of gradients that come in as "grad NAME"
    need: list[str]
    seed: int

    def __str__(self) -> str:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in self.call.tensors.items())
        return (
            f"{self.call.op} {self.dtype} on {self.backend or 'the first'}: {shapes}; {self.call.options}; "
            f"dtypes {self.call.dtypes}; layouts {self.layouts}; gradients of {self.need}"
        )


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
    _options(r, call)
    if r.random() < 0.4:
        options |= {"scratch_bytes": r.choice((0, 1 << 12, 1 << 16)), "store_bytes": r.choice((0, 1 << 10, 1 << 14))}
    return call


def _options(r: random.Random, call: Call) -> None:
    """Options of the contrastive term, several positives, weights."""
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
            elif r.random() < 0.3:
                leaves["prior"] = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) / 10
    if r.random() < 0.3:
        options["weights"] = {term: r.choice((0.0, 0.5, 1.0, 2.0)) for term in terms}


def _lengths(r: random.Random, batch: int, length: int) -> dict[str, Tensor]:
    return {"lengths": torch.tensor([r.randint(0, length) for _ in range(batch)])} if r.random() < 0.4 else {}


def _attention(r: random.Random, dtype: torch.dtype) -> Call:
    b, length = r.choice((1, 2, 3)), r.choice((*SIZES, 77, 241))
    tensors = attention_inputs(b, length, r.choice((1, 2, 3)), r.choice(WIDTHS), seed=r.randrange(10**6))
    options = {"causal": r.random() < 0.5, "scale": r.choice((None, None, 0.3, -0.7))}
    call = Call("shaped_attention", dict(zip(ATTENTION, tensors)) | _lengths(r, b, length), options)
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
    return Call("parallel_mlp", tensors, {"act": r.choice(list(plain.ACTIVATIONS))})


def _block(r: random.Random, dtype: torch.dtype) -> Call:
    b, length, heads, norm = r.choice((1, 2, 3)), r.choice(SIZES), r.choice((1, 2, 3)), r.choice(("layernorm", "rmsnorm"))
    width = heads * r.choice((2, 3, 8, 16, 20))
    tensors = block_inputs(b, length, width, heads, r.choice((1, 7, 32, 65)), norm, seed=r.randrange(10**6))
    for name in ("norm_bias", "value_weight", "output_weight", "attention_gain", "mlp_gain"):
        if name in tensors and r.random() < 0.4:
            del tensors[name]
    options = {"norm": norm, "act": r.choice(list(plain.ACTIVATIONS)), "recompute": r.random() < 0.4}
    options |= {"causal": r.random() < 0.5, "eps": r.choice((1e-5, 1e-3))}
    return Call("simplified_block", tensors | _lengths(r, b, length), options)


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
    options = {"distance": r.choice(("mse", "smooth_l1")), "beta": r.choice((0.05, 0.7))}
    wide = min(d, tensors["student"].shape[1]) > 1  # else a unit vector has one direction, and no gradient but rounding
    options["normalize"] = wide and r.random() < 0.7
    return Call("feature_loss", tensors | {"teacher": teacher}, options, {"teacher": r.choice(FLOATS)})


DRAW = {_similarity: 10, _attention: 4, _mlp: 3, _block: 4, _feature: 3}
WITHOUT = {"triton": (_attention,), "sdpa": (_similarity, _mlp, _feature)}  # ops that a backend does not have


def make(seed: int, backend: str = "") -> Case:
    """`backend`: in place of one that is drawn."""
    r = random.Random(seed)
    dtype = r.choices(FLOATS, (4, 3, 2, 0 if backend else 1))[0]
    weights = DRAW | dict.fromkeys(WITHOUT.get(backend, ()), 0)
    call = r.choices(list(weights), weights.values())[0](r, dtype)
    drawn = r.choices(("cpu", "reference"), (5, 1))[0]
    if dtype == torch.float64 or backends.extension is None:  # forced, it is differentiated by autograd
        drawn = r.choice(("", "reference"))
    chosen = {}
    for name in (*call.tensors, *(f"grad {name}" for name in ("out", *TERMS))):
        if r.random() < 0.4:
            chosen[name] = r.choice(list(layouts.SAME)) if r.random() < 0.85 else r.choice(list(layouts.OTHER))
    needed = call.needed()
    need = needed if r.random() < 0.5 else r.sample(needed, r.randint(0, len(needed)))
    return Case(call, dtype, backend or drawn, chosen, need, seed)


def _laid_out(t: Tensor, kind: str | None) -> Tensor:
    view = layouts.ALL[kind](t) if kind else None
    return t if view is None else view


def check(case: Case, device: str = "cpu") -> None:
    """Results and gradients, in the case's layouts."""
    calls.check(
        case.call, case.dtype, case.backend, case.need, lay_out=lambda name, t: _laid_out(t, case.layouts.get(name)),
        roundings=True, seed=case.seed, device=device,
    )  # fmt: skip


NONFINITE_FORMS = PLAIN | {  # of which plain torch multiplies what a query does not see by 0
    "shaped_attention": plain.attention_by_loops,
    "simplified_block": partial(PLAIN["simplified_block"], attention=plain.attention_by_loops),
}


def check_nonfinite(case: Case, device: str = "cpu") -> None:
    """A NaN or an infinity in any small tensor of a call gives a result that is not finite, where plain torch gives one."""
    call, r = case.call, random.Random(case.seed)
    tensors = call.typed(case.dtype)
    ignored = {"logit_bias"} | (
        {"attention_gain"} if "lengths" in tensors else set()
    )  # it cancels; padded tokens have no gain
    for name, t in tensors.items():
        if not t.is_floating_point() or name in ignored or t.numel() > 500:
            continue
        at, value = r.randrange(t.numel()), r.choice((math.inf, -math.inf, math.nan))
        given = tensors | {name: t.clone()}
        given[name].view(-1)[at] = value
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        with forced(case.backend), torch.no_grad():
            found = outputs_of(function_of(call), call, {k: v.to(device) for k, v in given.items()})
        for term, expected in outputs_of(NONFINITE_FORMS[call.op], call, wide).items():
            lost = found[term].cpu().isfinite() & ~expected.isfinite()
            assert not lost.any(), f"{term} is finite: {name}[{at}] = {value}"


def failures(seeds: range, check: Callable = check, backend: str = "", device: str = "cpu") -> list[str]:
    """Of the calls with these numbers those that fail, each with what it was."""
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody wrote is NaN
    try:
        for seed in seeds:
            case = make(seed, backend)
            try:
                check(case, device)
            except Exception as error:
                found.append(f"case {seed}: {type(error).__name__}: {error}\n    {case}")
    finally:
        torch.use_deterministic_algorithms(False)
    return found
