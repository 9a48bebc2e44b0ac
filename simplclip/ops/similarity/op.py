"""similarity_loss: losses over similarity matrices of image and text features. Only some rows of the matrices are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from simplclip.ops import backends, checks, distributed
from simplclip.ops.calls import flat, tensors_of
from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.registry import call as run
from simplclip.ops.registry import define, register_autograd, register_gradient, wants_grad
from simplclip.ops.similarity import inputs, reference
from simplclip.ops.similarity.call import (
    GRADIENTS,
    ColumnStat,
    RowStat,
    SimilarityCall,
    SimilarityGradient,
    TermsCall,
    TermsGradient,
    stored_dtype,
)
from simplclip.ops.similarity.chunks import budgets, computes_in, prepare, stored_rows, sweep_rows
from simplclip.ops.similarity.contrastive import Contrastive, contrastive
from simplclip.ops.similarity.positives import SameIds
from simplclip.ops.similarity.rows import similarity_rows
from simplclip.ops.similarity.sigmoid import numbers_of, sigmoid_terms
from simplclip.ops.similarity.sweeps import on_gpu, sweeps_of
from simplclip.ops.similarity.terms import cross_entropy, merge_columns, terms_of

_ARGUMENTS = (*SimilarityCall.__match_args__, "backend")
_TENSORS = tensors_of(SimilarityCall)


def _fwd(function, call):
    prepare(call, _TENSORS, computes_in(call.image.dtype, call.image.device.type))
    return function(call)


def _fwd_fake(call, backend):
    image, m, stats = call.image, call.text.shape[0], accumulate_dtype(call.image.dtype)
    compute = computes_in(image.dtype, image.device.type)
    return (
        image.new_empty(len(RowStat), image.shape[0], dtype=stats),
        image.new_empty(len(ColumnStat), m, dtype=stats),
        image.new_empty(call.matrices if call.stored_rows else 0, call.stored_rows, m, dtype=stored_dtype(compute)),
    )


def _bwd(function, call):
    dtype = call.image.dtype
    call.grad_rows, call.grad_columns = call.grad_rows.contiguous(), call.grad_columns.contiguous()
    return tuple(grad.to(dtype) if grad.dim() == 2 else grad for grad in _fwd(function, call))


def _bwd_fake(call, backend):
    def like(t, needed=True):
        return t.new_empty(t.shape if needed else (0, t.shape[1]))

    number = call.grad_rows.new_empty
    return (
        like(call.image, call.need_image),
        like(call.text, call.need_text),
        number(()),
        like(call.student_image, call.projected_image is not None),
        like(call.student_text, call.projected_text is not None),
        number(()),
        number((call.sigmoids,)),
        number((call.sigmoids,)),
    )


_FWD, _BWD = (
    backends.row(function, module="similarity.op")
    for function in (reference.similarity_loss_fwd, reference.similarity_loss_bwd)
)
_RESULTS = f"({', '.join(['Tensor'] * len(GRADIENTS))})"
define("similarity_loss_fwd", SimilarityCall, "(Tensor, Tensor, Tensor)", _fwd, _fwd_fake, row=_FWD)
define("similarity_loss_bwd", SimilarityGradient, _RESULTS, _bwd, _bwd_fake, row=_BWD)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[: len(_TENSORS)], *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.options = inputs[len(_TENSORS) :]


def _autograd(ctx, saved, grad_rows, grad_columns, _):
    gradients = dict.fromkeys(_ARGUMENTS)
    *tensors, rows, columns, stored = saved
    *options, backend = ctx.options
    grad_rows = torch.zeros_like(rows) if grad_rows is None else grad_rows
    grad_columns = torch.zeros_like(columns) if grad_columns is None else grad_columns
    need_image, need_text = ctx.needs_input_grad[:2]
    found = torch.ops.simplclip.similarity_loss_bwd(
        *tensors, *options, grad_rows, grad_columns, rows, columns, stored, need_image, need_text, backend
    )
    # Where a projection is None, the features take its place, and the features' gradient includes the projection's.
    given = {name: t for name, t, needed in zip(_TENSORS, tensors, ctx.needs_input_grad) if needed and t is not None}
    gradients |= {name: grad.to(given[name].dtype) for name, grad in zip(GRADIENTS, found) if name in given}
    return tuple(gradients.values())


register_autograd("similarity_loss_fwd", _autograd, _setup_context)


def _run_contiguous(function, call):
    """Makes a call's tensors contiguous and runs the function: one launch, where torch would need one for each operation."""
    for name in tensors_of(type(call)):
        if getattr(call, name) is not None:
            setattr(call, name, getattr(call, name).contiguous())
    return function(call)


