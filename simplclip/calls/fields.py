"""What all calls share: the types of their fields, and the schema that is made of them.

A call is a frozen dataclass whose fields are the op's arguments in the schema's order.

In a call that autograd differentiates, the fields that are tensors come first. This module imports
torch alone.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

Mutated = Tensor  # the type of a field that the op overwrites
# the type of a field of which only the last dimension is contiguous; those of type Tensor are
# contiguous
Strided = Tensor

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "Strided": "Tensor",
    "Strided | None": "Tensor?",
    "int": "SymInt",
    "bool": "bool",
    "float": "float",
    "str": "str",
    "list[bool]": "bool[]",
}


def schema_of(call: type) -> str:
    """Returns the arguments of an op in the dispatcher's schema, e.g. "Tensor x, SymInt n".

    They are the fields of the dataclass in their order; one of type Mutated is marked as written.
    """
    types = _TYPES | {"Mutated": "Tensor({}!)"}
    aliases = iter("abc")
    arguments = []
    for field in fields(call):
        kind = types[str(field.type)]
        if field.type == "Mutated":
            kind = kind.format(next(aliases))
        arguments.append(f"{kind} {field.name}")
    return ", ".join(arguments)


def tensors_of(call: type) -> list[str]:
    """Returns the names of the fields of type Tensor or Strided, also where they may be None."""
    return [
        field.name for field in fields(call) if str(field.type).startswith(("Tensor", "Strided"))
    ]


def flat(call: Any) -> tuple:
    """Returns the values of a call's fields in their order: the dispatcher's arguments.

    torch 2.11 cannot trace vars() of a dataclass.
    """
    return tuple([getattr(call, name) for name in call.__match_args__])


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of statistics and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
