"""similarity_loss: losses over similarity matrices, of which only some rows are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simplclip.calls.similarity import DIVERGENCES
from simplclip.common.terms import PLANE_TERMS, SWEPT
from simplclip.ops import checks, distributed
from simplclip.ops.similarity import inputs, route
from simplclip.ops.similarity.pairs import Pairs, Settings, Teacher


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
    if group is not None:
        tensors = {"image": image, "text": text, "ids": ids}
        tensors |= {"teacher_image": teacher_image, "teacher_text": teacher_text}
        distributed.check_equal_shapes(tensors, group)
    if weights is not None:
        weights = inputs.check_weights(weights, terms)
    checks.check_features("image", image, "[N, D]")
    checks.check_features("text", text, "[M, D]")
    given: Any = Pairs(
        image,
        text,
        logit_scale,  # type: ignore[arg-type]
        logit_bias,  # type: ignore[arg-type]
        ids,
        Teacher(teacher_image, teacher_text, teacher_scale),  # type: ignore[arg-type]
        text_ids,
        label_offset,
    )
    pairs = inputs.checked(given, inputs.NAMES, terms)
    inputs.check_columns(pairs, group)
    hyperplane = None
    if not PLANE_TERMS.isdisjoint(terms):
        hyperplane = inputs.checked_plane(plane, image)
    settings = Settings(
        terms, weights, hyperplane, divergence, symmetric, group, scratch_bytes, store_bytes
    )
    inputs.check_budgets(settings)
    total, values = route.compute(pairs, settings)
    return values if total is None else values | {"loss": total}
