"""similarity_loss: losses over similarity matrices, of which only some rows are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import DIVERGENCES, SigmoidCall, SimilarityCall
from simplclip.common.terms import PLANE_TERMS, SWEPT, TEACHER_TERMS, TERMS
from simplclip.ops import backends, checks, distributed, registry
from simplclip.ops.modes import autocast, wants_grad
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.sweeps import (
    FORWARD,
    SIGMOID,
    stored_rows,
    sweep_rows,
)

_SOFTMAX = tuple(term.name for term in TERMS if term.sweeps == ("softmax",))
_SIGMOID = tuple(term.name for term in TERMS if term.sweeps == ("sigmoid",))
_EITHER = tuple(term.name for term in TERMS if len(term.sweeps) == 2)  # softmax is preferred
_ENTROPY = {"kl": 1.0, "cross_entropy": 0.0}  # what each divergence counts of the teacher's entropy


def similarity_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] s, not its logarithm
    *,
    logit_bias: Tensor | float | None = None,  # []
    terms: tuple[str, ...] = ("contrastive",),
    plane: tuple[Tensor | float, Tensor | float] | None = None,  # (p [], q [])
    teacher_image: Tensor | None = None,  # [N, D̂]
    teacher_text: Tensor | None = None,  # [M, D̂]
    teacher_scale: Tensor | float | None = None,  # []
    divergence: str = "kl",
    weights: Mapping[str, float] | None = None,
    ids: Tensor | None = None,  # [N] int64 or int32
    text_ids: Tensor | None = None,  # [M] int64 or int32
    label_offset: int = 0,
    symmetric: bool = True,
    group: torch.distributed.ProcessGroup | None = None,
    scratch_bytes: int | None = None,
    store_bytes: int | None = None,
    names: Mapping[str, str] = inputs.NAMES,
) -> dict[str, Tensor]:
    r"""Computes losses of the similarity matrices of image and text features, of which at most
    `store_bytes` are kept.

    With S = image · textᵀ, Z = s S, row i's positive in column y_i = i + label_offset, all other
    columns as its negatives, and the row and column log-sum-exps r, c of Z:

        contrastive    (1/2N) Σ_i [(r_i − Z_{i,y_i}) + (c_{y_i} − Z_{i,y_i})], open_clip's ClipLoss
        sigmoid        (1/N) Σ_i [softplus(−Z_{i,y_i} − b) + Σ over negatives softplus(Z_ij + b)],
                       open_clip's SigLipLoss
        pair_matching  ½ [ mean_i softplus(−l_{i,y_i}) + mean over negatives softplus(l_ij) ]
        relational     ½ [ mean_i KL(softmax T_i ‖ softmax Z_i) + the same over columns ]

    where l = p S + q is a learned hyperplane that separates matched from unmatched pairs, and T =
    ŝ x̂ ŷᵀ are the logits of a teacher with the features x̂, ŷ. The paper only names pair matching;
    its form is this library's interpretation.

    Args:
        image, text: [N, D] and [M, D] with M ≥ N, float32, bfloat16, float16 or float64, with the
            same dtype and device and any strides; usually L2-normalised, which is not checked.
            Under autocast they are cast to its dtype.
        logit_scale: s, one element (open_clip's `logit_scale.exp()`); a tensor, or what float()
            takes.
        logit_bias: b, one element. Only the term sigmoid depends on b; without this term the
            gradient of b is 0.
        terms: names of the terms above; the others are not computed.
        plane: (p, q), one element each, needed by pair_matching.
        teacher_image, teacher_text, teacher_scale: x̂ [N, D̂], ŷ [M, D̂] (any float dtype; cast to
            image's) and ŝ, needed by relational. They are constants: one that requires a gradient
            gets none, with a warning.
        divergence: "kl", or "cross_entropy": the KL without the teacher's entropy, which is
            constant, as in open_clip.DistillClipLoss. Gradients are the same.
        weights: weights of the terms. The result then has "loss" too, their weighted sum, and only
            "loss" has a gradient.
        ids, text_ids: pairs with equal ids, except the positive, are excluded from the negatives of
            every term and from every softmax. text_ids defaults to ids when N = M.
        label_offset: column of the first row's positive, 0 ≤ label_offset ≤ M − N; with gathered
            text features, the position of this rank's own.
        symmetric: if False, only the row direction is used: contrastive = mean_i (r_i − Z_{i,y_i}),
            one half of open_clip's local_loss. With M > N the column direction covers the N columns
            that have a positive.
        group: process group of a distributed batch. image, text, ids and the teacher's features are
            this rank's N rows (equal N on every rank). The value is this rank's share: the mean
            over ranks is the loss of the whole batch. The gradient is that of the sum over ranks,
            as in open_clip with local_loss and gather_with_grad, so that DDP's average is the
            gradient of the batch's loss.
        scratch_bytes: budget of the chunk of a similarity matrix that exists at a time, by default
            64 MiB on a CPU and 128 MiB on a GPU. On a CPU a chunk has at least 64 rows.
        store_bytes: budget of the rows of the similarity matrices that forward keeps on a CPU for
            backward, by default 208 MiB. A larger budget is faster: all rows kept save one of four
            matrix products. By default, on a CPU without a teacher, these rows and a chunk take at
            most twice the bytes of the features' gradients in float32, or are one chunk of 64 rows.
        names: for errors of a caller with other names: what it calls image, text, teacher_image,
            teacher_text and teacher_scale. Such a caller has compared the shapes of the ranks.

    Returns:
        A dict with one 0-dimensional tensor for each term, and "loss" with `weights`, float32
        (float64 for float64 features).

    Gradients flow to image, text, the scale, the bias and the plane. Only first derivatives in
    reverse mode are supported. docs/ops.md has the contracts of memory, rounding and determinism.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and
            what it got.
        RuntimeError: a forced backend does not support the call.

    Source: Radford et al. 2021 (arXiv 2103.00020) for the contrastive term; Yang et al. 2023
    (CLIP-KD, arXiv 2307.12732) for relational (CRD); arXiv 2411.14789 for the system and pair
    matching; Zhai et al. 2023 (arXiv 2303.15343) for sigmoid.
    """
    terms = inputs.checked_terms(terms, SWEPT)
    checks.check_choice("divergence", divergence, DIVERGENCES)
    checks.check_boolean("symmetric", symmetric)
    if group is not None and names is inputs.NAMES:
        tensors = {"image": image, "text": text, "ids": ids}
        tensors |= {"teacher_image": teacher_image, "teacher_text": teacher_text}
        distributed.check_equal_shapes(tensors, group)
    if weights is not None:
        weights = inputs.check_weights(weights, terms)
    inputs.check_budgets(scratch_bytes=scratch_bytes, store_bytes=store_bytes)
    checks.check_features(names["image"], image, "[N, D]")
    checks.check_features(names["text"], text, "[M, D]")
    device = image.device
    if text.dtype != image.dtype or text.device != device or text.shape != image.shape:
        inputs.check_features(names, *autocast(image, text))
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = checks.scalar("logit_scale", logit_scale, device, wide)
    bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, device, wide)
    if ids is not None:
        ids = inputs.check_ids("ids", ids, image.shape[0], "N", device)
    if text_ids is not None:
        text_ids = inputs.check_ids("text_ids", text_ids, text.shape[0], "M", device)
    has_teacher = not TEACHER_TERMS.isdisjoint(terms)
    teacher: Sequence[Any] = (None, None, None)
    if has_teacher:
        why = inputs.why_teacher(terms)
        teacher = teacher_image, teacher_text, teacher_scale
        teacher = inputs.checked_teacher(names, image, text, teacher, why)
    inputs.check_columns(image, text, ids, text_ids, label_offset, group)
    of_plane: Any = None
    if not PLANE_TERMS.isdisjoint(terms):
        of_plane = inputs.checked_plane(plane, image)

    image, text = autocast(image, text)
    teacher = [t if t is None or t.dim() == 0 else t.to(image.dtype) for t in teacher]
    text_ids = ids if text_ids is None else text_ids
    if group is not None:
        text = distributed.gather(text, group)
        label_offset = len(image) * torch.distributed.get_rank(group)
        if text_ids is not None:
            text_ids = distributed.gather(text_ids, group)
        if has_teacher:
            teacher[1] = distributed.gather(teacher[1], group)
    share = None
    if of_plane is not None and ids is not None and text_ids is not None:
        count = inputs.count_negatives(ids, text_ids, len(text), label_offset, group)
        share = 0.5 / count.to(wide)
    softmaxes, sigmoids = _sweeps_of(terms, device)
    values: dict[str, Any] = dict.fromkeys(terms)
    totals = []
    n, m = image.shape[0], text.shape[0]
    if softmaxes:
        matrices = 2 if has_teacher else 1
        chunk = sweep_rows(image, m, matrices, scratch_bytes, keeps=store_bytes is None)
        of_sweep = of_plane if "pair_matching" in softmaxes else (None, None)
        kept_rows = 0
        if wants_grad(image, text, scale, *of_sweep):
            kept_rows = stored_rows(image, m, matrices, store_bytes, chunk)
        mix = weights if weights is not None and len(softmaxes) > 1 else {}
        of_terms_call: Callable = SimilarityCall
        call = of_terms_call(
            image,
            text,
            scale,
            *teacher,
            *of_sweep,
            ids,
            text_ids,
            share,
            label_offset,
            symmetric,
            _ENTROPY[divergence],
            chunk,
            kept_rows,
            "contrastive" in softmaxes,
            mix.get("contrastive", 1.0),
            mix.get("relational", 1.0),
            mix.get("pair_matching", 1.0),
            "" if group is None or not symmetric else group.group_name,
        )
        loss, of_terms, *_ = registry.call(FORWARD, call)
        if len(softmaxes) == 1:
            values[softmaxes[0]] = loss
            if weights is not None and weights[softmaxes[0]] != 1:
                loss = weights[softmaxes[0]] * loss
        else:
            of_terms = of_terms if weights is None else of_terms.detach()
            values |= zip(softmaxes, of_terms.unbind())
        totals.append(loss)
    if sigmoids:
        numbers = {}
        if "sigmoid" in sigmoids:
            numbers["sigmoid"] = [scale, 0.0 if bias is None else bias, 1 / n, 1 / n]
        if "pair_matching" in sigmoids:
            of_negatives = 0.5 / max(1, n * (m - 1)) if share is None else share
            numbers["pair_matching"] = [*of_plane, of_negatives, 0.5 / n]
        chunk = sweep_rows(image, m, 1, scratch_bytes)
        of_sigmoid = SigmoidCall(
            image, text, scale, ids, text_ids, label_offset, chunk, False, False, False
        )
        total, of_sigmoids = _sigmoid_sweeps(of_sigmoid, numbers, weights)
        values |= of_sigmoids
        totals.append(total)
    return _combined(values, totals, bias if "sigmoid" not in terms else None, weights)


def _sweeps_of(terms: Sequence[str], device: torch.device) -> tuple[list[str], list[str]]:
    """Returns the terms of the softmax sweep and those of sigmoid sweeps, in the table's order."""
    softmaxes = [name for name in _SOFTMAX if name in terms]
    sigmoids = [name for name in _SIGMOID if name in terms]
    either = [name for name in _EITHER if name in terms]
    if either and softmaxes:
        # On a GPU a sweep with a teacher has no registers left for pair matching.
        joins = TEACHER_TERMS.isdisjoint(softmaxes) or (
            device.type == "cpu" and backends.forced_for("similarity_loss") != "triton"
        )
        if joins:
            return softmaxes + either, sigmoids
    return softmaxes, sigmoids + either


def _sigmoid_sweeps(
    call: SigmoidCall, numbers: Mapping[str, Sequence[Any]], weights: Mapping[str, float] | None
) -> tuple[Any, dict[str, Tensor]]:
    """Returns the weighted sum, None without weights, and the terms by name.

    They share a sweep if only their sum needs a gradient; else each has a sweep of its own. call:
    without the terms. numbers: of each term those of SigmoidRow but MIX.
    """
    scale = call.sigmoids
    sweeps = [[name] for name in numbers] if weights is None else [list(numbers)]
    by_term: dict[str, Tensor] = {}
    for names in sweeps:
        columns = []
        for name in names:
            mix = 1.0 if weights is None else weights[name]
            of_term = [*numbers[name], mix]
            columns.append([checks.scalar(name, x, scale.device, scale.dtype) for x in of_term])
        flat = [x for row in zip(*columns) for x in row]
        need_image, need_text = wants_grad(call.image), wants_grad(call.text)
        sigmoids = torch.stack(flat).view(-1, len(names))
        gradient = need_image or need_text or wants_grad(sigmoids)
        call = replace(
            call,
            sigmoids=sigmoids,
            gradient=gradient,
            need_image=need_image,
            need_text=need_text,
        )
        total, of_columns, *_ = registry.call(SIGMOID, call)
        if weights is None:
            by_term[names[0]] = total
        else:
            by_term |= zip(names, of_columns.unbind())
    return total, by_term


def _combined(
    values: dict[str, Any],
    totals: Sequence[Tensor],
    unused_bias: Tensor | None,
    weights: Mapping[str, float] | None,
) -> dict[str, Tensor]:
    """Returns the terms, and their sum as "loss" with weights, when it alone has a gradient."""
    if weights is not None:
        values = {name: value.detach() for name, value in values.items()}
        values["loss"] = totals[0] if len(totals) == 1 else totals[0] + totals[1]
    if unused_bias is not None:
        # a gradient of 0 instead of None, as DistributedDataParallel needs
        last = next(reversed(values))
        values[last] = values[last] + unused_bias.expand(0).sum()  # 0 of an infinite bias too
    return values
