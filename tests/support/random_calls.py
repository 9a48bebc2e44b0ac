"""Random calls of every op: shapes, dtypes, memory layouts, options, gradients. A call can be made again from its number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import layouts
import plain
import torch
from calls import PLAIN, OfPlain, check_case
from torch import Tensor

from simplclip.ops import backends
from simplclip.selftest.calls import DRAW, FLOATS, TERMS, Call
from simplclip.selftest.compare import forced, function_of, outputs_of


@dataclass
class Draw:
    call: Call
    dtype: torch.dtype
    backend: str
    layouts: dict[str, str]  # layouts of tensors, and of incoming gradients as "grad NAME"
    need: list[str]
    seed: int

    def __str__(self) -> str:
        how = f"{self.dtype} on {self.backend or 'the first'}"
        return f"{how}, {self.call}; layouts {self.layouts}; gradients of {self.need}"


OFTEN = {"similarity_loss": 10, "shaped_attention": 4, "parallel_mlp": 3, "simplified_block": 4, "feature_loss": 3}
WITHOUT = {"triton": ("shaped_attention",), "sdpa": ("similarity_loss", "parallel_mlp", "feature_loss")}  # what backends lack


def make(seed: int, backend: str = "") -> Draw:
    """Makes the call of a number. backend: replaces the backend that is drawn."""
    r = random.Random(seed)
    dtype = r.choices(FLOATS, (4, 3, 2, 0 if backend else 1))[0]
    weights = OFTEN | dict.fromkeys(WITHOUT.get(backend, ()), 0)
    call = DRAW[r.choices(list(weights), weights.values())[0]](r, dtype)
    drawn = r.choices(("cpu", "reference"), (5, 1))[0]
    if dtype == torch.float64 or backends.extension is None:  # a forced reference is differentiated by autograd
        drawn = r.choice(("", "reference"))
    chosen = {}
    for name in (*call.tensors, *(f"grad {name}" for name in ("out", *TERMS))):
        if r.random() < 0.4:
            chosen[name] = r.choice(list(layouts.SAME)) if r.random() < 0.85 else r.choice(list(layouts.OTHER))
    needed = call.needed()
    need = needed if r.random() < 0.5 else r.sample(needed, r.randint(0, len(needed)))
    return Draw(call, dtype, backend or drawn, chosen, need, seed)


def _laid_out(t: Tensor, kind: str | None) -> Tensor:
    view = layouts.ALL[kind](t) if kind else None
    return t if view is None else view


def check(case: Draw, device: str = "cpu") -> None:
    """Checks results and gradients in the layouts of the draw."""
    of_plain = OfPlain(
        case.call, case.dtype, case.backend, case.need, case.seed, device=device,
        lay_out=lambda name, t: _laid_out(t, case.layouts.get(name)),
    )  # fmt: skip
    check_case(of_plain, roundings=True)


NONFINITE_FORMS = PLAIN | {  # plain torch's attention multiplies what a query does not see by 0, so that NaN spreads
    "shaped_attention": plain.attention_by_loops,
    "simplified_block": partial(PLAIN["simplified_block"], attention=plain.attention_by_loops),
}


def check_nonfinite(case: Draw, device: str = "cpu") -> None:
    """Checks that a NaN or infinity in a small tensor makes results non-finite where plain torch's are."""
    call, r = case.call, random.Random(case.seed)
    tensors = call.typed(case.dtype)
    ignored = {"logit_bias"} | (
        {"attention_gain"} if "lengths" in tensors else set()
    )  # logit_bias cancels; padded tokens have no gain
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
    """Returns an error for each of the calls with these numbers that fails."""
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes unwritten memory NaN
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
