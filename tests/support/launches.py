"""What a launch of each Triton kernel must write, in float64 from its own arguments: tighter than a
whole call's result.

A result is what the kernel wrote, the definition's value, and the size that the error is relative
to: by default the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import plain
import torch
from ptx.capture import Started
from tf32 import rounded
from torch import Tensor

from simplclip.kernels.similarity import statistics
from simplclip.ops.similarity.call import RowStat  # ColumnStat's numbers are those of the first

LOG2E = math.log2(math.e)
ERROR = 1e-5  # of float32 sums
STUDENT, TEACHER, UNMATCHED = (
    slot.value for slot in (statistics.STUDENT, statistics.TEACHER, statistics.UNMATCHED)
)
Results = dict[str, tuple]


class Matrix:
    """The similarities of a launch, and which entries are negatives and positives."""

    def __init__(self, a: dict[str, Any], rows: slice, columns: slice):
        def product(image: Tensor, text: Tensor) -> Tensor:
            read = rounded if a["TILE"].PRECISION == "tf32" else torch.Tensor.detach
            return read(image[rows]).double() @ read(text[columns]).double().T

        self.rows, self.columns = torch.arange(a["n"])[rows], torch.arange(a["m"])[columns]
        self.similarity = product(a["image"], a["text"])
        self.positive = self.columns == self.rows[:, None] + a["label_offset"]
        self.negative = ~self.positive
        if a["ids"] is not None:
            self.negative &= a["ids"][rows, None] != a["text_ids"][columns]
        self.largest, self.teacher = 0.0, None  # largest: logit so far
        if a.get("teacher_image") is not None:
            self.teacher = self.logits(
                product(a["teacher_image"], a["teacher_text"]), a["teacher_scale"]
            )

    def logits(self, similarity: Tensor, scale: Tensor) -> Tensor:
        logits = similarity * scale.double()
        self.largest = max(self.largest, logits.abs().max().item())
        return logits.masked_fill(~self.negative, -torch.inf)


def _softmax(logits: Tensor, log_sums: Tensor) -> Tensor:
    return (logits - log_sums.masked_fill(log_sums == -torch.inf, 0)).exp()


def _unmatched(m: Matrix, plane: Tensor) -> Tensor:
    weight, bias = plane.double()
    return torch.where(m.negative, plain.softplus(m.similarity * weight + bias), 0).sum(1)


def _mean(lse: Tensor, total: Tensor, values: Tensor, axis: int) -> Tensor:
    """Returns the mean of values with the softmax's weights, and 0 where these are none."""
    weights = _softmax(lse, total.unsqueeze(axis))
    return (weights * values.masked_fill(weights == 0, 0)).sum(axis)


def _merged(parts: Tensor, has_teacher: bool, before: Tensor | None = None) -> dict[int, Tensor]:
    """Returns the statistics of parts [parts, slots, size], and of those before, by their
    numbers.
    """
    parts, merged = parts.double(), {}
    for slot, stat in ((STUDENT, RowStat.LSE_STUDENT), (TEACHER, RowStat.LSE_TEACHER))[
        : 1 + has_teacher
    ]:
        lse = (parts[:, slot] + parts[:, slot + 1].log2()) / LOG2E
        if before is not None:
            lse = torch.cat([before[stat, None], lse])
        merged[stat] = lse.logsumexp(0)
        if slot == TEACHER:
            means = parts[:, slot + 2] / parts[:, slot + 1] / LOG2E
            if before is not None:
                means = torch.cat([before[RowStat.MEAN, None], means])
            merged[RowStat.MEAN] = _mean(lse, merged[stat], means, 0)
    return merged


