"""The way of checked pairs to the terms: which sweep computes which term, and their sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import SigmoidCall, SimilarityCall
from simplclip.common.terms import TERMS
from simplclip.ops import backends, checks, distributed, registry
from simplclip.ops.modes import autocast, wants_grad
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.chunks import stored_rows, sweep_rows
from simplclip.ops.similarity.pairs import Pairs, Settings, Teacher, Values
from simplclip.ops.similarity.sweeps import FORWARD, SIGMOID
from simplclip.ops.similarity.terms import Options, Sigmoid, merge_columns, values

_SWEPT = tuple(term for term in TERMS if term.sweeps)
_ENTROPY = {"kl": 1.0, "cross_entropy": 0.0}  # what each divergence counts of the teacher's entropy


def compute(pairs: Pairs, settings: Settings) -> Values:
    """Returns the terms of pairs that `inputs` has checked, of a batch of all ranks with a group.

    The features may still be those before autocast. See similarity_loss.
    """
    image, text = autocast(pairs.image, pairs.text)
    teacher = pairs.teacher
    if teacher is not None:
        dtype = image.dtype
        teacher = Teacher(teacher.image.to(dtype), teacher.text.to(dtype), teacher.scale)
    text_ids = pairs.ids if pairs.text_ids is None else pairs.text_ids
    pairs = replace(pairs, image=image, text=text, teacher=teacher, text_ids=text_ids)
    if settings.group is not None:
        pairs = _with_all_texts(pairs, settings.group)

    softmaxes, sigmoids = _sweeps_of(settings, image.device)
    negatives: Tensor | int = 1
    if settings.plane is not None:
        negatives = _negatives(pairs, settings.group)
    parts = []
    if softmaxes:
        parts.append(_softmax_sweep(pairs, settings, softmaxes, negatives))
    if sigmoids:
        parts.append(_sigmoid_sweeps(pairs, settings, sigmoids, negatives))
    return _combined(parts, settings, pairs.bias)


def _with_all_texts(pairs: Pairs, group: Any) -> Pairs:
    """Returns this rank's pairs with the texts of all ranks, the teacher's too, as columns."""
    text = distributed.gather(pairs.text, group)
    text_ids = pairs.text_ids
    if text_ids is not None:
        text_ids = distributed.gather(text_ids, group)
    teacher = pairs.teacher
    if teacher is not None:
        teacher = replace(teacher, text=distributed.gather(teacher.text, group))
    offset = len(pairs.image) * torch.distributed.get_rank(group)
    return replace(pairs, text=text, teacher=teacher, text_ids=text_ids, label_offset=offset)


def _sweeps_of(settings: Settings, device: torch.device) -> tuple[list[str], list[str]]:
    """Returns the terms of the softmax sweep and those of sigmoid sweeps, in the table's order."""
    softmaxes: list[str] = []
    sigmoids: list[str] = []
    either = []  # terms that both can compute
    has_teacher = False
    for term in _SWEPT:
        if term.name not in settings.terms:
            continue
        if len(term.sweeps) == 2:
            either.append(term.name)
        elif "softmax" in term.sweeps:
            softmaxes.append(term.name)
            has_teacher = has_teacher or term.needs_teacher
        else:
            sigmoids.append(term.name)
    if either and softmaxes and _joins_softmax(settings.plane, has_teacher, device):
        return softmaxes + either, sigmoids
    return softmaxes, sigmoids + either


def _joins_softmax(
    plane: tuple[Tensor, Tensor] | None, has_teacher: bool, device: torch.device
) -> bool:
    """Whether the kernels of the softmax terms compute pair matching too, in one sweep."""
    if plane is None:
        return False
    if not has_teacher:
        return True
    # On a GPU a sweep with a teacher has no registers left for it.
    is_triton_forced = backends.forced_for(FORWARD.name, backends.forced()) == "triton"
    return device.type == "cpu" and not is_triton_forced


def _negatives(pairs: Pairs, group: Any) -> Tensor | int:
    """Returns the number of all negatives, at least 1; with a group the mean over the ranks."""
    n = pairs.image.shape[0]
    m = pairs.text.shape[0]
    if pairs.ids is None or pairs.text_ids is None:
        return max(1, n * (m - 1))
    count = inputs.count_negatives(pairs.ids, pairs.text_ids, m, pairs.label_offset, group)
    return count.to(pairs.scale.dtype)


