"""The positives of similarity_loss: the columns that belong to each row, their number, and sums of features over them.

Only this file reads the ids; the ops' calls carry them to the kernels. Everything but `masks` takes O((N + M) D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from simplclip.ops import checks, distributed
from simplclip.ops.similarity.call import SigmoidCall, SimilarityCall


def _equal(ids: Tensor, among: Tensor) -> Tensor:  # [N], [M] -> [N]
    """Returns for each id how many of `among` are equal to the id."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)


def _checked(name: str, ids: Tensor, count: int, letter: str, device: torch.device) -> Tensor:
    """Checks the ids and returns them as the kernels read them: int64, contiguous."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise TypeError(f"{name}: expected an int64 or int32 tensor [{letter}], got {got}")
    if ids.dim() != 1 or ids.shape[0] != count:
        raise ValueError(f"{name}: expected shape [{letter}] = [{count}], got {checks.shape_of(ids)}")
    checks.on(name, ids, "image", device)
    return ids.long().contiguous()


@dataclass
class SameIds:
    """The columns that belong to row i: its pair, column i + label_offset, and the columns with the id of the row."""

    n: int
    m: int
    label_offset: int
    ids: Tensor | None = None  # [N] int64, contiguous
    text_ids: Tensor | None = None  # [M] int64, contiguous
    gathered: bool = False  # whether the columns are those of all ranks, so that each is the pair of a row of some rank

    @classmethod
    def checked(
        cls,
        ids: Tensor | None,
        text_ids: Tensor | None,
        label_offset: int,
        image: Tensor,
        text: Tensor,
        group: torch.distributed.ProcessGroup | None,
    ) -> SameIds:
        """Checks similarity_loss's arguments, makes an instance. With a process group the columns are those of all ranks."""
        n, m, device = image.shape[0], text.shape[0], image.device
        if ids is not None:
            ids = _checked("ids", ids, n, "N", device)
            if text_ids is None and n != m:
                raise ValueError(f"text_ids: expected ids for {m} columns, since M is not N = {n}, got None")
        if text_ids is not None:
            if ids is None:
                raise ValueError("ids: expected ids for the rows beside text_ids, got None")
            if group is not None:
                raise ValueError("text_ids: expected None with group, where the ids of the texts are those of the images")
            text_ids = _checked("text_ids", text_ids, m, "M", device)
        else:
            text_ids = ids
        if group is not None:
            if m != n:
                raise ValueError(f"text: expected this rank's {n} rows with group (they are gathered), got {m}")
            if label_offset != 0:
                raise ValueError(f"label_offset: expected 0 with group, which sets it by rank, got {label_offset}")
            m, label_offset = torch.distributed.get_world_size(group) * n, torch.distributed.get_rank(group) * n
            text_ids = None if text_ids is None else distributed.gather(text_ids, group)
        if isinstance(label_offset, bool) or not isinstance(label_offset, (int, torch.SymInt)):
            raise TypeError(f"label_offset: expected an int, got {type(label_offset).__name__}")
        if not 0 <= label_offset <= m - n:
            raise ValueError(
                f"label_offset: expected 0 <= label_offset <= M - N = {m - n} so that each of {n} rows has its column among "
                f"{m}, got {label_offset}"
            )
        return cls(n, m, label_offset, ids, text_ids, group is not None)

    @property
    def given(self) -> bool:
        """Whether there are ids. Without ids only the column of its own pair belongs to a row."""
        return self.ids is not None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a call (see call.py) that describe these pairs."""
        return {"ids": self.ids, "text_ids": self.text_ids, "label_offset": self.label_offset}

    @property
    def window(self) -> slice:
        """The columns of the rows' pairs."""
        return slice(self.label_offset, self.label_offset + self.n)

    @property
    def all_rows(self) -> int:
        """The number of rows that a column is compared with."""
        return self.m if self.gathered else self.n

    def without_ids(self) -> SameIds:
        return replace(self, ids=None, text_ids=None)

    def transposed(self) -> SameIds:
        """Returns the rows that belong to each column that has a pair, as an instance with rows and columns exchanged."""
        text_ids = None if self.text_ids is None else self.text_ids[self.window]
        return SameIds(self.n, self.n, 0, text_ids, self.ids)

    def _apart(self) -> Tensor:  # [N]
        """Returns whether the row and the column of each pair have different ids."""
        return self.text_ids[self.window] != self.ids

    def of_rows(self) -> Any:  # [N] int64, at least 1; the number 1 without ids
        """Returns how many columns belong to each row."""
        return 1 if self.ids is None else _equal(self.ids, self.text_ids) + self._apart()

    def of_columns(self) -> Any:  # [M] int64
        """Returns how many rows each column belongs to. With a process group, the rows of all ranks have the columns' ids."""
        if self.ids is None:
            return 1
        if self.gathered:
            return _equal(self.text_ids, self.text_ids)
        own = torch.zeros_like(self.text_ids)
        own[self.window] = self._apart().to(own.dtype)
        return _equal(self.text_ids, self.ids) + own

    def sums(self, values: Tensor) -> Tensor:  # [M, D] -> [N, D]
        """Returns for each row the sum of `values` over the columns that belong to the row."""
        own = values[self.window]
        if self.ids is None:
            return own
        # An id is numbered by its first place in the sorted ids. Unlike torch.unique this reads no number from the device.
        ordered = self.text_ids.sort().values
        totals = torch.zeros_like(values).index_add(0, torch.searchsorted(ordered, self.text_ids), values)
        at = torch.searchsorted(ordered, self.ids).clamp(max=self.m - 1)
        found = ordered[at] == self.ids
        return torch.where(found[:, None], totals[at], 0) + torch.where(self._apart()[:, None], own, 0)


def masks(call: SimilarityCall | SigmoidCall) -> tuple[Tensor, Tensor]:  # [N, M] bool each
    """Returns masks of each row's pair and of the columns that belong to it. For the reference, which has whole matrices."""
    rows, columns = (torch.arange(t.shape[0], device=t.device) for t in (call.image, call.text))
    own = columns == rows[:, None] + call.label_offset
    return own, own if call.ids is None else own | (call.ids[:, None] == call.text_ids)
