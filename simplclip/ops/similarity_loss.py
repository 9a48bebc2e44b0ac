"""similarity_loss: contrastive and pair matching losses over the similarity matrix, which is never stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip import backends, checks
from simplclip.ops.registry import define
from simplclip.reference import accumulate_dtype

NEGATIVES = ("all", "shift", "hard")
TERMS = ("contrastive", "pair_matching")

# A chunk of rows of the similarity matrix: as few rows as keep the matrix products fast, within this budget.
SCRATCH_BYTES = 64 << 20
_CHUNK_ROWS = 1024
# The first rows of the similarity matrix are kept from forward to backward: where all fit, 3 matrix products instead of 4.
STORE_BYTES = 36 << 20
# What oneDNN packs inside one bfloat16 product; the most seen was 2.8 MB on two threads.
_PACKING_BYTES = 4 << 20
_STRIP = 64  # the chunk is a multiple of what one task of the CPU kernel takes

_TENSORS = (
    "Tensor image, Tensor text, Tensor logit_scale, Tensor? plane_weight, Tensor? plane_bias, Tensor? ids, Tensor? text_ids"
)
_MODE = "int label_offset, bool symmetric, bool contrastive, int negatives"


def _computes_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the matrix products: the features', but float32 for halves that this CPU cannot multiply."""
    if device == "cpu" and dtype in (torch.float16, torch.bfloat16):
        native = dtype == torch.bfloat16 and backends.extension is not None and backends.extension.has_native_bf16()
        return torch.bfloat16 if native else torch.float32
    return dtype


def _prepare(image, text, *scalars):
    dtype = _computes_in(image.dtype, image.device.type)
    numbers = (None if s is None else s.to(accumulate_dtype(dtype)).contiguous() for s in scalars)
    return image.to(dtype).contiguous(), text.to(dtype).contiguous(), *numbers


def _fwd(function, image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, *mode):
    x, y, scale, weight, bias = _prepare(image, text, logit_scale, plane_weight, plane_bias)
    ids, text_ids = (None if t is None else t.contiguous() for t in (ids, text_ids))
    return function(x, y, scale, weight, bias, ids, text_ids, *mode)


def _fwd_fake(image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, *mode):
    stats = {"dtype": accumulate_dtype(image.dtype)}
    n, m = image.shape[0], text.shape[0]
    *_, stored_rows, _backend = mode
    return (
        image.new_empty(2, **stats),
        image.new_empty(2, n, **stats),
        image.new_empty(2, m, **stats),
        image.new_empty(1, dtype=torch.float64),
        image.new_empty(stored_rows, m, dtype=_computes_in(image.dtype, image.device.type)),
    )


def _bwd(function, grad_terms, image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, *rest):
    x, y, scale, weight, bias = _prepare(image, text, logit_scale, plane_weight, plane_bias)
    ids, text_ids = (None if t is None else t.contiguous() for t in (ids, text_ids))
    grads = function(grad_terms.to(scale.dtype).contiguous(), x, y, scale, weight, bias, ids, text_ids, *rest)
    d_image, d_text, *numbers = grads
    return d_image.to(image.dtype), d_text.to(text.dtype), *numbers


def _bwd_fake(grad_terms, image, text, logit_scale, plane_weight, plane_bias, ids, text_ids, *rest):
    *_, need_image, need_text, _chunk, _backend = rest
    stats = {"dtype": accumulate_dtype(image.dtype)}
    return (
        torch.empty_like(image, memory_format=torch.contiguous_format) if need_image else image.new_empty(0, image.shape[1]),
        torch.empty_like(text, memory_format=torch.contiguous_format) if need_text else text.new_empty(0, text.shape[1]),
        image.new_empty((), **stats),
        image.new_empty(0 if plane_weight is None else plane_weight.shape, **stats),
        image.new_empty((), **stats),
    )