def _terms_fake(call, backend):
    return call.rows.new_empty(1 + call.sigmoids)


def _terms_bwd_fake(call, backend):
    columns = call.rows.new_empty(0) if call.columns is None else call.columns.new_empty(call.columns.shape)
    return call.rows.new_empty(call.rows.shape), columns, call.rows.new_empty(())


def _terms_backward(call, results, grad, need, backend):
    gradient = TermsGradient(grad, call.rows, call.columns, call.scale, call.margin, call.sigmoids)
    found = torch.ops.simplclip.similarity_terms_bwd(*flat(gradient), backend)
    return {name: g for name, g in zip(("rows", "columns", "scale"), found) if need[name]}


_TERMS, _TERMS_BWD = (
    backends.row(function, module="similarity.terms", cpu=False)
    for function in (reference.similarity_terms, reference.similarity_terms_bwd)
)
define("similarity_terms", TermsCall, "Tensor", _run_contiguous, _terms_fake, row=_TERMS)
define("similarity_terms_bwd", TermsGradient, "(Tensor, Tensor, Tensor)", _run_contiguous, _terms_bwd_fake, row=_TERMS_BWD)
register_gradient("similarity_terms", TermsCall, _terms_backward)


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
    interactive: str = "infonce",
    interactive_scale: Tensor | float | None = None,  # []
    projected_image: Tensor | None = None,  # [N, D̂]
    projected_text: Tensor | None = None,  # [M, D̂]
    divergence: str = "kl",
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    prior: Tensor | float | None = None,  # [] or [N]
    margin: float = 0.0,
    positives: str = "drop",
    weights: Mapping[str, float] | None = None,
    ids: Tensor | None = None,  # [N] int64 or int32
    text_ids: Tensor | None = None,  # [M] int64 or int32
    label_offset: int = 0,
    symmetric: bool = True,
    group: torch.distributed.ProcessGroup | None = None,
    scratch_bytes: int | None = None,
    store_bytes: int | None = None,
) -> dict[str, Tensor]:
    r"""Computes losses of the similarity matrices of image and text features. At most `store_bytes` of the matrices are kept.

    With S = image · textᵀ, Z = s S + b, row i's positive in column y_i = i + label_offset, and the row and column
    log-sum-exps r, c of Z:

        contrastive    (1/2N) Σ_i [(r_i − Z_{i,y_i}) + (c_{y_i} − Z_{i,y_i})]          open_clip's ClipLoss
        sigmoid        (1/N) Σ_i [softplus(−Z_{i,y_i}) + Σ over negatives softplus(Z_ij)]    open_clip's SigLipLoss
        pair_matching  ½ [ mean_i softplus(−l_{i,y_i}) + mean over negatives softplus(l_ij) ]

    where l = p S + q (scalar plane) or l_ij = w·(x_i ⊙ t_j) + q (hadamard plane) is a learned hyperplane that separates
    matched from unmatched pairs, and the negatives are every j ≠ y_i. The paper only names this loss; its form is this
    library's interpretation.

    With a teacher's features x̂, ŷ, its logits T = ŝ x̂ ŷᵀ, and the student's features x', y' in the teacher's width
    (projected_image and projected_text, which default to image and text):

        relational     ½ [ mean_i KL(softmax T_i ‖ softmax Z_i) + the same over columns ]
        interactive    U = s' x' ŷᵀ and V = s' x̂ y'ᵀ. "infonce": ½ [ mean_i cross-entropy of U_i to the positive
                       + mean_j that of column j of V ]; "kl": ½ [ mean_i KL(softmax T_i ‖ softmax U_i)
                       + mean_j KL(softmax of column j of T ‖ that of V) ]

    Options of the contrastive term, whose loss of a row is log(Σ_j e^{Z_ij}) − Z_{i,y_i}; columns likewise:

        label_smoothing  ε: the target is (1 − ε) for the positive plus ε/M for every column, as in F.cross_entropy
        decoupled        the sum is over the negatives alone (Yeh et al. 2022); a row without negatives counts as 0
        prior            τ⁺: the negatives' part of the sum becomes n g, g = max((mean of their e^Z − τ⁺ e^{Z⁺}) / (1 − τ⁺),
                         e^{−s}), with n negatives; a number, or one for each pair (Chuang et al. 2020). It is 0 or more and
                         below 1; the values of a tensor are not checked (this would synchronise)
        margin           is subtracted from the positive's logit

    `positives`: with "drop", pairs with equal ids are neither positives nor negatives. Otherwise they are positives of
    contrastive, sigmoid and pair_matching, with the k_i columns of row i:

        "ids"  contrastive: the target is 1/k_i for each (SupCon, UniCL); the other terms: softplus(−l) of the pair becomes
               its mean over the positives of the row and of the column, half of each
        "sum"  like "ids", with sums in place of these means: sigmoid is then SigLIP with a target matrix of ones and zeros

    Args:
        image, text: [N, D] and [M, D] with M ≥ N, float32, bfloat16, float16 or float64, with the same dtype and
            device and any strides; usually L2-normalised, which is not checked. Under autocast they are cast to its dtype.
        logit_scale: s, one element (open_clip's `logit_scale.exp()`); a tensor, or what float() takes.
        logit_bias: b, one element. Only the term "sigmoid" depends on b; without this term the gradient of b is 0.
        terms: any of "contrastive", "sigmoid", "pair_matching", "relational", "interactive"; the others are not computed.
        plane: (p, q) or (w, q), needed by "pair_matching".
        teacher_image, teacher_text, teacher_scale: x̂ [N, D̂], ŷ [M, D̂] (any float dtype; cast to image's) and ŝ, needed by
            "relational" and "interactive". They are constants: one that requires a gradient gets none, with a warning.
        interactive: form of the interactive term.
        interactive_scale: s', by default logit_scale.
        projected_image, projected_text: x' [N, D̂] and y' [M, D̂], needed by "interactive" where D̂ is not D.
        divergence: "kl", or "cross_entropy": every KL without the teacher's entropy, which is constant, as in
            open_clip.DistillClipLoss. Gradients are the same. A KL is a difference of numbers of the size of the teacher's
            logits: however small, its value has an absolute error of up to about eps · max |T|, eps = 1.2e-7 in float32.
        weights: weights of the terms. The result then has "loss" too, their weighted sum, and only "loss" has a gradient.
        ids, text_ids: pairs with equal ids, except the positive, are excluded from the negatives of every term and from every
            softmax (but see `positives`). text_ids defaults to ids when N = M.
        label_offset: column of the first row's positive, 0 ≤ label_offset ≤ M − N; with gathered text features, the position
            of this rank's own.
        symmetric: if False, only the row direction is used: contrastive = mean_i (r_i − Z_{i,y_i}), one half of open_clip's
            local_loss. With M > N the column direction covers the N columns that have a positive.
        group: process group of a distributed batch. image, text, ids and the teacher's features are this rank's N rows (equal
            N on every rank). Texts are gathered; each rank computes its rows, and the ranks exchange column statistics. The
            value is this rank's share: the mean over ranks is the loss of the whole batch. The gradient is that of the sum
            over ranks, as in open_clip with local_loss and gather_with_grad, so that DDP's average is the gradient of the
            batch's loss.
        scratch_bytes: budget of the chunk of a similarity matrix; one chunk of the student's matrix and one of the teacher's
            exist at a time. By default 64 MiB on a CPU, where a chunk is some rows, and 128 MiB on a GPU, where it is a block
            of about as many rows as columns for all of the student's matrices together.
        store_bytes: budget of the rows that forward keeps, so that backward does not compute them again: on a CPU of the
            similarity matrices, by default 36 MiB; on a GPU of the exponentials of Z, by default 256 MiB, bfloat16 for half
            types, where the call has no other matrix, no sigmoid term in its sweep and no ids.

    Returns:
        A dict with one 0-dimensional tensor for each term, and "loss" with `weights`, float32 (float64 for float64 features).

    "sigmoid" and "pair_matching" are sigmoid terms, whose gradient needs no statistics. If there is a softmax of Z, they join
    its sweep (on a GPU, only that of contrastive alone): 4 products of N M D in all. Otherwise, and for a hadamard plane with
    its own matrix, forward computes the gradient with the value: 3 products, 2 if image or text needs no gradient, 1 if
    neither does; with `weights`, for both terms together. The gradients [N, D] and [M, D] are then saved, and backward scales
    them. They are rounded once more than other gradients, to the features' dtype (float32 for float16).

    Gradients flow to image, text, their projections, the student's scales and the plane. Saved for backward: the inputs,
    11 N + 5 M statistics and at most store_bytes of similarities. Extra memory:
    O(scratch_bytes + store_bytes + (N + M) D), instead of several N×M matrices. Statistics and sums are in float32 and in a
    fixed order: on one machine, the same call has the same bits each time; on a CPU, with the same number of threads, since
    the products are BLAS's. Only first derivatives in reverse mode are supported, except by backend "reference".

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and what it got.
        RuntimeError: a forced backend does not support the call.

    Source: Radford et al. 2021 (arXiv 2103.00020) for the contrastive term; Yang et al. 2023 (CLIP-KD, arXiv 2307.12732) for
    relational (CRD) and interactive (ICL); arXiv 2411.14789 for the system and pair matching; Zhai et al. 2023 (arXiv
    2303.15343) for sigmoid; Khosla et al. 2020 and Yang et al. 2022 (arXiv 2204.03610) for several positives.
    """
    inputs.check_options(terms, interactive, divergence, scratch_bytes=scratch_bytes, store_bytes=store_bytes)
    checks.boolean("symmetric", symmetric)
    options = Contrastive(label_smoothing, decoupled, prior, margin, positives)
    crossing = interactive if "interactive" in terms else None
    call = SimilarityCall(  # inputs.normalise turns numbers into tensors
        image=image,
        text=text,
        scale=logit_scale,  # type: ignore[arg-type]
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_scale=teacher_scale,  # type: ignore[arg-type]
        projected_image=projected_image,
        projected_text=projected_text,
        cross_scale=interactive_scale,  # type: ignore[arg-type]
        columns=symmetric,
        relational="relational" in terms,
        interactive=crossing == "kl",
        entropy=1.0 if divergence == "kl" else 0.0,
    )
    inputs.normalise(call, terms)
    scratch_bytes, store_bytes = budgets(call.image.device.type, call.image.dtype, scratch_bytes, store_bytes)
    bias = inputs.normal_bias(logit_bias, call)
    hyperplane = inputs.hyperplane(plane, call) if "pair_matching" in terms else None
    inputs.check_contrastive(options, terms)
    inputs.check_prior(options, call)
    weights = inputs.check_weights(weights, terms)
    own_text, own_teacher_image = call.student_text, call.teacher_image
    same_ids = SameIds.checked(ids, text_ids, label_offset, call.image, call.text, group)
    call = replace(call, **same_ids.fields)
    if group is not None:
        _gather_texts(call, group)

    out: dict[str, Tensor] = {}
    if crossing == "infonce":
        out["interactive"] = _infonce(call, own_text, own_teacher_image, same_ids, group, scratch_bytes)
    hadamard = hyperplane is not None and hyperplane[0].dim() == 1
    keep_ids = same_ids.given and positives != "drop" and not decoupled
    sweeps = sweeps_of(call, terms, keep_ids=keep_ids, hadamard=hadamard, weighted=weights is not None)
    sums: list[Tensor] = []  # the summands of the weighted sum
    for sweep in sweeps:
        numbers: dict[str, Any] = {}
        if sweep.sigmoids:
            numbers = numbers_of(call, sweep.sigmoids, bias, hyperplane, positives, same_ids, group)
        if sweep.call is not None:
            numbers = {name if name.endswith("share") else f"sigmoid_{name}": value for name, value in numbers.items()}
            rows, columns = _statistics(replace(sweep.call, **numbers), group, scratch_bytes, store_bytes)
            out |= terms_of(sweep.call, rows, columns)
            if sweep.contrastive and options.plain and on_gpu(call):
                of_sweep = TermsCall(rows, columns, call.scale, options.margin, len(sweep.sigmoids))
                values = run("similarity_terms", *flat(of_sweep), backends.forced())
                out |= zip(("contrastive", *sweep.sigmoids), values.unbind() if sweep.sigmoids else [values.reshape(())])
                continue
            out |= zip(sweep.sigmoids, (rows[stat].sum() for stat in (RowStat.SIGMOID, RowStat.SECOND_SIGMOID)))
            if sweep.contrastive:
                out["contrastive"] = contrastive(sweep.call, options, same_ids, rows, columns)
            continue
        mix = {term: 1.0 if weights is None else weights[term] for term in sweep.sigmoids}
        of_plane = hadamard and "pair_matching" in sweep.sigmoids
        features = replace(call, image=(call.image * hyperplane[0]).to(call.image.dtype)) if of_plane else call
        total, values = sigmoid_terms(features, sweep.sigmoids, numbers, mix, same_ids, scratch_bytes)
        out |= values if weights is not None else {sweep.sigmoids[0]: total}
        sums.append(total)
    out = {term: out[term] for term in terms}
    if weights is not None:
        summed = {term for sweep in sweeps if sweep.call is None for term in sweep.sigmoids}
        sums += [weights[term] * value for term, value in out.items() if term not in summed]
        out = {term: value.detach() for term, value in out.items()}
        out["loss"] = sum(sums)  # type: ignore[assignment]
    if bias is not None and "sigmoid" not in terms:  # a gradient of 0 instead of None, as DistributedDataParallel needs
        last = next(reversed(out))
        out[last] = out[last] + 0.0 * bias
    return out


