"""Random calls of every op: shapes, dtypes, memory layouts, options, gradients. A number makes a call, and makes it again."""

from __future__ import annotations

import random
from dataclasses import dataclass

import layouts
import plain
import torch
from calls import ATTENTION, MLP, PLAIN, Call, attention_inputs, block_inputs, function_of, mlp_inputs, run
from similarity import make_inputs
from tolerance import assert_within
from torch import Tensor

import simplclip
from simplclip.ops import backends

SIZES = (1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 23, 31, 33, 47, 64, 65)  # primes, and on and off the tiles
WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 48, 65)
TERMS = ("contrastive", "pair_matching", "relational", "interactive")
LOSS_SCALE = 64  # of the gradients that come to a loss, as a GradScaler's, so that halves hold what goes out
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
            f"{self.call.op} {self.dtype} on {self.backend}: {shapes}; {self.call.options}; dtypes {self.call.dtypes}; "
            f"layouts {self.layouts}; gradients of {self.need}"
        )


def _similarity(r: random.Random, dtype: torch.dtype) -> Call:
    n = r.choice(SIZES)
    m, terms = (n if r.random() < 0.6 else n + r.randrange(40)), tuple(r.sample(TERMS, r.choice((1, 1, 2, 3, 4))))
    teacher_width = r.choice(WIDTHS) if r.random() < 0.4 else None
    half = dtype in (torch.bfloat16, torch.float16)
    leaves, options = make_inputs(
        n, m, r.randrange(m - n + 1), terms=terms, plane=r.choice(("scalar", "hadamard")), teacher_width=teacher_width,
        ids=r.random() < 0.4, scale=r.uniform(0.5, 20 if half else 100), width=r.choice(WIDTHS), seed=r.randrange(10**6),
    )  # fmt: skip
    if "text_ids" in options and n == m and r.random() < 0.5:
        options["ids"] = options.pop("text_ids")
    for name in ("ids", "text_ids"):
        if name in options:
            leaves[name] = options.pop(name)
    if r.random() < 0.2:
        leaves["logit_bias"] = torch.tensor(-3.0, dtype=torch.float64)
    if "interactive_scale" in leaves and r.random() < 0.3:
        del leaves["interactive_scale"]
    for name in ("logit_scale", "interactive_scale", "teacher_scale"):
        if name in leaves and r.random() < 0.15:
            options[name] = leaves.pop(name).item()
    options |= {"symmetric": r.random() < 0.7, "divergence": r.choice(("kl", "cross_entropy"))}
    options["interactive"] = r.choice(("infonce", "kl"))
    if "pair_matching" in terms:
        options["negatives"] = r.choice(("all", "shift", "hard"))
        if options["negatives"] == "shift":
            shift = r.randrange(1, max(m, 2))
            options["shift"] = torch.tensor(shift) if r.random() < 0.5 else shift
    if r.random() < 0.4:
        options |= {"scratch_bytes": r.choice((0, 1 << 12, 1 << 16)), "store_bytes": r.choice((0, 1 << 10, 1 << 14))}
    return Call("similarity_loss", leaves, options)


def _lengths(r: random.Random, batch: int, length: int) -> dict[str, Tensor]:
    return {"lengths": torch.tensor([r.randint(0, length) for _ in range(batch)])} if r.random() < 0.4 else {}


def _attention(r: random.Random, dtype: torch.dtype) -> Call:
    b, length = r.choice((1, 2, 3)), r.choice((*SIZES, 77, 241))
    tensors = attention_inputs(b, length, r.choice((1, 2, 3)), r.choice(WIDTHS), seed=r.randrange(10**6))
    options = {"causal": r.random() < 0.5, "scale": r.choice((None, None, 0.3, -0.7))}
    call = Call("shaped_attention", dict(zip(ATTENTION, tensors)) | _lengths(r, b, length), options)
    call.dtypes = {name: r.choice((torch.float32, dtype)) for name in ("alpha", "beta", "gamma")}
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
    return Call("feature_loss", tensors | {"teacher": teacher}, options, {"teacher": r.choice(FLOATS[:3])})


DRAW = {_similarity: 10, _attention: 4, _mlp: 3, _block: 4, _feature: 3}