def statistics(started: Started) -> Results:
    a, results = started.arguments, {}
    m = Matrix(a, slice(a["first_row"], a["first_row"] + a["row_count"]), slice(None))
    logits = m.logits(m.similarity, a["scale"])
    for name, axis in (("row_parts", 1), ("column_parts", 0)):
        if a[name] is None:
            continue
        exact = {RowStat.LSE_STUDENT: logits.logsumexp(axis)}
        if m.teacher is not None:
            lse = exact[RowStat.LSE_TEACHER] = m.teacher.logsumexp(axis)
            exact[RowStat.MEAN] = _mean(m.teacher, lse, a["entropy"] * m.teacher - logits, axis)
        merged = _merged(a[name], m.teacher is not None)
        results |= {f"{name} {stat}": (merged[stat], exact[stat]) for stat in exact}
    if a["plane"] is not None:
        results["unmatched"] = a["row_parts"][:, UNMATCHED].sum(0), _unmatched(m, a["plane"])
    return results


def merge(started: Started) -> Results:
    a = started.arguments
    here = slice(a["out_first"], a["out_first"] + a["size"])
    before = started.before["out"].double()[:, here] if a["PREVIOUS"] else None
    merged = _merged(a["parts"], a["HAS_TEACHER"], before)
    if a["HAS_PLANE"]:
        merged[RowStat.PAIR_MATCHING] = a["parts"][:, UNMATCHED].double().sum(0)
    return {f"statistic {stat}": (a["out"][stat, here], exact) for stat, exact in merged.items()}


def diagonal(started: Started) -> Results:
    a = started.arguments
    columns = slice(a["label_offset"], a["label_offset"] + a["n"])
    return {
        "positives": (
            a["rows"][a["stat"]],
            (a["image"].double() * a["text"][columns].double()).sum(1),
        )
    }


def _block(a: dict[str, Any]) -> tuple[slice, slice]:
    """Returns the rows and the columns of a launch that writes a block of G."""
    first, last = a["first_row"], a["first_row"] + a["row_blocks"] * a["TILE"].BLOCK_M
    left, right = a["first_column"], a["first_column"] + a["column_blocks"] * a["TILE"].BLOCK_N
    return slice(first, min(last, a["n"])), slice(left, min(right, a["m"]))