def _gather_texts(call: SimilarityCall, group: torch.distributed.ProcessGroup) -> None:
    """Replaces the texts of this rank by those of all ranks; "infonce" reads only this rank's projected texts."""
    for name in ("text", "teacher_text", *(["projected_text"] if call.interactive else [])):
        if getattr(call, name) is not None:
            setattr(call, name, distributed.gather(getattr(call, name), group))


def _infonce(
    call: SimilarityCall,
    own_text: Tensor,  # [M, D̂]; with a group, those of this rank
    own_teacher_image: Tensor,  # [N, D̂]
    same_ids: SameIds,
    group: torch.distributed.ProcessGroup | None,
    scratch_bytes: int,
) -> Tensor:
    """Returns the interactive term "infonce": in each direction a cross-entropy of rows, whose keys are the teacher's."""

    def direction(query, keys, of):
        lse, positive = similarity_rows(query, keys, call.cross_scale, of, scratch_bytes)
        return cross_entropy(lse, call.cross_scale * positive).mean()

    loss = direction(call.student_image, call.teacher_text, same_ids)
    if not call.columns:
        return loss
    if group is not None:
        other = direction(own_text, distributed.gather(own_teacher_image, group), same_ids)
    else:
        other = direction(own_text[same_ids.window], own_teacher_image, same_ids.transposed())
    return 0.5 * (loss + other)


