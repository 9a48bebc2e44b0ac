"""Products in TF32 on a CPU, as plain torch has them on a GPU with
torch.backends.cuda.matmul.fp32_precision = "tf32".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {
    getattr(torch.ops.aten, name).default: first
    for name, first in (("mm", 0), ("bmm", 0), ("addmm", 1))
}


def rounded(t: Tensor) -> Tensor:
    """Rounds float32 to 10 bits of mantissa, ties away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class ProductsInTF32(TorchDispatchMode):
    """A mode that rounds the operands of products of float32 matrices, in backward too."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first = PRODUCTS.get(function)
        if first is not None and args[first].dtype == torch.float32:
            args = (*args[:first], *map(rounded, args[first : first + 2]), *args[first + 2 :])
        return function(*args, **(kwargs or {}))