def _stored(a: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    factor = 1 if a["factor"] is None else a["factor"].double()
    return a["out"][: g.shape[0], : g.shape[1]], g * factor


def _sums(started: Started, *terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the programs added to their sums, and the sums of terms.

    The size is that of the terms.
    """
    added = (started.arguments["sums"].double() - started.before["sums"].double()).sum(0)[
        : len(terms)
    ]
    return added, torch.stack([t.sum() for t in terms]), torch.stack([t.abs().sum() for t in terms])


def gradient(started: Started) -> Results:
    """A logit's rounding error, some 2^-24 of the largest logit, is a relative error of its
    exponential. So an entry of G is as uncertain as the exponentials that it is the sum of, and not
    more where the scale is large.
    """
    a = started.arguments
    rows, columns = _block(a)
    m, grads = Matrix(a, rows, columns), a["grad_rows"].double()[:, rows, None]
    logits, sides = m.logits(m.similarity, a["scale"]), [(a["rows"].double()[:, rows, None], grads)]
    if a["columns"] is not None:
        sides.append(
            (a["columns"].double()[:, None, columns], a["grad_columns"].double()[:, None, columns])
        )
    softmaxes = [
        _softmax(logits, stats[RowStat.LSE_STUDENT]) * of[RowStat.LSE_STUDENT]
        for stats, of in sides
    ]
    if m.teacher is not None:
        softmaxes += [
            -_softmax(m.teacher, stats[RowStat.LSE_TEACHER]) * of[RowStat.MEAN]
            for stats, of in sides
        ]
    g, size = sum(softmaxes), sum(each.abs() for each in softmaxes)
    terms, scale = [g * m.similarity], a["scale"].double()
    g, size = g * scale, size * scale.abs()
    if a["plane"] is not None:
        weight, bias = a["plane"].double()
        slope = torch.where(
            m.negative, (m.similarity * weight + bias).sigmoid() * grads[RowStat.PAIR_MATCHING], 0
        )
        terms += [slope * m.similarity, slope]
        g, size = g + slope * weight, size + (slope * weight).abs()
    g = torch.where(m.positive, grads[RowStat.DIAGONAL_STUDENT], g)
    size = torch.where(m.positive, g.abs(), size)
    uncertain = 1 + m.largest * 2.0**-22 / ERROR
    (stored, exact), (added, total, of_sums) = _stored(a, g), _sums(started, *terms)
    return {
        "G": (stored, exact, _stored(a, size)[1] * uncertain),
        "sums": (added, total, of_sums * uncertain),
    }


def sigmoid(started: Started) -> Results:
    a = started.arguments
    m = Matrix(a, *_block(a))
    values = []
    of_weight = []
    of_bias = []
    g = torch.zeros_like(m.similarity)
    for weight, bias, negative, positive, mix in a["sigmoids"].double().T:
        sign = torch.where(m.positive, -1.0, 1.0)
        logits = sign * (m.similarity * weight + bias)
        share = torch.where(m.positive, positive, torch.where(m.negative, negative, 0))
        values.append(share * plain.softplus(logits))
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
        sides = (
            [a["grad_rows"]] if a["grad_columns"] is None else [a["grad_rows"], a["grad_columns"]]
        )
        softmaxes = sum(
            largest(t, RowStat.LSE_STUDENT) + a["HAS_TEACHER"] * largest(t, RowStat.MEAN)
            for t in sides
        )
        bound = softmaxes * a["scale"].abs()
        if a["plane"] is not None:
            bound += a["plane"][0].abs() * largest(a["grad_rows"], RowStat.PAIR_MATCHING)
        bound = max(bound, largest(a["grad_rows"], RowStat.DIAGONAL_STUDENT))
    for weight, _, negative, positive, mix in (
        [] if a["sigmoids"] is None else a["sigmoids"].double().T
    ):
        bound += (weight * mix).abs() * max(negative.abs(), positive.abs())
    power = (10 - (torch.as_tensor(bound).log2() - 1e-6).ceil()).clamp(-100, 100)
    return {"factor": (a["out"], torch.stack([power, -power]).double().exp2())}


def activate(started: Started) -> Results:
    a = started.arguments
    return {"activated": (a["activated"], plain.ACTIVATIONS[a["ACT"]](a["h"].double()))}


def hidden(started: Started) -> Results:
    a = started.arguments
    h = started.before["h"].double().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(plain.ACTIVATIONS[a["ACT"]](h).sum(), h)
    read = (
        (lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32))
        if a["PRECISION"] == "tf32"
        else (lambda t: t)
    )
    return {"dh": (a["h"], (read(a["grad"]).double() @ read(a["weight"]).double()) * slope)}


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
    parts = (
        a["parts"],
        torch.stack([t.sum((1, 3)) for t in terms]),
        torch.stack([t.abs().sum((1, 3)) for t in terms]),
    )
    results = {
        "dv": (a["dv"].first, dv),
        "dq": (a["dq"].first, a["sign"] * x.beta * x.of("q_grad")),
    }
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
    """Returns the largest error of each result, in parts of what is allowed: half a unit in the
    last place as well.
    """
    errors = {}
    for name, (got, exact, *size) in DEFINITIONS[started.name](started).items():
        type, empty = torch.finfo(got.dtype), exact == -torch.inf
        got, exact = (torch.where(empty & (t == -torch.inf), 0, t.double()) for t in (got, exact))
        rounding = type.eps / 2 * exact.abs().clamp(min=type.smallest_normal)
        allowed = ERROR * (size[0] if size else exact.abs().max()) + rounding + 1e-30
        error = ((got - exact).abs() / allowed).max().item()
        errors[name] = math.inf if math.isnan(error) else error
    return errors


def check(started: Started) -> float:
    """Returns the largest error, in parts of what is allowed."""
    errors = compare(started)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= 1, (
        f"{started.name}: {worst}: the error is {errors[worst]:.3g} times what is allowed"
    )
    return errors[worst]
