"""For each row or column those with the same id: how many there are, and sums of features over them, in O((N + M) D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _equal(ids: Tensor, among: Tensor) -> Tensor:  # [N], [M] -> [N]
    """How many of `among` are equal to each id."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


class SameIds:
    """The columns that belong to row i: its pair, column i + label_offset, and the columns with the id of the row."""

    def __init__(
        self,
        n: int,
        m: int,
        label_offset: int,
        ids: Tensor | None,  # [N] int64
        text_ids: Tensor | None,  # [M] int64
        gathered: bool,  # whether the columns are those of all ranks, so that each is the pair of a row of some rank
    ):
        self.n, self.m, self.gathered = n, m, gathered
        self.ids, self.text_ids = (None, None) if ids is None else (ids.contiguous(), text_ids.contiguous())
        self.window = slice(label_offset, label_offset + n)
        # [N]: whether the row and the column of a pair have different ids.
        self.apart = None if ids is None else text_ids[self.window] != ids

    @property
    def all_rows(self) -> int:
        """The number of rows that a column is compared with."""
        return self.m if self.gathered else self.n

    def of_rows(self) -> Any:  # [N] int64, at least 1; the number 1 without ids
        """How many columns belong to each row."""
        return 1 if self.ids is None else _equal(self.ids, self.text_ids) + self.apart

    def of_columns(self) -> Any:  # [M] int64
        """How many rows each column belongs to. With a process group, the rows of all ranks have the columns' ids."""
        if self.ids is None:
            return 1
        if self.gathered:
            return _equal(self.text_ids, self.text_ids)
        own = torch.zeros_like(self.text_ids)
        own[self.window] = self.apart.to(own.dtype)
        return _equal(self.text_ids, self.ids) + own

    def sums(self, values: Tensor) -> Tensor:  # [M, D] -> [N, D]
        """For each row the sum of `values` over the columns that belong to it."""
        own = values[self.window]
        if self.ids is None:
            return own
        # An id is numbered by its first place in the sorted ids. Unlike torch.unique this reads no number from the device.
        ordered = self.text_ids.sort().values
        totals = torch.zeros_like(values).index_add(0, torch.searchsorted(ordered, self.text_ids), values)
        at = torch.searchsorted(ordered, self.ids).clamp(max=self.m - 1)
        found = ordered[at] == self.ids
        return torch.where(found[:, None], totals[at], 0) + torch.where(self.apart[:, None], own, 0)
