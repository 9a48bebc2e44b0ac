"""What a launch of each Triton kernel must write, in float64 from its own arguments: tighter than a
whole call's result.

A result is what the kernel wrote, the definition's value, and the size that the error is relative
to: by default the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptx.capture import Started
from simplclip.calls.similarity import RowStat  # ColumnStat's numbers are those of the first
from simplclip.kernels.similarity import statistics as kernels
from support.ops import plain
from support.ops.plain import rounded_to_tf32

ERROR = 1e-5  # of float32 sums
STUDENT = kernels.STUDENT.value
TEACHER = kernels.TEACHER.value
UNMATCHED = kernels.UNMATCHED.value
Results = dict[str, tuple[Tensor, ...]]
# Arguments of which the results are sums over programs or parts, and no views.
SUMMED = ("row_parts", "column_parts", "sums")


class Matrix:
    """The similarities of a launch, and which entries are negatives and positives."""

    def __init__(self, a: dict[str, Any], rows: slice, columns: slice):
        def product(image: Tensor, text: Tensor) -> Tensor:
            in_tf32 = a["TILE"].PRECISION == "tf32"
            read = rounded_to_tf32 if in_tf32 else Tensor.detach
            return read(image[rows]).double() @ read(text[columns]).double().T

        self.rows, self.columns = torch.arange(a["n"])[rows], torch.arange(a["m"])[columns]
        self.similarity = product(a["image"], a["text"])
        self.positive = self.columns == self.rows[:, None] + a["label_offset"]
        self.negative = ~self.positive
        if a["ids"] is not None:
            self.negative &= a["ids"][rows, None] != a["text_ids"][columns]
        self.largest_logit = 0.0  # of those computed so far
        self.teacher = None
        if a.get("teacher_image") is not None:
            similarity = product(a["teacher_image"], a["teacher_text"])
            self.teacher = self.logits(similarity, a["teacher_scale"])

    def logits(self, similarity: Tensor, scale: Tensor) -> Tensor:
        logits = similarity * scale.double()
        self.largest_logit = max(self.largest_logit, logits.abs().max().item())
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
    """Returns the statistics of parts [parts, slots, size], and of those before, by number."""
    parts, merged = parts.double(), {}
    slots = {STUDENT: RowStat.LSE_STUDENT}
    if has_teacher:
        slots[TEACHER] = RowStat.LSE_TEACHER
    for slot, stat in slots.items():
        lse = parts[:, slot] + parts[:, slot + 1].log()
        if before is not None:
            lse = torch.cat([before[stat, None], lse])
        merged[stat] = lse.logsumexp(0)
        if slot == TEACHER:
            means = parts[:, slot + 2] / parts[:, slot + 1]
            if before is not None:
                means = torch.cat([before[RowStat.MEAN, None], means])
            merged[RowStat.MEAN] = _mean(lse, merged[stat], means, 0)
    return merged


def statistics(started: Started) -> Results:
    a = started.arguments
    results: Results = {}
    rows = slice(a["first_row"], a["first_row"] + a["row_count"])
    m = Matrix(a, rows, slice(None))
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
    written = slice(a["out_first"], a["out_first"] + a["size"])
    before = None
    if a["PREVIOUS"]:
        before = started.before["out"].double()[:, written]
    merged = _merged(a["parts"], a["HAS_TEACHER"], before)
    if a["HAS_PLANE"]:
        merged[RowStat.PAIR_MATCHING] = a["parts"][:, UNMATCHED].double().sum(0)
    return {f"statistic {stat}": (a["out"][stat, written], exact) for stat, exact in merged.items()}


def diagonal(started: Started) -> Results:
    a = started.arguments
    columns = slice(a["label_offset"], a["label_offset"] + a["n"])
    exact = (a["image"].double() * a["text"][columns].double()).sum(1)
    return {"positives": (a["rows"][a["stat"]], exact)}


def _block(a: dict[str, Any]) -> tuple[slice, slice]:
    """Returns the rows and the columns of a launch that writes a block of G."""
    first, last = a["first_row"], a["first_row"] + a["row_blocks"] * a["TILE"].BLOCK_M
    left, right = a["first_column"], a["first_column"] + a["column_blocks"] * a["TILE"].BLOCK_N
    return slice(first, min(last, a["n"])), slice(left, min(right, a["m"]))


def _stored(a: dict[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the block of G as stored and as defined: 0 between its last column and the pitch."""
    factor = 1 if a["factor"] is None else a["factor"].double()
    rows, columns = g.shape
    stored = min(a["out_stride"], a["column_blocks"] * a["TILE"].BLOCK_N)
    return a["out"][:rows, :stored], pad(g * factor, (0, stored - columns))