def make(seed: int) -> Case:
    r = random.Random(seed)
    dtype = r.choices(FLOATS, (4, 3, 2, 1))[0]
    call = r.choices(list(DRAW), DRAW.values())[0](r, dtype)
    backend = r.choices(("cpu", "reference"), (5, 1))[0]
    if dtype == torch.float64 or backends.extension is None:
        backend = "reference"
    if dtype == torch.float64:
        call.dtypes = {name: torch.float64 for name in call.dtypes}
    chosen = {}
    for name in (*call.tensors, *(f"grad {name}" for name in ("out", *TERMS))):
        if r.random() < 0.4:
            chosen[name] = r.choice(list(layouts.SAME)) if r.random() < 0.85 else r.choice(list(layouts.OTHER))
    needed = call.needed()
    need = needed if r.random() < 0.5 else r.sample(needed, r.randint(0, len(needed)))
    return Case(call, dtype, backend, chosen, need, seed)


def _laid_out(t: Tensor, kind: str | None) -> Tensor:
    view = layouts.ALL[kind](t) if kind else None
    return t if view is None else view


def _least(call: Call, gradient: bool) -> float:
    """Below it a result is 0 by cancellation: some hundredths of what is subtracted, logits, or for gradients scale / N."""
    if call.op == "feature_loss":
        return 1e-2
    if call.op != "similarity_loss":
        return 0.3 if call.op == "simplified_block" else 0.1  # the former's are sums over tokens and widths
    given = {**call.tensors, **call.options}
    scale = max(float(given.get(name, 1)) for name in ("logit_scale", "interactive_scale", "teacher_scale"))
    return max(scale, 1) * (0.05 * LOSS_SCALE / given["image"].shape[0] if gradient else 0.01)


def check(case: Case) -> None:
    """Result and gradients are within tolerance of float64's: of plain torch's own error, or of what roundings may change."""
    call = case.call
    kernel = {name: _laid_out(t, case.layouts.get(name)) for name, t in call.typed(case.dtype).items()}
    naive = {name: t.resolve_neg().clone(memory_format=torch.contiguous_format) for name, t in kernel.items()}
    truth = {name: t.double() if t.is_floating_point() else t for name, t in naive.items()}

    def incoming(name: str, result: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(case.seed)
        grad = torch.randn(result.shape, generator=g) * (1 if result.dim() else LOSS_SCALE)
        grad = _laid_out(grad.to(case.dtype), case.layouts.get(f"grad {name}"))
        return grad.to(result.dtype)

    narrow = {name: t.to(case.dtype) if t.is_floating_point() else t for name, t in naive.items()}

    def rounding_changes(name: str) -> float:
        """What float64's result changes by when every number that comes in changes by at most a rounding in the dtype."""
        change = 0.0
        for seed in range(4):
            g = torch.Generator().manual_seed(seed)

            def nearly(t: Tensor) -> Tensor:
                sign = torch.randint(0, 2, t.shape, generator=g) * 2 - 1  # noqa: B023
                return t * (1 + sign * torch.finfo(case.dtype).eps / 2) if t.is_floating_point() else t

            close = {k: nearly(t) for k, t in truth.items()}
            other = run(PLAIN[call.op], call, close, case.need, lambda *args: nearly(incoming(*args)))  # noqa: B023
            change = max(change, (other[name] - exact[name]).abs().max().item())
        return change

    with simplclip.backend(case.backend):
        found = run(function_of(call), call, kernel, case.need, incoming)
    exact = run(PLAIN[call.op], call, truth, case.need, incoming)
    plain = run(PLAIN[call.op], call, narrow if call.op == "similarity_loss" else naive, case.need, incoming)
    for name in found:
        assert found[name].isfinite().all(), f"{name} is not finite"
    for name in found:
        try:
            least = _least(call, name.startswith("d_"))
            assert_within({name: found[name]}, {name: plain[name]}, {name: exact[name]}, case.dtype, least=least)
        except AssertionError:
            error = (found[name].double() - exact[name]).abs().max().item()
            if error > 8 * rounding_changes(name):
                raise


def failures(seeds: range) -> list[str]:
    """Of the calls with these numbers those that fail, each with what it was."""
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody wrote is NaN
    try:
        for seed in seeds:
            case = make(seed)
            try:
                check(case)
            except Exception as error:
                found.append(f"case {seed}: {type(error).__name__}: {error}\n    {case}")
    finally:
        torch.use_deterministic_algorithms(False)
    return found