def _softmax_sweep(
    pairs: Pairs, settings: Settings, terms: list[str], negatives: Tensor | int
) -> Values:
    """Returns the terms from statistics of rows and columns, of which ranks exchange the latter."""
    plane = settings.plane if "pair_matching" in terms else None
    teacher: Any = pairs.teacher or Teacher(None, None)  # type: ignore[arg-type]
    image = pairs.image
    n = image.shape[0]
    m = pairs.text.shape[0]
    matrices = 1 if pairs.teacher is None else 2
    keeps = settings.store_bytes is None
    chunk = sweep_rows(image, m, matrices, settings.scratch_bytes, keeps=keeps)
    rows_to_store = 0
    if wants_grad(image, pairs.text, pairs.scale, *(plane or ())):
        rows_to_store = stored_rows(image, m, matrices, settings.store_bytes, chunk)
    call = SimilarityCall(
        image,
        pairs.text,
        pairs.scale,
        teacher.image,
        teacher.text,
        teacher.scale,
        plane=None if plane is None else torch.stack(plane),
        ids=pairs.ids,
        text_ids=pairs.text_ids,
        label_offset=pairs.label_offset,
        columns=settings.symmetric,
        entropy=_ENTROPY[settings.divergence],
        chunk=chunk,
        stored_rows=rows_to_store,
    )
    rows, columns, _ = registry.call(FORWARD, call)
    merged = None
    if call.columns and settings.group is not None:
        merged = merge_columns(distributed.exchange_column_statistics(columns, settings.group))
    elif call.columns:
        merged = columns
        if columns.shape[1] != n:
            merged = columns[:, call.label_offset : call.label_offset + n]
    weights = settings.weights
    options = Options(
        contrastive="contrastive" in terms,
        relational="relational" in terms,
        entropy=call.entropy,
        negatives=negatives,
        weights=None if weights is None else tuple([weights[term] for term in terms]),
    )
    results = values(rows, merged, call.scale, call.teacher_scale, plane, options)
    total = None if weights is None else results.pop(0)
    return Values(total, dict(zip(terms, results, strict=True)))


def _sigmoid_sweeps(
    pairs: Pairs, settings: Settings, terms: list[str], negatives: Tensor | int
) -> Values:
    """Returns the terms, which share a sweep if only their sum needs a gradient.

    Otherwise each term has a sweep and a gradient of its own.
    """
    image = pairs.image
    n = image.shape[0]
    mix = settings.weights or dict.fromkeys(terms, 1.0)
    numbers: dict[str, Sigmoid] = {}
    for term in terms:
        if term == "sigmoid":
            shift = 0.0 if pairs.bias is None else pairs.bias
            numbers[term] = Sigmoid(pairs.scale, shift, 1 / n, 1 / n, mix[term])
        elif term == "pair_matching":
            assert settings.plane is not None
            weight, bias = settings.plane
            numbers[term] = Sigmoid(weight, bias, 0.5 / negatives, 0.5 / n, mix[term])
    sweeps = [[term] for term in terms]
    if settings.weights is not None:
        sweeps = [terms]
    chunk = sweep_rows(image, pairs.text.shape[0], 1, settings.scratch_bytes)
    total: Any = None
    by_term: dict[str, Tensor] = {}
    for sweep in sweeps:
        columns = []
        for term in sweep:
            dtype = pairs.scale.dtype
            columns.append([checks.scalar(term, x, image.device, dtype) for x in numbers[term]])
        call = SigmoidCall(
            image,
            pairs.text,
            torch.stack([x for row in zip(*columns) for x in row]).view(-1, len(sweep)),
            ids=pairs.ids,
            text_ids=pairs.text_ids,
            label_offset=pairs.label_offset,
            chunk=chunk,
            gradient=False,
            need_image=wants_grad(image),
            need_text=wants_grad(pairs.text),
        )
        call = replace(call, gradient=wants_grad(image, pairs.text, call.sigmoids))
        weighted, by_column, *_ = registry.call(SIGMOID, call)
        if settings.weights is None:
            by_term[sweep[0]] = weighted
        else:
            total = weighted if total is None else total + weighted
            by_term |= zip(sweep, by_column.unbind())
    return Values(total, by_term)


def _combined(parts: list[Values], settings: Settings, bias: Tensor | None) -> Values:
    """Returns the terms of all sweeps in the order of the call, and their sum with weights."""
    terms: dict[str, Any] = dict.fromkeys(settings.terms)
    for part in parts:
        terms |= part.terms
    total: Any = None
    if settings.weights is not None:
        terms = {name: value.detach() for name, value in terms.items()}
        total = parts[0].total
        for part in parts[1:]:
            total = total + part.total
    # a gradient of 0 instead of None, as DistributedDataParallel needs
    if bias is not None and "sigmoid" not in terms:
        zero = bias.expand(0).sum()  # 0 of an infinite bias too
        if total is not None:
            return Values(total + zero, terms)
        last = settings.terms[-1]
        terms[last] = terms[last] + zero
    return Values(total, terms)
