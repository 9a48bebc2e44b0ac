"""What a launch of each Triton kernel must write, in float64 from its own arguments: tighter than a whole call's result.

A result is a pair: what the kernel wrote, and the definition's value. Its error is relative to the largest value, or to the
size of the terms of a sum, which may be given as a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from ptx.capture import Started
from torch import Tensor

from simplclip.kernels.similarity.forward import LSE_STUDENT, LSE_TEACHER, MEAN, PAIR_MATCHING
from simplclip.ops.similarity.call import ColumnStat, RowStat

LOG2E = math.log2(math.e)
ERROR = 1e-5  # of float32 sums
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of what is stored
Results = dict[str, tuple]


def _features(t: Tensor, precision: str) -> Tensor:
    """Returns the numbers that are multiplied, in float64: TF32 numbers rounded to nearest, ties away from zero."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double() if precision == "tf32" else t.double()


class Matrix:
    """The similarities of a launch, and which entries are negatives and positives."""

    def __init__(self, a: dict[str, Any], rows: slice, columns: slice):
        precision = a["TILE"].PRECISION
        self.rows, self.columns = torch.arange(a["n"])[rows], torch.arange(a["m"])[columns]
        self.similarity = _features(a["image"][rows], precision) @ _features(a["text"][columns], precision).T
        self.positive = self.columns == self.rows[:, None] + a["label_offset"]
        self.negative = ~self.positive
        if a["ids"] is not None:
            self.negative &= a["ids"][rows, None] != a["text_ids"][columns]
        self.teacher = None
        if a.get("teacher_image") is not None:
            teacher = _features(a["teacher_image"][rows], precision) @ _features(a["teacher_text"][columns], precision).T
            self.teacher = (teacher * a["teacher_scale"].double()).masked_fill(~self.negative, -torch.inf)

    def logits(self, scale: Tensor) -> Tensor:
        return (self.similarity * scale.double()).masked_fill(~self.negative, -torch.inf)


def _softmax(logits: Tensor, shift: Tensor) -> Tensor:
    return (logits - shift.masked_fill(shift == -torch.inf, 0)).exp()


