"""similarity_sigmoid: sigmoid terms of similarity_loss. Forward computes value and gradient in one sweep. Not public."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simplclip.ops import backends, distributed
from simplclip.ops.calls import flat, tensors_of
from simplclip.ops.calls import accumulate_dtype
from simplclip.ops.registry import call as run
from simplclip.ops.registry import define, register_gradient, wants_grad
from simplclip.ops.similarity import reference
from simplclip.ops.similarity.call import SigmoidCall, SimilarityCall
from simplclip.ops.similarity.chunks import computes_in, prepare, sweep_rows
from simplclip.ops.similarity.positives import SameIds

_TENSORS = tensors_of(SigmoidCall)
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"  # terms, d_image, d_text, d_weight, d_bias


def _run(function, call):
    prepare(call, _TENSORS, computes_in(call.image.dtype, call.image.device.type))
    terms, *gradients = function(call)
    return (terms * call.mix).sum(), terms, *gradients


def _results(call):
    """Returns a backend's fake results. For float16, gradients are stored in float32, which does not lose entries of 1/N²."""
    compute = computes_in(call.image.dtype, call.image.device.type)
    stored = torch.float32 if compute == torch.float16 else compute
    terms = call.image.new_empty(call.weight.shape, dtype=accumulate_dtype(compute))
    d_image, d_text = (
        t.new_empty(t.shape if needed else (0, t.shape[1]), dtype=stored)
        for t, needed in ((call.image, call.need_image), (call.text, call.need_text))
    )
    return terms, d_image, d_text, torch.empty_like(terms), torch.empty_like(terms)


def _fake(call, backend):
    terms, *gradients = _results(call)
    return terms.new_empty(()), terms, *gradients


def _backward(call, results, grad, need, backend):
    _, *gradients = results
    return {name: g * grad for name, g in zip(("image", "text", "weight", "bias"), gradients) if need[name]}


define(
    "similarity_sigmoid",
    SigmoidCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    row=backends.row(reference.similarity_sigmoid, module="similarity.sigmoid"),
    native=(SigmoidCall, _RESULTS),
    native_fake=_results,
)
register_gradient("similarity_sigmoid", SigmoidCall, _backward, forget=_TENSORS, keep_result=True)


def numbers_of(
    call: SimilarityCall,
    terms: tuple[str, ...],  # "sigmoid", "pair_matching" or both
    bias: Tensor | None,  # [] of the logits
    plane: tuple[Tensor, Tensor] | None,  # [] or [D], []
    positives: str,
    same_ids: SameIds,
    group: torch.distributed.ProcessGroup | None,
) -> dict[str, Tensor | None]:
    """Returns the fields of SigmoidCall that are numbers of the terms. A hadamard hyperplane has the weight 1 here, since its
    weights are multiplied into the image features."""
    n, m, scale = call.image.shape[0], call.text.shape[0], call.scale
    mean, numbers = scale.new_ones(()) / n, {}
    if "sigmoid" in terms:
        numbers["sigmoid"] = scale, torch.zeros_like(mean) if bias is None else bias, mean, mean
    if "pair_matching" in terms:
        if same_ids.given:
            pairs = (m - same_ids.of_rows()).sum(dtype=torch.float64)
            pairs = (pairs if group is None else distributed.mean(pairs, group)).clamp(min=1).to(scale.dtype)
        else:
            pairs = scale.new_full((), max(1, n * (m - 1)))
        weight = torch.ones_like(mean) if plane[0].dim() else plane[0]
        numbers["pair_matching"] = weight, plane[1], 0.5 / pairs, 0.5 * mean
    stacked = (_stacked(each) for each in zip(*(numbers[term] for term in terms)))
    out: dict[str, Tensor | None] = dict(zip(("weight", "bias", "negative", "positive"), stacked))
    out |= {"image_share": None, "text_share": None}
    if positives != "drop" and same_ids.given:
        side = 0.5 if call.columns else 1.0
        of_rows, of_columns = (same_ids.of_rows(), same_ids.of_columns().clamp(min=1)) if positives == "ids" else (1, 1)
        out |= {
            "image_share": scale.new_full((n,), side) / of_rows,
            "text_share": scale.new_full((m,), 1 - side) / of_columns,
        }
    return out


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(numbers)) if len(numbers) > 1 else numbers[0].reshape(1)


def sigmoid_terms(
    call: SimilarityCall,  # with a hadamard hyperplane, its image is already multiplied by the weights
    terms: tuple[str, ...],
    numbers: dict[str, Any],  # the result of numbers_of
    mix: dict[str, float],
    same_ids: SameIds,
    scratch_bytes: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # [], 0-dimensional
    """Returns the sum of the terms weighted by `mix`, which autograd can differentiate, and the detached terms.

    Matrix products of N M D: 1, plus 1 for each of image and text that requires a gradient. Their gradients are saved for
    backward, which multiplies them by a number.
    """
    image, text, scale = call.image, call.text, call.scale
    n, m, device = image.shape[0], text.shape[0], image.device.type
    of_mix = _stacked([scale.new_full((), float(mix[term])) for term in terms])
    fused = SigmoidCall(
        image, text, mix=of_mix, chunk=sweep_rows(n, m, computes_in(image.dtype, device), device, 1, scratch_bytes),
        gradient=False, need_image=False, need_text=False, **same_ids.fields, **numbers,
    )  # fmt: skip
    # A forced reference computes no gradient, since autograd differentiates it.
    if torch.compiler.is_compiling() or backends.forced() != "reference":
        fused.gradient = wants_grad(image, text, fused.weight, fused.bias)
        fused.need_image, fused.need_text = wants_grad(image), wants_grad(text)
    total, values = run("similarity_sigmoid", *flat(fused), backends.forced())[:2]
    return total, {term: value.detach() for term, value in zip(terms, values.unbind())}
