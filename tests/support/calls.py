"""Calls of the public ops as data: tensors by name, in any dtype and layout; and the ops in plain torch, for the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import dense
import test_feature_loss
import test_parallel_mlp
import test_simplified_block
import torch
from torch import Tensor

from benchmarks import attention_forms
from simplclip import ops


@dataclass
class Call:
    op: str
    tensors: dict[str, Tensor]  # float64, and int64 ids, lengths, shift
    options: dict[str, object] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the tensors that have another than the call's

    def needed(self) -> list[str]:
        """Tensors that have a gradient."""
        return [name for name, t in self.tensors.items() if t.is_floating_point() and not name.startswith("teacher")]

    def typed(self, dtype: torch.dtype) -> dict[str, Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        of = {name: wide if name in WIDE else dtype for name in self.tensors} | self.dtypes
        return {name: t.to(of[name]) if t.is_floating_point() else t for name, t in self.tensors.items()}


# Numbers and what acts on statistics: float32 beside half features.
WIDE = {"logit_scale", "logit_bias", "teacher_scale", "interactive_scale", "plane_weight", "plane_bias"}
WIDE |= {"alpha", "beta", "gamma", "norm_weight", "norm_bias", "attention_gain", "mlp_gain"}


def arguments(call: Call, tensors: dict[str, Tensor]) -> dict[str, object]:
    named = {**tensors, **call.options}
    if call.op == "similarity_loss" and "plane_bias" in named:
        named["plane"] = (named.pop("plane_weight"), named.pop("plane_bias"))
    if call.op == "parallel_mlp":
        named = {"fc1_bias": None, "fc2_bias": None, **named}
    return named


def _plain_similarity(image, text, logit_scale, *, logit_bias=None, **named):
    named.pop("scratch_bytes", None), named.pop("store_bytes", None)
    if named.get("ids") is not None and named.get("text_ids") is None:
        named["text_ids"] = named["ids"]
    if "shift" in named:
        named["shift"] = int(named["shift"])
    out = dense.similarity_loss(image, text, logit_scale, **named)
    if logit_bias is not None and "contrastive" in out:
        out["contrastive"] = out["contrastive"] + 0.0 * logit_bias
    return out


def _plain_block(*, recompute=False, **named):
    return test_simplified_block.plain(**named)


PLAIN: dict[str, Callable] = {
    "similarity_loss": _plain_similarity,
    "shaped_attention": attention_forms.plain,
    "parallel_mlp": test_parallel_mlp.plain,
    "simplified_block": _plain_block,
    "feature_loss": test_feature_loss.dense,
}


def outputs_of(function: Callable, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = function(**arguments(call, tensors))
    return out if isinstance(out, dict) else {"out": out}


def run(
    function: Callable,
    call: Call,
    tensors: dict[str, Tensor],
    need: Iterable[str],
    incoming: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Results and the gradients of `need`, d_NAME; `incoming(name, result)`: the gradient that comes to a result."""
    need = list(need)
    leaves = {name: t.detach().requires_grad_(name in need) for name, t in tensors.items()}
    outputs = outputs_of(function, call, leaves)
    found = {name: t.detach() for name, t in outputs.items()}
    if need:
        come = [incoming(name, t) for name, t in outputs.items()]
        differentiable = [(t, g) for t, g in zip(outputs.values(), come) if t.requires_grad]
        grads = [None] * len(need)
        if differentiable:
            results, come = zip(*differentiable)
            grads = torch.autograd.grad(results, [leaves[name] for name in need], come, allow_unused=True)
        for name, grad in zip(need, grads):
            found[f"d_{name}"] = torch.zeros_like(tensors[name]) if grad is None else grad
    return found


def function_of(call: Call) -> Callable:
    return getattr(ops, call.op)
