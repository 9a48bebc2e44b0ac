"""The dtype of statistics and sums."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