def _part(got: Tensor, logits: Tensor, axis: int, gap: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns pairs of the log-sum-exps and, if there is a gap, of the means, from slots [maximum, sum, ...] in base 2."""
    lse = (got[0].double() + got[1].double().log2()) / LOG2E
    exact = logits.logsumexp(axis)
    empty = exact == -torch.inf
    pair = lse.masked_fill(empty, 0), exact.masked_fill(empty, 0)
    if gap is None:
        return (pair,)
    weights = _softmax(logits, exact.unsqueeze(axis))
    mean = (weights * gap.masked_fill(weights == 0, 0)).sum(axis)
    return pair, ((got[2].double() / got[1] / LOG2E).masked_fill(empty, 0), mean)


def statistics(started: Started) -> Results:
    a, results = started.arguments, {}
    rows = slice(a["first_row"], a["first_row"] + a["row_count"])
    m = Matrix(a, rows, slice(None))
    logits, gap = m.logits(a["scale"]), None
    if m.teacher is not None:
        gap = a["entropy"] * m.teacher - logits
    width = a["tiles_per_split"] * a["TILE"].BLOCK_N
    for split in range(a["splits"]):
        part, here = a["row_parts"][split], slice(split * width, (split + 1) * width)
        (results[f"row lse {split}"],) = _part(part, logits[:, here], 1)
        if gap is not None:
            teacher = _part(part[2:], m.teacher[:, here], 1, gap[:, here])
            results[f"row teacher {split}"], results[f"row mean {split}"] = teacher
        if a["plane"] is not None:
            plane = m.similarity[:, here] * a["plane"][0].double() + a["plane"][1].double()
            unmatched = torch.where(m.negative[:, here], torch.nn.functional.softplus(plane, threshold=80), 0).sum(1)
            results[f"unmatched {split}"] = part[5], unmatched
    for block in range(a["row_blocks"] if a["column_parts"] is not None else 0):
        part, here = a["column_parts"][block], slice(block * a["TILE"].BLOCK_M, (block + 1) * a["TILE"].BLOCK_M)
        (results[f"column lse {block}"],) = _part(part, logits[here], 0)
        if gap is not None:
            teacher = _part(part[2:], m.teacher[here], 0, gap[here])
            results[f"column teacher {block}"], results[f"column mean {block}"] = teacher
    return results


def merge(started: Started) -> Results:
    a, results = started.arguments, {}
    parts, here = a["parts"].double(), slice(a["out_first"], a["out_first"] + a["size"])
    out, before = a["out"][:, here], started.before["out"].double()[:, here]

    def softmax(slot: int, stat: int, mean: bool) -> None:
        lse = (parts[:, slot] + parts[:, slot + 1].log2()) / LOG2E
        if a["PREVIOUS"]:
            lse = torch.cat([before[stat][None], lse])
        total = lse.logsumexp(0)
        results[f"lse {stat}"] = out[stat].nan_to_num(neginf=0), total.nan_to_num(neginf=0)
        if mean:
            means, shares = parts[:, slot + 2] / parts[:, slot + 1] / LOG2E, _softmax(lse, total)
            if a["PREVIOUS"]:
                means = torch.cat([before[MEAN.value][None], means])
            results["mean"] = out[MEAN.value], (shares * means.masked_fill(shares == 0, 0)).sum(0)

    softmax(0, LSE_STUDENT.value, False)
    if a["HAS_TEACHER"]:
        softmax(2, LSE_TEACHER.value, True)
    if a["HAS_PLANE"]:
        results["unmatched"] = out[PAIR_MATCHING.value], parts[:, 5].sum(0)
    return results


def diagonal(started: Started) -> Results:
    a = started.arguments
    columns = slice(a["label_offset"], a["label_offset"] + a["n"])
    return {"positives": (a["rows"][a["stat"]], (a["image"].double() * a["text"][columns].double()).sum(1))}


def _block(a: dict[str, Any]) -> tuple[slice, slice]:
    """Returns the rows and the columns of a launch that writes a block of G."""
    first, last = a["first_row"], a["first_row"] + a["row_blocks"] * a["TILE"].BLOCK_M
    left, right = a["first_column"], a["first_column"] + a["column_blocks"] * a["TILE"].BLOCK_N
    return slice(first, min(last, a["n"])), slice(left, min(right, a["m"]))


def _stored(a: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    factor = 1 if a["factor"] is None else a["factor"].double()
    return a["out"][: g.shape[0], : g.shape[1]], g * factor


def _sums(started: Started, *terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the programs added to their sums, and the sums of terms. The size is that of the terms."""
    added = (started.arguments["sums"].double() - started.before["sums"].double()).sum(0)[: len(terms)]
    return added, torch.stack([t.sum() for t in terms]), torch.stack([t.abs().sum() for t in terms])


def gradient(started: Started) -> Results:
    a = started.arguments
    rows, columns = _block(a)
    m, of_rows, grads = Matrix(a, rows, columns), a["rows"].double()[:, rows, None], a["grad_rows"].double()[:, rows, None]
    logits = m.logits(a["scale"])
    g = _softmax(logits, of_rows[RowStat.LSE_STUDENT]) * grads[RowStat.LSE_STUDENT]
    if m.teacher is not None:
        g -= _softmax(m.teacher, of_rows[RowStat.LSE_TEACHER]) * grads[RowStat.MEAN]
    if a["columns"] is not None:
        of_columns, of_grads = a["columns"].double()[:, columns], a["grad_columns"].double()[:, columns]
        g += _softmax(logits, of_columns[ColumnStat.LSE_STUDENT]) * of_grads[ColumnStat.LSE_STUDENT]
        if m.teacher is not None:
            g -= _softmax(m.teacher, of_columns[ColumnStat.LSE_TEACHER]) * of_grads[ColumnStat.MEAN]
    terms = [g * m.similarity]
    g = g * a["scale"].double()
    if a["plane"] is not None:
        weight, bias = a["plane"].double()
        slope = torch.where(m.negative, (m.similarity * weight + bias).sigmoid() * grads[RowStat.PAIR_MATCHING], 0)
        terms += [slope * m.similarity, slope]
        g += slope * weight
    g = torch.where(m.positive, grads[RowStat.DIAGONAL_STUDENT], g)
    # A logit has an error of 2^-24 of the largest, so that its exponential is that much less certain.
    matrices = [logits] if m.teacher is None else [logits, m.teacher]
    largest = max(1.0, *(each.masked_fill(~m.negative, 0).abs().max().item() / 100 for each in matrices))
    (stored, exact), (added, total, size) = _stored(a, g), _sums(started, *terms)
    return {"G": (stored, exact, exact.abs().max() * largest), "sums": (added, total, size * largest)}


def sigmoid(started: Started) -> Results:
    a = started.arguments
    m = Matrix(a, *_block(a))
    values, of_weight, of_bias, g = [], [], [], torch.zeros_like(m.similarity)
    for weight, bias, negative, positive, mix in a["sigmoids"].double().T:
        sign = torch.where(m.positive, -1.0, 1.0)
        logits = sign * (m.similarity * weight + bias)
        share = torch.where(m.positive, positive, torch.where(m.negative, negative, 0))
        values.append(share * torch.nn.functional.softplus(logits, threshold=80))
        slope = sign * share * mix * logits.sigmoid()
        of_weight.append(slope * m.similarity)
        of_bias.append(slope)
        g += slope * weight
    if not a["GRADIENT"]:
        return {"values": _sums(started, *values)}
    return {"G": _stored(a, g), "sums": _sums(started, *values, *of_weight, *of_bias)}


def range_of_float16(started: Started) -> Results:
    a, bound = started.arguments, 0.0
    if a["grad_rows"] is not None:
        largest = lambda t, stat: t[stat].abs().max().double()  # noqa: E731
        sides = [a["grad_rows"]] if a["grad_columns"] is None else [a["grad_rows"], a["grad_columns"]]
        softmaxes = sum(largest(t, RowStat.LSE_STUDENT) + a["HAS_TEACHER"] * largest(t, RowStat.MEAN) for t in sides)
        bound = softmaxes * a["scale"].abs()
        if a["plane"] is not None:
            bound += a["plane"][0].abs() * largest(a["grad_rows"], RowStat.PAIR_MATCHING)
        bound = max(bound, largest(a["grad_rows"], RowStat.DIAGONAL_STUDENT))
    for weight, _, negative, positive, mix in [] if a["sigmoids"] is None else a["sigmoids"].double().T:
        bound += (weight * mix).abs() * max(negative.abs(), positive.abs())
    power = (10 - (torch.as_tensor(bound).log2() - 1e-6).ceil()).clamp(-100, 100)
    return {"factor": (a["out"], torch.stack([power, -power]).double().exp2())}


def activate(started: Started) -> Results:
    a = started.arguments
    return {"activated": (a["activated"], ACTIVATIONS[a["ACT"]](a["h"].double()))}


def hidden(started: Started) -> Results:
    a = started.arguments
    h = started.before["h"].double().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(ACTIVATIONS[a["ACT"]](h).sum(), h)
    read = (lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32)) if a["PRECISION"] == "tf32" else (lambda t: t)
    return {"dh": (a["h"], (read(a["grad"]).double() @ read(a["weight"]).double()) * slope)}