define(
    "similarity_loss_fwd",
    f"{_TENSORS}, {_MODE}, int chunk, int stored_rows",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
define(
    "similarity_loss_bwd",
    f"Tensor grad_terms, {_TENSORS}, Tensor row_lse, Tensor col_lse, Tensor pairs, Tensor stored, {_MODE}, "
    "bool need_image, bool need_text, int chunk",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    *tensors, label_offset, symmetric, contrastive, negatives, chunk, _stored_rows, backend = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)  # zeros in the shape of the statistics would cost more than they
    ctx.save_for_backward(*tensors, *statistics)
    ctx.mode = (label_offset, symmetric, contrastive, negatives)
    ctx.chunk, ctx.backend = chunk, backend


def _autograd(ctx, grad_terms, *_):
    if grad_terms is None:
        return (None,) * 14
    tensors, statistics = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    needs = ctx.needs_input_grad
    d_image, d_text, d_scale, d_weight, d_bias = torch.ops.simplclip.similarity_loss_bwd(
        grad_terms, *tensors, *statistics, *ctx.mode, needs[0], needs[1], ctx.chunk, ctx.backend
    )
    _, _, scale, weight, bias, _, _ = tensors
    return (
        d_image if needs[0] else None,
        d_text if needs[1] else None,
        d_scale.to(scale.dtype) if needs[2] else None,
        d_weight.to(weight.dtype) if needs[3] else None,
        d_bias.to(bias.dtype) if needs[4] else None,
        *(None,) * 9,
    )


torch.library.register_autograd("simplclip::similarity_loss_fwd", _autograd, setup_context=_setup_context)


def chunk_rows(n: int, m: int, dtype: torch.dtype, planes: int, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Rows per chunk: at most 1024 and what the scratch holds, in equal chunks, a multiple of 64 and at least 64."""
    most = min(_CHUNK_ROWS, max(_STRIP, scratch_bytes // (m * dtype.itemsize * planes) // _STRIP * _STRIP))
    chunks = -(-n // most)
    return -(-n // (chunks * _STRIP)) * _STRIP


def stored_rows(n: int, m: int, dtype: torch.dtype, store_bytes: int = STORE_BYTES) -> int:
    """Rows of the similarity matrix that forward keeps: all or, where they do not fit, a multiple of 64."""
    rows = store_bytes // (m * dtype.itemsize)
    return n if rows >= n else rows // _STRIP * _STRIP


def workspace_bytes(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    *,
    hadamard: bool = False,
    hard: bool = False,
    scratch_bytes: int = SCRATCH_BYTES,
    store_bytes: int = STORE_BYTES,
) -> int:
    """Bytes that the cpu backend allocates beside inputs and gradients, at most, in a forward and its backward.

    The stored rows of S; chunk·M logits per plane; the larger of 64-row partials of the column statistics (forward) and, in
    bfloat16, a float32 sum of d_text and oneDNN's packing (backward). A half dtype that this CPU does
    not multiply is computed in float32: then copies of features and gradients.
    """
    planes = 2 if hadamard else 1
    compute = _computes_in(dtype, "cpu")
    chunk = min(n, chunk_rows(n, m, compute, planes, scratch_bytes))
    stored = 0 if hadamard else stored_rows(n, m, compute, store_bytes)
    logits = (planes * chunk + stored) * m * compute.itemsize
    partials = -(-chunk // _STRIP) * m * 4 * (2 if hard else 1)
    sums = 2 * chunk * d * compute.itemsize if hadamard else 0
    if compute == torch.bfloat16:
        sums += m * d * 4 + _PACKING_BYTES
    copies = 0 if compute == dtype else 2 * (n + m) * d * compute.itemsize
    statistics = 8 * (n + m) + 20 * n
    return logits + max(partials, sums) + copies + statistics


def similarity_loss(
    image: Tensor,  # [N, D]
    text: Tensor,  # [M, D]
    logit_scale: Tensor | float,  # [] s, not its logarithm
    *,
    logit_bias: Tensor | float | None = None,  # []
    terms: tuple[str, ...] = ("contrastive",),
    plane: tuple[Tensor | float, Tensor | float] | None = None,  # (p [] or w [D], q [])
    negatives: str = "all",
    shift: Tensor | int = 1,  # [] int64
    ids: Tensor | None = None,  # [N] int64
    text_ids: Tensor | None = None,  # [M] int64
    label_offset: int = 0,
    symmetric: bool = True,
    scratch_bytes: int = SCRATCH_BYTES,
    store_bytes: int = STORE_BYTES,
) -> dict[str, Tensor]:
    r"""Contrastive and pair matching losses of image and text features, without their N×M similarity matrix.

    With S = image · textᵀ, Z = s S + b, row i's positive in column y_i = i + label_offset, and the row and column
    log-sum-exps r, c of Z:

        contrastive    (1/2N) Σ_i [(r_i − Z_{i,y_i}) + (c_{y_i} − Z_{i,y_i})]          open_clip's ClipLoss
        pair_matching  ½ [ mean_i softplus(−l_{i,y_i}) + mean over negatives softplus(l_ij) ]

    where l = p S + q (scalar plane) or l_ij = w·(x_i ⊙ t_j) + q (hadamard plane): matched or not, decided by a learned
    hyperplane over the similarity. The paper only names this loss; its exact form is this library's reading. `negatives`:

        "all"    every j ≠ y_i
        "shift"  one per row, j = (y_i + shift) mod M; O(N D)
        "hard"   every j ≠ y_i, weighted by the softmax of Z over the row's and over the column's negatives, the mean of both,
                 weights detached; a row without negatives counts as 0

    Args:
        image, text: [N, D] and [M, D] with M ≥ N, float32, bfloat16, float16 or float64, of one dtype and device; usually
            L2-normalised, which is not checked. Under autocast they are cast to its dtype. Any strides.
        logit_scale: s, one element (open_clip's `logit_scale.exp()`).
        logit_bias: b, one element. Every term is invariant to it: values do not change and its gradient is 0.
        terms: any of "contrastive", "pair_matching"; what is not asked for is not computed.
        plane: (p, q) or (w, q), needed by "pair_matching".
        shift: 1 ≤ shift < M; a tensor's value is not checked (that would wait for the device).
        ids, text_ids: pairs with equal ids that are not the positive drop out of the negatives of every term.
            text_ids defaults to ids when N = M.
        label_offset: 0 ≤ label_offset ≤ M − N: this rank's place among gathered text features.
        symmetric: False keeps the row direction only: contrastive = mean_i (r_i − Z_{i,y_i}), one half of open_clip's
            local_loss; "hard" then weighs by rows. With M > N the column direction covers the N columns that have a positive.
        scratch_bytes: budget of the chunk of S that exists at a time.
        store_bytes: budget of the rows of S that forward keeps for backward, which then need not compute them again.

    Returns:
        A dict with one 0-dimensional tensor for each term, float32 (float64 for float64 features).

    Gradients flow to image, text, logit_scale and plane. Saved for backward: the inputs, 2 (N + M) statistics and at most
    store_bytes of S. Extra memory: `workspace_bytes`, O(scratch_bytes + store_bytes + (N + M) D), instead of several N×M
    matrices. Statistics and reductions are in float32 and in a fixed order: equal inputs give equal results. Double backward
    is not supported.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: a forced backend cannot serve the call.

    Source: Radford et al. 2021 (arXiv 2103.00020) for the contrastive term; arXiv 2411.14789 for pair matching.
    """
    checks.features("image", image, "[N, D]")
    checks.features("text", text, "[M, D]")
    device = image.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        image, text = (t if t.dtype == torch.float64 else t.to(dtype) for t in (image, text))
    checks.like("text", text, "image", image)
    n, m = image.shape[0], text.shape[0]
    if text.shape[1] != image.shape[1]:
        raise ValueError(f"text: expected the width of image, {image.shape[1]}, got {text.shape[1]}")
    if isinstance(label_offset, bool) or not isinstance(label_offset, (int, torch.SymInt)):
        raise TypeError(f"label_offset: expected an int, got {type(label_offset).__name__}")
    if not 0 <= label_offset <= m - n:
        raise ValueError(
            f"label_offset: expected 0 <= label_offset <= M - N = {m - n} so that each of {n} rows has its column among {m}, "
            f"got {label_offset}"
        )
    checks.choice("negatives", negatives, NEGATIVES)
    if isinstance(terms, str) or not terms:
        raise ValueError(f"terms: expected a tuple of at least one of {', '.join(TERMS)}, got {terms!r}")
    for term in terms:
        checks.choice("terms", term, TERMS)
    for name, value in (("scratch_bytes", scratch_bytes), ("store_bytes", store_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected a number of bytes, 0 or more, got {value!r}")
    stats = accumulate_dtype(image.dtype)
    scale = checks.scalar("logit_scale", logit_scale, device, stats)
    bias = None if logit_bias is None else checks.scalar("logit_bias", logit_bias, device, stats)
    if ids is not None:
        checks.group_ids("ids", ids, n, "N", device)
        if text_ids is None:
            if n != m:
                raise ValueError(f"text_ids: expected ids for {m} columns, since M is not N = {n}, got None")
            text_ids = ids
    if text_ids is not None:
        if ids is None:
            raise ValueError("ids: expected ids for the rows beside text_ids, got None")
        checks.group_ids("text_ids", text_ids, m, "M", device)
    weight, q = _plane(plane, image.shape[1], device, stats) if "pair_matching" in terms else (None, None)

    contrastive = "contrastive" in terms
    shifted = weight is not None and negatives == "shift"
    out: dict[str, Tensor] = {}
    if contrastive or not shifted:
        fused = 0 if weight is None or shifted else NEGATIVES.index(negatives) // 2 + 1
        planes = 2 if fused and weight.dim() == 1 else 1
        dtype = _computes_in(image.dtype, device.type)
        chunk = chunk_rows(n, m, dtype, planes, scratch_bytes)
        needs_grad = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
        stored = stored_rows(n, m, dtype, store_bytes) if needs_grad and planes == 1 else 0
        values = torch.ops.simplclip.similarity_loss_fwd(
            image, text, scale, weight if fused else None, q if fused else None, ids, text_ids,
            label_offset, symmetric, contrastive, fused, chunk, stored, backends.forced(),
        )[0]  # fmt: skip
        if contrastive:
            out["contrastive"] = values[0] if bias is None else values[0] + 0.0 * bias
        if fused:
            out["pair_matching"] = values[1]
    if shifted:
        out["pair_matching"] = _shifted_pair_matching(image, text, weight, q, ids, text_ids, label_offset, shift)
    return {term: out[term] for term in terms}


def _plane(plane, width, device, stats):
    if not isinstance(plane, (tuple, list)) or len(plane) != 2:
        raise ValueError(f"plane: expected (p [] or w [D], q []) for pair matching, got {type(plane).__name__}")
    weight, q = plane
    if isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() > 1:
        if weight.shape[0] != width:
            raise ValueError(f"plane: expected w [D] = [{width}], got shape {checks.shape_of(weight)}")
        if not weight.dtype.is_floating_point:
            raise TypeError(f"plane: expected w of a floating dtype, got {weight.dtype}")
        if weight.device != device:
            raise ValueError(f"plane: expected w on the device of image, {device}, got {weight.device}")
        weight = weight.to(stats)
    else:
        weight = checks.scalar("plane's p", weight, device, stats)
    return weight, checks.scalar("plane's q", q, device, stats)


def _shifted_pair_matching(image, text, weight, q, ids, text_ids, label_offset, shift):
    """One negative per row: 2 N dot products, which need no kernel."""
    n, m = image.shape[0], text.shape[0]
    if not isinstance(shift, Tensor):
        if not 1 <= shift < max(m, 2):
            raise ValueError(f"shift: expected 1 <= shift < M = {m}, got {shift}")
    elif shift.numel() != 1 or shift.dtype != torch.int64 or shift.device != image.device:
        raise ValueError(
            f"shift: expected one int64 element on {image.device}, "
            f"got {checks.shape_of(shift)} {shift.dtype} on {shift.device}"
        )
    stats = accumulate_dtype(image.dtype)
    x = image.to(stats) * weight
    label = torch.arange(n, device=image.device) + label_offset
    other = (label + shift) % m
    matched = (x * text[label]).sum(1) + q
    unmatched = F.softplus((x * text[other]).sum(1) + q)
    keep = torch.ones_like(unmatched) * (m > 1)
    if ids is not None:
        keep = keep * (text_ids[other] != ids)
    return 0.5 * (F.softplus(-matched).mean() + (unmatched * keep).sum() / keep.sum().clamp(min=1))
