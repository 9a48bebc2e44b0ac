"""similarity_loss: losses over similarity matrices, of which only some rows are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import (
    SigmoidCall,
    SimilarityCall,
)
from simplclip.ops import backends, checks, distributed, registry
from simplclip.ops.modes import wants_grad
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.chunks import stored_rows, sweep_rows
from simplclip.ops.similarity.sweeps import FORWARD, SIGMOID
from simplclip.ops.similarity.terms import Options, Sigmoid, merge_columns, values


def similarity_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] s, not its logarithm
    *,
    logit_bias: Tensor | float | None = None,  # []
    terms: tuple[str, ...] = ("contrastive",),
    plane: tuple[Tensor | float, Tensor | float] | None = None,  # (p [] or w [D], q [])
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

    where l = p S + q (scalar plane) or l_ij = w·(x_i ⊙ y_j) + q (hadamard plane) is a learned
    hyperplane that separates matched from unmatched pairs, and T = ŝ x̂ ŷᵀ are the logits of a
    teacher with the features x̂, ŷ. The paper only names pair matching; its form is this library's
    interpretation.

    Args:
        image, text: [N, D] and [M, D] with M ≥ N, float32, bfloat16, float16 or float64, with the
            same dtype and device and any strides; usually L2-normalised, which is not checked.
            Under autocast they are cast to its dtype.
        logit_scale: s, one element (open_clip's `logit_scale.exp()`); a tensor, or what float()
            takes.
        logit_bias: b, one element. Only the term "sigmoid" depends on b; without this term the
            gradient of b is 0.
        terms: any of "contrastive", "sigmoid", "pair_matching", "relational"; the others are not
            computed.
        plane: (p, q) or (w, q), needed by "pair_matching".
        teacher_image, teacher_text, teacher_scale: x̂ [N, D̂], ŷ [M, D̂] (any float dtype; cast to
            image's) and ŝ, needed by "relational". They are constants: one that requires a gradient
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
            64 MiB on a CPU and 128 MiB on a GPU.
        store_bytes: budget of the rows of the similarity matrices that forward keeps on a CPU for
            backward, by default 208 MiB.

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
    inputs.check_options(terms, divergence, symmetric, scratch_bytes, store_bytes)
    if group is not None:
        given = {"image": image, "text": text, "ids": ids}
        given |= {"teacher_image": teacher_image, "teacher_text": teacher_text}
        group = distributed.checked(group, given)
    image, text = inputs.features(image, text)
    n = image.size(0)
    m = text.size(0)
    device = image.device
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = checks.scalar("logit_scale", logit_scale, device, wide)
    bias = None
    if logit_bias is not None:
        bias = checks.scalar("logit_bias", logit_bias, device, wide)
    hyperplane = None
    if "pair_matching" in terms:
        hyperplane = inputs.hyperplane(plane, image)
    if "relational" in terms:
        teacher_image, teacher_text, teacher_scale = inputs.teacher(
            teacher_image, teacher_text, teacher_scale, image, text
        )
    else:
        teacher_image = teacher_text = teacher_scale = None
    if weights is not None:
        weights = inputs.check_weights(weights, terms)
    inputs.check_offset(label_offset, n, m, group)
    if ids is not None or text_ids is not None:
        ids, text_ids = inputs.pair_ids(ids, text_ids, n, m, device, group)
    if group is not None:
        m = n * torch.distributed.get_world_size(group)
        label_offset = n * torch.distributed.get_rank(group)
        text = distributed.gather(text, group)
        if teacher_text is not None:
            teacher_text = distributed.gather(teacher_text, group)
    pairs: dict[str, Any] = {"ids": ids, "text_ids": text_ids, "label_offset": label_offset}

    mix = dict.fromkeys(terms, 1.0) if weights is None else weights
    sigmoids: dict[str, Sigmoid] = {}
    if "sigmoid" in terms:
        shift = 0.0 if bias is None else bias
        sigmoids["sigmoid"] = Sigmoid(scale, shift, 1 / n, 1 / n, mix["sigmoid"])
    joined = None  # the plane of pair matching, if a softmax's sweep computes it
    negatives: Tensor | int = 1
    if hyperplane is not None:
        negatives = max(1, n * (m - 1))
        if ids is not None and text_ids is not None:
            negatives = inputs.count_negatives(ids, text_ids, m, label_offset, group).to(wide)
        if _pair_matching_joins_softmax(hyperplane, terms, image):
            joined = hyperplane
        else:
            factors = (0.5 / negatives, 0.5 / n)
            sigmoids["pair_matching"] = Sigmoid(*hyperplane, *factors, mix["pair_matching"])

    out: dict[str, Any] = dict.fromkeys(terms)
    sums: list[Tensor] = []  # the summands of "loss"
    softmaxes: list[str] = [term for term in ("contrastive", "relational") if term in terms]
    if softmaxes:
        if joined:
            softmaxes.append("pair_matching")
        matrices = 1 if teacher_image is None else 2
        rows_to_store = 0
        if wants_grad(image, text):
            rows_to_store = stored_rows(image, m, matrices, store_bytes)
        call = SimilarityCall(
            image,
            text,
            scale,
            teacher_image,
            teacher_text,
            teacher_scale,
            plane=torch.stack(joined) if joined else None,
            **pairs,
            columns=symmetric,
            entropy=1.0 if divergence == "kl" else 0.0,
            chunk=sweep_rows(image, m, matrices, scratch_bytes),
            stored_rows=rows_to_store,
        )
        options = Options(
            contrastive="contrastive" in terms,
            relational="relational" in terms,
            entropy=call.entropy,
            negatives=negatives,
            weights=None if weights is None else tuple([weights[term] for term in softmaxes]),
        )
        results = _softmax_terms(call, options, joined, group)
        if weights is not None:
            total, *results = results
            sums.append(total)
        out |= zip(softmaxes, results)
    if sigmoids:
        chunk = sweep_rows(image, m, 1, scratch_bytes)
        total, by_term = _sigmoid_terms(image, text, sigmoids, weights is not None, pairs, chunk)
        sums.append(total)
        out |= by_term
    if weights is not None:
        out = {term: value.detach() for term, value in out.items()}
        out["loss"] = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    # a gradient of 0 instead of None, as DistributedDataParallel needs
    if bias is not None and "sigmoid" not in terms:
        last = next(reversed(out))
        out[last] = out[last] + bias.expand(0).sum()  # 0 of an infinite bias too
    return out


def _pair_matching_joins_softmax(
    hyperplane: tuple[Tensor, Tensor], terms: Collection[str], image: Tensor
) -> bool:
    """Whether the kernels of the softmax terms compute the pair matching term too, in one sweep.

    hyperplane: (p [], q []) of a scalar plane, or (w [D], q []) of a hadamard plane, which never
    joins. On a GPU a sweep with a teacher has no registers left for it.
    """
    if hyperplane[0].dim():  # a hadamard plane has a matrix of its own
        return False
    if "relational" not in terms:
        return "contrastive" in terms
    is_triton_forced = backends.forced_for(FORWARD.name, backends.forced()) == "triton"
    return image.device.type == "cpu" and not is_triton_forced


def _softmax_terms(
    call: SimilarityCall, options: Options, plane: tuple[Tensor, Tensor] | None, group: Any
) -> Sequence[Tensor]:
    """Returns the terms [] as terms.values does: weighted sum first if options has weights.

    plane: (p, q) if pair matching joins, else None. group: ranks exchange column statistics.
    """
    rows, columns, _ = registry.call(FORWARD, call)
    n = call.image.shape[0]
    merged = None
    if call.columns and group is not None:
        merged = merge_columns(distributed.exchange_column_statistics(columns, group))
    elif call.columns:
        merged = columns
        if columns.shape[1] != n:
            merged = columns[:, call.label_offset : call.label_offset + n]
    return values(rows, merged, call.scale, call.teacher_scale, plane, options)


def _sigmoid_terms(
    image: Tensor,
    text: Tensor,
    sigmoids: dict[str, Sigmoid],
    summed: bool,
    pairs: dict[str, Any],
    chunk: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the sum [] of the terms, each times its mix, and the terms [] by name.

    sigmoids: the terms' numbers by name. pairs: ids, text_ids and label_offset. chunk: rows in
    scratch. summed: only the sum needs a gradient, so that terms share a sweep. Otherwise each term
    has a sweep and a gradient of its own.
    """
    total: Any = None
    by_term: dict[str, Tensor] = {}
    wide = torch.promote_types(image.dtype, torch.float32)
    is_hadamard = any(sigmoid.weight.dim() for sigmoid in sigmoids.values())
    groups = [[term] for term in sigmoids]
    if summed and not is_hadamard:
        groups = [list(sigmoids)]
    for terms in groups:
        features = image
        columns = []
        for term in terms:
            weight: Any
            weight, *others = sigmoids[term]
            if weight.dim():
                features = (image * weight).to(image.dtype)
                weight = 1.0
            column = [checks.scalar(term, x, image.device, wide) for x in (weight, *others)]
            columns.append(torch.stack(column))
        call = SigmoidCall(
            features,
            text,
            torch.stack(columns, 1),
            **pairs,
            chunk=chunk,
            gradient=False,
            need_image=wants_grad(features),
            need_text=wants_grad(text),
        )
        call = replace(call, gradient=wants_grad(features, text, call.sigmoids))
        weighted, values, *_ = registry.call(SIGMOID, call)
        total = weighted if total is None else total + weighted
        by_term |= zip(terms, values.unbind() if summed else [weighted])
    return total, by_term