def _sums(started: Started, *terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the programs added to their sums, the sums of terms, and their size."""
    differences = started.arguments["sums"].double() - started.before["sums"].double()
    added = differences.sum(0)[: len(terms)]
    return added, torch.stack([t.sum() for t in terms]), torch.stack([t.abs().sum() for t in terms])


def gradient(started: Started) -> Results:
    """Returns G and the sums.

    A logit's rounding error, some 2^-24 of the largest logit, is a relative error of its
    exponential. So an entry of G is as uncertain as the exponentials that it is the sum of.
    """
    a = started.arguments
    rows, columns = _block(a)
    m = Matrix(a, rows, columns)
    row_grads = a["grad_rows"].double()[:, rows, None]
    logits = m.logits(m.similarity, a["scale"])
    sides = [(a["rows"].double()[:, rows, None], row_grads)]
    if a["columns"] is not None:
        column_statistics = a["columns"].double()[:, None, columns]
        sides.append((column_statistics, a["grad_columns"].double()[:, None, columns]))
    softmaxes = [
        _softmax(logits, stats[RowStat.LSE_STUDENT]) * grads[RowStat.LSE_STUDENT]
        for stats, grads in sides
    ]
    if m.teacher is not None:
        softmaxes += [
            -_softmax(m.teacher, stats[RowStat.LSE_TEACHER]) * grads[RowStat.MEAN]
            for stats, grads in sides
        ]
    g, size = sum(softmaxes), sum(each.abs() for each in softmaxes)
    terms, scale = [g * m.similarity], a["scale"].double()
    g, size = g * scale, size * scale.abs()
    if a["plane"] is not None:
        weight, bias = a["plane"].double()
        decision = m.similarity * weight + bias
        slope = decision.sigmoid() * row_grads[RowStat.PAIR_MATCHING]
        slope = torch.where(m.negative, slope, 0)
        terms += [slope * m.similarity, slope]
        g, size = g + slope * weight, size + (slope * weight).abs()
    g = torch.where(m.positive, row_grads[RowStat.DIAGONAL_STUDENT], g)
    size = torch.where(m.positive, g.abs(), size)
    uncertain = 1 + m.largest_logit * 2.0**-22 / ERROR
    (stored, exact), (added, total, of_sums) = _stored(a, g), _sums(started, *terms)
    return {
        "G": (stored, exact, _stored(a, size)[1] * uncertain),
        "sums": (added, total, of_sums * uncertain),
    }


def sigmoid(started: Started) -> Results:
    a = started.arguments
    m = Matrix(a, *_block(a))
    values = []
    weight_slopes = []
    bias_slopes = []
    g = torch.zeros_like(m.similarity)
    for weight, bias, negative, positive, mix in a["sigmoids"].double().T:
        sign = torch.where(m.positive, -1.0, 1.0)
        logits = sign * (m.similarity * weight + bias)
        share = torch.where(m.positive, positive, torch.where(m.negative, negative, 0))
        values.append(share * plain.softplus(logits))
        slope = sign * share * mix * logits.sigmoid()
        weight_slopes.append(slope * m.similarity)
        bias_slopes.append(slope)
        g += slope * weight
    if not a["GRADIENT"]:
        return {"values": _sums(started, *values)}
    return {"G": _stored(a, g), "sums": _sums(started, *values, *weight_slopes, *bias_slopes)}


def range_of_float16(started: Started) -> Results:
    a, bound = started.arguments, 0.0

    def largest(grads: Tensor, stat: RowStat) -> Tensor:
        return grads[stat].abs().max().double()

    if a["grad_rows"] is not None:
        sides = [grads for grads in (a["grad_rows"], a["grad_columns"]) if grads is not None]
        softmaxes = sum(largest(grads, RowStat.LSE_STUDENT) for grads in sides)
        if a["HAS_TEACHER"]:
            softmaxes = softmaxes + sum(largest(grads, RowStat.MEAN) for grads in sides)
        bound = softmaxes * a["scale"].abs()
        if a["plane"] is not None:
            bound += a["plane"][0].abs() * largest(a["grad_rows"], RowStat.PAIR_MATCHING)
        bound = max(bound, largest(a["grad_rows"], RowStat.DIAGONAL_STUDENT))
    sigmoids = () if a["sigmoids"] is None else a["sigmoids"].double().T
    for weight, _, negative, positive, mix in sigmoids:
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
    grad, weight = a["grad"], a["weight"]
    if a["PRECISION"] == "tf32":
        grad, weight = rounded_to_tf32(grad), rounded_to_tf32(weight)
    return {"dh": (a["h"], (grad.double() @ weight.double()) * slope)}


class Attention:
    """The tensors of a launch with 0 at padded tokens, and the uniform attention C."""

    def __init__(self, started: Started):
        self.arguments = a = started.arguments
        first = a["v"].first
        self.valid = torch.ones(first.shape[:2], dtype=torch.bool)
        if a["lengths"] is not None:
            self.valid = torch.arange(a["tokens"]) < a["lengths"][:, None]
        self.alpha, self.beta, self.gamma = a["gains"].double()[:, :, None]
        visible = torch.ones(a["tokens"], a["tokens"], dtype=torch.float64)
        if a["CAUSAL"]:
            visible = visible.tril()
            counts = torch.arange(1, a["tokens"] + 1).double()[:, None]
        else:
            counts = self.valid.sum(1).clamp(min=1)[:, None, None]
        self.uniform = visible / counts  # [L, L] or [B, L, L]

    def tensor(self, name: str) -> Tensor:
        return self.without_padding(self.arguments[name].first.double())

    def without_padding(self, t: Tensor) -> Tensor:
        return t.masked_fill(~self.valid[:, :, None, None], 0)

    def mean(self, t: Tensor) -> Tensor:
        """Returns the mean of each token's visible tokens."""
        return self.without_padding((self.uniform @ t.flatten(2)).view(t.shape))

    def spread(self, t: Tensor) -> Tensor:
        """Returns the gradient of `mean`'s argument."""
        uniform = self.uniform.transpose(-2, -1)
        return self.without_padding((uniform @ t.flatten(2)).view(t.shape))


def attention_terms(started: Started) -> Results:
    x, out = Attention(started), started.arguments["out"].first
    v = x.tensor("v")
    return {"out": (out, x.alpha * v + x.beta * x.tensor("av") - x.gamma * x.mean(v))}


def attention_gradients(started: Started) -> Results:
    x, a = Attention(started), started.arguments
    grad, v = x.tensor("grad"), x.tensor("v")
    spread = x.spread(grad)
    dv = x.alpha * grad + x.beta * x.tensor("v_grad") - x.gamma * spread
    terms = grad * v, grad * x.tensor("av"), -v * spread
    parts = (
        a["parts"],
        torch.stack([t.sum((1, 3)) for t in terms]),
        torch.stack([t.abs().sum((1, 3)) for t in terms]),
    )
    return {
        "dv": (a["dv"].first, dv),
        "dq": (a["dq"].first, a["sign"] * x.beta * x.tensor("q_grad")),
        "dk": (a["dk"].first, x.beta * x.tensor("k_grad")),
        "parts": parts,
    }


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


def _changed_outside(started: Started, results: Results) -> Iterator[str]:
    """Yields the names of arguments that the launch has changed outside of its results."""
    written = [each[0].detach() for each in results.values()]
    for name in started.before.keys() - SUMMED:
        before, now = started.before[name], started.arguments[name].detach()
        storage = now.untyped_storage()
        may_change = torch.zeros(len(storage) // now.itemsize, dtype=torch.bool)
        for t in written:
            if t.untyped_storage().data_ptr() == storage.data_ptr():
                may_change.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
        may_change = may_change.as_strided(now.shape, now.stride(), now.storage_offset())
        equal = (now == before) | (now.isnan() & before.isnan())
        if not (equal | may_change).all():
            yield name


def compare(started: Started) -> dict[str, float]:
    """Returns the largest error of each result in parts of what is allowed, half a unit in the
    last place as well; infinite for an argument that is changed outside of the results.
    """
    results = DEFINITIONS[started.name](started)
    errors = {f"{name}, outside": math.inf for name in _changed_outside(started, results)}
    for name, (written, exact, *size) in results.items():
        limits, empty = torch.finfo(written.dtype), exact == -torch.inf
        written, exact = (
            torch.where(empty & (t == -torch.inf), 0, t.double()) for t in (written, exact)
        )
        rounding = limits.eps / 2 * exact.abs().clamp(min=limits.smallest_normal)
        relative_to = size[0] if size else exact.abs().max()
        allowed = ERROR * relative_to + rounding + 1e-30
        error = ((written - exact).abs() / allowed).max().item()
        errors[name] = math.inf if math.isnan(error) else error
    return errors


def check(started: Started) -> float:
    """Returns the largest error, in parts of what is allowed."""
    errors = compare(started)
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1, (
        f"{started.name}: {worst}: the error is {errors[worst]:.3g} times what is allowed"
    )
    return errors[worst]
