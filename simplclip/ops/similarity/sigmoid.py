"""similarity_sigmoid: sigmoid terms of similarity_loss, whose forward computes value and gradient in one sweep. Not public."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from simplclip.ops import backends
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.registry import call as run
from simplclip.ops.registry import define, flat, register_autograd, schema_of, wants_grad
from simplclip.ops.similarity import reference
from simplclip.ops.similarity.call import SigmoidCall
from simplclip.ops.similarity.sweep import SCRATCH_BYTES, chunk_rows, computes_in

_NUMBERS = ("weight", "bias", "negative", "positive", "mix", "image_share", "text_share")


def _run(function, call):
    compute = computes_in(call.image.dtype, call.image.device.type)
    call.image, call.text = (t.to(compute).contiguous() for t in (call.image, call.text))
    for name in _NUMBERS + ("ids", "text_ids"):
        t = getattr(call, name)
        if t is not None:
            setattr(call, name, (t.to(accumulate_dtype(compute)) if name in _NUMBERS else t).contiguous())
    terms, d_image, d_text, d_weight, d_bias = function(call)
    return (terms * call.mix).sum(), terms, d_image, d_text, d_weight, d_bias


def _fake(call):
    compute = computes_in(call.image.dtype, call.image.device.type)
    terms = call.image.new_empty(call.weight.shape, dtype=accumulate_dtype(call.image.dtype))
    d_image, d_text = (
        t.new_empty(t.shape if needed else (0, t.shape[1]), dtype=stored_dtype(compute, t.device.type))
        for t, needed in ((call.image, call.need_image), (call.text, call.need_text))
    )
    return terms.new_empty(()), terms, d_image, d_text, torch.empty_like(terms), torch.empty_like(terms)


def stored_dtype(compute: torch.dtype, device: str) -> torch.dtype:
    """The dtype of the stored gradients: that of the products, float32 for float16, in whose range entries of 1/N² are lost."""
    return torch.float32 if compute == torch.float16 else compute


def _native_fake(call):
    return _fake(call)[1:]


_ROW = backends.row(reference.similarity_sigmoid, module="similarity.sigmoid", unpacked=True)
define(
    "similarity_sigmoid",
    SigmoidCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    row=_ROW,
    native=f"({schema_of(SigmoidCall)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    native_fake=_native_fake,
)


def _setup_context(ctx, inputs, output):
    call = SigmoidCall(*inputs[:-1])
    ctx.dtypes = call.image.dtype, call.text.dtype, call.weight.dtype, call.bias.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _autograd(ctx, grad, *_):
    out = [None] * (len(fields(SigmoidCall)) + 1)
    if grad is not None:
        for at, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes)):
            if ctx.needs_input_grad[at]:
                out[at] = (gradient * grad).to(dtype)
    return tuple(out)


register_autograd("similarity_sigmoid", _autograd, _setup_context)


def similarity_sigmoid(call: SigmoidCall, scratch_bytes: int = SCRATCH_BYTES) -> tuple[Tensor, Tensor]:  # [], [K]
    """The sum of the terms weighted by `mix`, which has gradients, and the terms, which have none.

    Products of N M D: 1 without a gradient; with gradients one more for each of image and text that requires one. Saved for
    backward, which scales them: the gradients of image and text in the dtype of the products (float16: float32). In bfloat16
    a gradient is so rounded twice, by 2⁻⁹ of itself each time.
    """
    image, device = call.image, call.image.device.type
    compute = computes_in(image.dtype, device)
    call.chunk = chunk_rows(image.shape[0], call.text.shape[0], compute, device, 1, scratch_bytes)
    if backends.forced() != "reference" or torch.compiler.is_compiling():
        call.gradient = wants_grad(image, call.text, call.weight, call.bias)
        call.need_image, call.need_text = wants_grad(image), wants_grad(call.text)
    return run("similarity_sigmoid", *flat(call), backends.forced())[:2]
