"""Features in a file that is mapped into memory for reading, so that memory does not limit their number."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Features:
    """Rows [n, D] that are added one batch after another and read in parts, as float32 tensors.

    file: a path, which becomes a .npy file; or None for a file that disappears with this object.
    folder: folder of the file that disappears. half: store float16 instead of float32.
    """

    def __init__(self, file: Path | None = None, folder: str | Path | None = None, half: bool = False) -> None:
        if file:
            file.unlink(missing_ok=True)  # a link there is replaced, not followed
        self._file = open(file, "x+b") if file else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._dtype, self._count, self.width, self._start = np.dtype("<f2" if half else "<f4"), 0, 0, 0

    def append(self, rows: Tensor) -> None:
        """Adds rows [k, D]."""
        if not self.width:
            self.width = rows.shape[1]
            self._header()
            self._start = self._file.tell()
        self._file.write(rows.detach().cpu().numpy().astype(self._dtype).tobytes())
        self._count += len(rows)

    def finish(self) -> Features:
        """Writes buffered rows to the file, and the number of rows into its header."""
        if self.width:
            self._header()
            self._file.seek(0, os.SEEK_END)
        self._file.flush()
        return self

    def _header(self) -> None:
        self._file.seek(0)  # numpy leaves room for a larger number of rows
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count, self.width)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: slice | Sequence[int]) -> Tensor:
        """Returns rows as float32 [k, D]: a copy, so that pages of the file do not stay in memory."""
        if not self._count:
            return torch.empty(0, self.width)
        rows = np.memmap(self._file, self._dtype, "r", self._start, (self._count, self.width))
        return torch.from_numpy(rows[key].astype(np.float32))