ACTIVATIONS: dict[str, Callable] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    "quickgelu": lambda h: h * torch.sigmoid(1.702 * h),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


class Attention:
    """The tensors of a launch with 0 at padded tokens, and the uniform attention C."""

    def __init__(self, started: Started):
        self.arguments = a = started.arguments
        first = a["v"].first
        self.valid = torch.ones(first.shape[:2], dtype=torch.bool)
        if a["lengths"] is not None:
            self.valid = torch.arange(a["tokens"]) < a["lengths"][:, None]
        self.alpha, self.beta, self.gamma = a["gains"].double()[:, :, None]
        counts = (
            torch.arange(1, a["tokens"] + 1).double()[:, None]
            if a["CAUSAL"]
            else self.valid.sum(1).clamp(min=1)[:, None, None]
        )
        uniform = torch.ones(a["tokens"], a["tokens"], dtype=torch.float64)
        self.uniform = (uniform.tril() if a["CAUSAL"] else uniform) / counts  # [L, L] or [B, L, L]

    def of(self, name: str) -> Tensor:
        return self.arguments[name].first.double().masked_fill(~self.valid[:, :, None, None], 0)

    def mean(self, t: Tensor, transposed: bool = False) -> Tensor:
        uniform = self.uniform.transpose(-2, -1) if transposed else self.uniform
        return (uniform @ t.flatten(2)).view(t.shape).masked_fill(~self.valid[:, :, None, None], 0)


def attention_terms(started: Started) -> Results:
    x, out = Attention(started), started.arguments["out"].first
    v = x.of("v")
    return {"out": (out, x.alpha * v + x.beta * x.of("av") - x.gamma * x.mean(v))}


def attention_gradients(started: Started) -> Results:
    x, a = Attention(started), started.arguments
    grad, v = x.of("grad"), x.of("v")
    spread = x.mean(grad, transposed=True)
    dv = x.alpha * grad + x.beta * x.of("v_grad") - x.gamma * spread
    terms = grad * v, grad * x.of("av"), -v * spread
    parts = a["parts"], torch.stack([t.sum((1, 3)) for t in terms]), torch.stack([t.abs().sum((1, 3)) for t in terms])
    results = {"dv": (a["dv"].first, dv), "dq": (a["dq"].first, a["sign"] * x.beta * x.of("q_grad"))}
    return results | {"dk": (a["dk"].first, x.beta * x.of("k_grad")), "parts": parts}


DEFINITIONS: dict[str, Callable[[Started], Results]] = {
    "_similarity_statistics_kernel": statistics,
    "_similarity_merge_kernel": merge,
    "_similarity_diagonal_kernel": diagonal,
    "_similarity_gradient_kernel": gradient,
    "_similarity_sigmoid_kernel": sigmoid,
    "_similarity_range_kernel": range_of_float16,
    "_parallel_mlp_activate_kernel": activate,
    "_parallel_mlp_hidden_kernel": hidden,
    "_shaped_attention_terms_kernel": attention_terms,
    "_shaped_attention_gradients_kernel": attention_gradients,
}


def compare(started: Started) -> dict[str, float]:
    """Returns the largest error of each result, in parts of what is allowed."""
    errors = {}
    for name, (got, exact, *size) in DEFINITIONS[started.name](started).items():
        scale = size[0] if size else exact.abs().max()
        allowed = (
            ERROR * scale + HALF_ULP[got.dtype] * exact.abs() + 1e-30 if got.dtype in HALF_ULP else ERROR * scale + 1e-30
        )
        error = ((got.double() - exact).abs() / allowed).max().item()
        errors[name] = math.inf if math.isnan(error) else error
    return errors


def check(started: Started) -> float:
    """Returns the largest error, in parts of what is allowed."""
    errors = compare(started)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1, f"{started.name}: {worst}: the error is {errors[worst]:.3g} times what is allowed"
    return errors[worst]
