"""The functions in C++, as registered ops; those of the backend "cpu", for all ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any

import torch

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.calls.fields import schema_of
from simplclip.calls.mlp import HiddenCall, HiddenGradient
from simplclip.calls.similarity import (
    SigmoidCall,
    SimilarityCall,
    SimilarityGradient,
    TermsGradient,
)
from simplclip.ops.registry import library


def native(name: str, call_type: type, returns: str) -> Callable[[Any], Any]:
    """Registers the op `simplclip::name`, which C++ implements; returns a backend's function of it.

    name: of the backend's function, and of the backend after an underscore. call_type: the
    dataclass of its call, whose fields are the arguments. returns: the result types in the schema.
    """
    # C++ runs with numbers, never traced
    arguments = schema_of(call_type).replace("SymInt", "int")
    library.define(f"{name}({arguments}) -> {returns}")
    overload = getattr(torch.ops.simplclip, name).default
    values = attrgetter(*(field.name for field in fields(call_type)))
    return lambda call: overload(*values(call))


shaped_attention_fwd = native("shaped_attention_fwd_cpu", AttentionCall, "(Tensor, Tensor)")
shaped_attention_bwd = native("shaped_attention_bwd_cpu", AttentionInto, "Tensor")
parallel_mlp_fwd = native("parallel_mlp_fwd_cpu", HiddenCall, "()")
parallel_mlp_bwd = native("parallel_mlp_bwd_cpu", HiddenGradient, "Tensor")
similarity_loss_fwd = native("similarity_loss_fwd_cpu", SimilarityCall, "(Tensor, Tensor, Tensor)")
similarity_loss_bwd = native(
    "similarity_loss_bwd_cpu", SimilarityGradient, "(Tensor, Tensor, Tensor, Tensor)"
)
similarity_terms_fwd = native(
    "similarity_terms_fwd_cpu",
    SimilarityCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
similarity_terms_bwd = native(
    "similarity_terms_bwd_cpu", TermsGradient, "(Tensor, Tensor, Tensor, Tensor)"
)
similarity_sigmoid = native(
    "similarity_sigmoid_cpu", SigmoidCall, "(Tensor, Tensor, Tensor, Tensor)"
)