def _statistics(
    call: SimilarityCall, group: torch.distributed.ProcessGroup | None, scratch_bytes: int, store_bytes: int
) -> tuple[Tensor, Tensor | None]:
    """Returns the statistics of the rows [11, N] and of the positives' columns [5, N], None without `columns`."""
    if not call.interactive:
        call.projected_image = call.projected_text = call.cross_scale = None
    if not call.has_teacher:
        call.teacher_image = call.teacher_text = call.teacher_scale = None
    n, m, device = call.image.shape[0], call.text.shape[0], call.image.device.type
    dtype = computes_in(call.image.dtype, device)
    call.chunk = sweep_rows(n, m, dtype, device, 1 + call.has_teacher, scratch_bytes)
    kept = call.keeps_exponentials and dtype != torch.float64 and backends.forced() != "reference"
    if (kept or not on_gpu(call)) and wants_grad(call.image, call.text, call.projected_image, call.projected_text):
        call.stored_rows = stored_rows(n, m, dtype, call.matrices, store_bytes, 128 if on_gpu(call) else 64)
    rows, columns, _ = run("similarity_loss_fwd", *flat(call), backends.forced())
    if not call.columns:
        return rows, None
    if group is not None:
        return rows, merge_columns(distributed.exchange(columns, group))
    return rows, columns[:, call.label_offset : call.label_offset + n]
