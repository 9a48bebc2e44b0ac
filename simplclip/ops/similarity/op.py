"""similarity_loss: losses over similarity matrices of image and text features.

Only some rows of the matrices are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.ops import backends, checks, distributed, registry
from simplclip.ops.calls import by_name
from simplclip.ops.registry import define, register_gradient, wants_grad
from simplclip.ops.similarity import inputs, reference
from simplclip.ops.similarity.call import (
    ColumnStat,
    RowStat,
    SigmoidCall,
    SimilarityCall,
    SimilarityGradient,
)
from simplclip.ops.similarity.chunks import computes_in, stored_rows, sweep_rows
from simplclip.ops.similarity.terms import Options, merge_columns, values

MATRICES = ("image", "text", "teacher_image", "teacher_text")


def _prepared(call: Any) -> Any:
    """Returns the call with features in the dtype of the products."""
    dtype = computes_in(call.image.dtype, call.image.device.type)
    if call.image.dtype == dtype:
        return call
    features = {name: getattr(call, name, None) for name in MATRICES}
    return replace(call, **{name: t.to(dtype) for name, t in features.items() if t is not None})


def _fwd(function: Callable, call: SimilarityCall) -> tuple[Tensor, Tensor, Tensor]:
    return function(_prepared(call))


def _fwd_fake(call: SimilarityCall, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    image, m = call.image, call.text.shape[0]
    compute = computes_in(image.dtype, image.device.type)
    return (
        call.scale.new_empty(len(RowStat), image.shape[0]),
        call.scale.new_empty(len(ColumnStat), m),
        image.new_empty(
            call.matrices if call.stored_rows else 0, call.stored_rows, m, dtype=compute
        ),
    )


def _bwd(function: Callable, call: SimilarityGradient) -> tuple[Tensor, ...]:
    d_image, d_text, *others = function(_prepared(call))
    return d_image.to(call.image.dtype), d_text.to(call.text.dtype), *others


def _empty_gradients(
    call: SimilarityGradient | SigmoidCall, dtype: torch.dtype
) -> Iterator[Tensor]:
    return (
        t.new_empty(t.shape if needed else (0, t.shape[1]), dtype=dtype)
        for t, needed in ((call.image, call.need_image), (call.text, call.need_text))
    )


def _bwd_fake(call: SimilarityGradient, spec: str) -> tuple[Tensor, ...]:
    return (
        *_empty_gradients(call, call.image.dtype),
        call.scale.new_empty(()),
        call.scale.new_empty(2),
    )


def _sigmoid(function: Callable, call: SigmoidCall) -> tuple[Tensor, ...]:
    values, *gradients = function(_prepared(call))
    return (values * call.sigmoids[4]).sum(), values, *gradients


def _sigmoid_results(call: SigmoidCall) -> tuple[Tensor, ...]:
    """Returns a backend's fake results.

    For float16, gradients are stored in float32, which does not lose entries of 1/N².
    """
    compute = computes_in(call.image.dtype, call.image.device.type)
    stored = torch.float32 if compute == torch.float16 else compute
    return (
        call.sigmoids.new_empty(call.sigmoids.shape[1]),
        *_empty_gradients(call, stored),
        torch.empty_like(call.sigmoids[:2]),
    )


def _sigmoid_fake(call: SigmoidCall, spec: str) -> tuple[Tensor, ...]:
    return call.sigmoids.new_empty(()), *_sigmoid_results(call)


FORWARD = define(
    "similarity_loss_fwd", SimilarityCall, "(Tensor, Tensor, Tensor)", _fwd, _fwd_fake,
    row=backends.row(reference.similarity_loss_fwd, SimilarityCall, module="similarity.op"),
)  # fmt: skip
BACKWARD = define(
    "similarity_loss_bwd", SimilarityGradient, "(Tensor, Tensor, Tensor, Tensor)", _bwd, _bwd_fake,
    row=backends.row(reference.similarity_loss_bwd, SimilarityGradient, module="similarity.op"),
)  # fmt: skip
SIGMOID = define(
    "similarity_sigmoid",
    SigmoidCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid,
    _sigmoid_fake,
    row=backends.row(reference.similarity_sigmoid, SigmoidCall, module="similarity.sigmoid"),
    native=(SigmoidCall, "(Tensor, Tensor, Tensor, Tensor)"),
    native_fake=_sigmoid_results,
)


def _gradient(
    call: SimilarityCall,
    results: Sequence[Tensor],
    grads: Sequence[Any],
    needed: Sequence[bool],
    spec: str,
) -> dict[str, Tensor]:
    rows, columns, stored = results
    grad_rows = torch.zeros_like(rows) if grads[0] is None else grads[0]
    grad_columns = torch.zeros_like(columns) if grads[1] is None else grads[1]
    gradient = SimilarityGradient(
        **by_name(call),
        grad_rows=grad_rows,
        grad_columns=grad_columns,
        row_stats=rows,
        column_stats=columns,
        stored=stored,
        need_image=needed[0],
        need_text=needed[1],
    )
    d_image, d_text, d_scale, d_plane = registry.call(BACKWARD, gradient, spec)
    return {"image": d_image, "text": d_text, "scale": d_scale, "plane": d_plane}


def _sigmoid_gradient(
    call: SigmoidCall,
    results: Sequence[Tensor],
    grads: Sequence[Any],
    needed: Sequence[bool],
    spec: str,
) -> dict[str, Tensor]:
    d_image, d_text, d_sigmoids = (result * grads[0] for result in results[2:])
    return {"image": d_image, "text": d_text, "sigmoids": F.pad(d_sigmoids, (0, 0, 0, 3))}


register_gradient(FORWARD, _gradient, differentiable=2, saved_results=0)
register_gradient(SIGMOID, _sigmoid_gradient, saved_results=0, saves_tensors=False)


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
    r"""Computes losses of the similarity matrices of image and text features.

    At most `store_bytes` of the matrices are kept.

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
            constant, as in open_clip.DistillClipLoss. Gradients are the same. A KL is a difference
            of numbers of the size of the teacher's logits: however small, its value has an absolute
            error of up to about eps · max |T|, eps = 1.2e-7 in float32.
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
            this rank's N rows (equal N on every rank). Texts are gathered; each rank computes its
            rows, and the ranks exchange column statistics. The value is this rank's share: the mean
            over ranks is the loss of the whole batch. The gradient is that of the sum over ranks,
            as in open_clip with local_loss and gather_with_grad, so that DDP's average is the
            gradient of the batch's loss.
        scratch_bytes: budget of the chunk of a similarity matrix; one chunk of the student's matrix
            and one of the teacher's exist at a time. By default 64 MiB on a CPU, where a chunk is
            some rows, and 128 MiB on a GPU, where it is a block of about as many rows as columns.
        store_bytes: budget of the rows of the similarity matrices that forward keeps on a CPU, so
            that backward does not compute them again. By default 208 MiB.

    Returns:
        A dict with one 0-dimensional tensor for each term, and "loss" with `weights`, float32
        (float64 for float64 features).

    "sigmoid" and "pair_matching" are sigmoid terms, whose gradient needs no statistics: forward
    computes the gradient with the value, by 3 products of N M D, 2 if image or text needs no
    gradient, 1 if neither does; with `weights`, for both terms together. The gradients [N, D] and
    [M, D] are then saved, and backward scales them. They are rounded once more than other
    gradients, to the features' dtype (float32 for float16). Pair matching with a scalar plane
    beside a softmax of Z joins the softmax's sweep instead (on a GPU, only that of contrastive
    alone): 4 products in all.

    Gradients flow to image, text, the scale, the bias and the plane; features that need no gradient
    cost no product. Saved for backward: the inputs, 6 N + 3 M statistics, a few vectors [N], and at
    most store_bytes of similarities. Extra memory: O(scratch_bytes + store_bytes + (N + M) D),
    instead of several N×M matrices. Statistics and sums are in float32 and in a fixed order: on one
    machine, the same call has the same bits each time; on a CPU, with the same number of threads,
    since the products are BLAS's. Only first derivatives in reverse mode are supported.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and
            what it got.
        RuntimeError: a forced backend does not support the call.

    Source: Radford et al. 2021 (arXiv 2103.00020) for the contrastive term; Yang et al. 2023
    (CLIP-KD, arXiv 2307.12732) for relational (CRD); arXiv 2411.14789 for the system and pair
    matching; Zhai et al. 2023 (arXiv 2303.15343) for sigmoid.
    """
    inputs.check_options(terms, divergence, symmetric, scratch_bytes, store_bytes)
    image, text = inputs.features(image, text)
    n = image.size(0)
    m = text.size(0)
    device = image.device
    wide = torch.promote_types(image.dtype, torch.float32)
    scale = checks.scalar("logit_scale", logit_scale, device, wide)
    bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, device, wide)
    hyperplane = inputs.hyperplane(plane, image) if "pair_matching" in terms else None
    if "relational" not in terms:
        teacher_image = teacher_text = teacher_scale = None
    else:
        arguments = {
            "teacher_image": teacher_image,
            "teacher_text": teacher_text,
            "teacher_scale": teacher_scale,
        }
        student = {"image": image, "text": text}
        why = "the term 'relational' needs it"
        *of_teacher, teacher_scale = inputs.constants_of_teacher(arguments, student, why)
        teacher_image, teacher_text = (t.to(image.dtype) for t in of_teacher)
    if weights is not None:
        weights = inputs.check_weights(weights, terms)
    inputs.check_offset(label_offset, n, m, group)
    if ids is not None or text_ids is not None:
        ids, text_ids = inputs.pair_ids(ids, text_ids, n, m, device, group)
    if group is not None:
        m = n * torch.distributed.get_world_size(group)
        label_offset = n * torch.distributed.get_rank(group)
        text = distributed.gather(text, group)
        teacher_text = None if teacher_text is None else distributed.gather(teacher_text, group)
    pairs: dict[str, Any] = {"ids": ids, "text_ids": text_ids, "label_offset": label_offset}
    matrices = 1 if teacher_image is None else 2
    # term -> weight and bias, and the factors of its sums over negatives and positives
    sigmoids: dict[str, tuple] = {}
    if "sigmoid" in terms:
        sigmoids["sigmoid"] = scale, 0.0 if bias is None else bias, 1 / n, 1 / n
    # the plane of pair matching, if a softmax's sweep computes it
    joined: tuple[Tensor, Tensor] | None = None
    negatives: Tensor | int = 1
    if hyperplane is not None:
        negatives = max(1, n * (m - 1))
        if ids is not None and text_ids is not None:
            negatives = _negatives(ids, text_ids, m, label_offset, group).to(wide)
        if _joins(hyperplane, terms, image):
            joined = hyperplane
        else:
            sigmoids["pair_matching"] = *hyperplane, 0.5 / negatives, 0.5 / n

    out: dict[str, Tensor] = {}
    sums: list[Tensor] = []  # the summands of "loss"
    softmaxes: list[str] = [term for term in ("contrastive", "relational") if term in terms]
    if softmaxes:
        softmaxes += ["pair_matching"] if joined else []
        call = SimilarityCall(
            image,
            text,
            scale,
            teacher_image,
            teacher_text,
            teacher_scale,  # type: ignore[arg-type]
            plane=torch.stack(joined) if joined else None,
            **pairs,
            columns=symmetric,
            entropy=1.0 if divergence == "kl" else 0.0,
            chunk=sweep_rows(image, m, matrices, scratch_bytes),
            stored_rows=stored_rows(image, m, matrices, store_bytes)
            if wants_grad(image, text)
            else 0,
        )
        mix = None if weights is None else tuple([weights[term] for term in softmaxes])
        options = Options(
            "contrastive" in terms, "relational" in terms, call.entropy, negatives, mix
        )
        results = _softmax_terms(call, options, joined, group)
        if weights is not None:
            sums, results = [results[0]], [term.detach() for term in results[1:]]
        out = dict(zip(softmaxes, results))
    if sigmoids:
        total, by_term = _sigmoid_terms(
            image, text, sigmoids, weights, pairs, sweep_rows(image, m, 1, scratch_bytes)
        )
        sums.append(total)
        out |= (
            by_term
            if weights is None
            else {term: value.detach() for term, value in by_term.items()}
        )
    out = {term: out[term] for term in terms}
    if weights is not None:
        out["loss"] = sums[0] if len(sums) == 1 else sums[0] + sums[1]
    # a gradient of 0 instead of None, as DistributedDataParallel needs
    if bias is not None and "sigmoid" not in terms:
        last = next(reversed(out))
        out[last] = out[last] + 0.0 * bias
    return out


def _joins(hyperplane: tuple[Tensor, Tensor], terms: Collection[str], image: Tensor) -> bool:
    """Whether pair matching joins the sweep of a softmax.

    On a GPU a sweep with a teacher has no registers left for it.
    """
    if hyperplane[0].dim():  # a hadamard plane has a matrix of its own
        return False
    if "relational" not in terms:
        return "contrastive" in terms
    return (
        image.device.type == "cpu"
        and backends.forced_for(FORWARD.name, backends.forced()) != "triton"
    )


# []
def _negatives(ids: Tensor, text_ids: Tensor, m: int, label_offset: int, group: Any) -> Tensor:
    """Returns the number of negatives of all rows, with a process group its mean over the ranks; at
    least 1.
    """
    ordered = text_ids.sort().values
    positives = text_ids[label_offset : label_offset + ids.shape[0]]
    equal = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    count = (m - equal - (positives != ids).long()).sum(dtype=torch.float64)
    return (count if group is None else distributed.mean(count, group)).clamp(min=1)


def _softmax_terms(
    call: SimilarityCall, options: Options, plane: tuple[Tensor, Tensor] | None, group: Any
) -> Sequence[Tensor]:
    """Returns contrastive, relational and pair matching terms, see `values`."""
    rows, columns, _ = registry.call(FORWARD, call)
    merged = None
    if call.columns and group is not None:
        merged = merge_columns(distributed.exchange(columns, group))
    elif call.columns:
        n, first = call.image.shape[0], call.label_offset
        merged = columns if columns.shape[1] == n else columns[:, first : first + n]
    return values(rows, merged, call.scale, call.teacher_scale, plane, options)


def _sigmoid_terms(
    image: Tensor,
    text: Tensor,
    sigmoids: dict[str, tuple],
    weights: Mapping[str, float] | None,
    pairs: dict,
    chunk: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the weighted sum, and the terms: without weights with gradients, for which each term
    has a sweep of its own.
    """
    total: Any = None
    by_term: dict[str, Tensor] = {}
    hadamard = "pair_matching" in sigmoids and sigmoids["pair_matching"][0].dim()
    for lot in [[term] for term in sigmoids] if weights is None or hadamard else [list(sigmoids)]:
        features = image
        columns = [[*sigmoids[term], 1.0 if weights is None else weights[term]] for term in lot]
        if hadamard and lot == ["pair_matching"]:
            features, columns[0][0] = (image * columns[0][0]).to(image.dtype), 1.0
        wide = torch.promote_types(image.dtype, torch.float32)
        numbers = [
            [checks.scalar(term, x, image.device, wide) for x in column]
            for term, column in zip(lot, columns)
        ]
        call = SigmoidCall(
            features,
            text,
            torch.stack([torch.stack(column) for column in numbers], 1),
            **pairs,
            chunk=chunk,
            gradient=False,
            need_image=wants_grad(features),
            need_text=wants_grad(text),
        )
        call = replace(call, gradient=wants_grad(features, text, call.sigmoids))
        summed, each, *_ = registry.call(SIGMOID, call)
        total = summed if total is None else total + summed
        by_term |= zip(lot, [summed] if weights is None else each.unbind())
    return total, by_term
