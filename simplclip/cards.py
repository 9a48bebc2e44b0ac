"""Memory of cards, and what of it a step cannot have."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GIB = 2**30
CARDS = {
    "rtx-3090": 24 * GIB,
    "rtx-4090": 24 * GIB,
    "rtx-3060": 12 * GIB,
    "a100-40": 40 * GIB,
    "a100-80": 80 * GIB,
}
_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

# Assumptions, not measured by this library: the driver's context with the modules of torch and cuBLAS, the workspaces of
# cuBLAS and cuDNN, and what the allocator's blocks lose.
CONTEXT_BYTES = 640 * 2**20
LIBRARY_BYTES = 160 * 2**20
FRAGMENTATION = 0.04


@dataclass(frozen=True)
class Budget:
    """Bytes of a card or a machine, and what a step may take of them."""

    memory: int
    context: int = CONTEXT_BYTES
    libraries: int = LIBRARY_BYTES
    fragmentation: float = FRAGMENTATION

    @property
    def usable(self) -> int:
        return int((self.memory - self.context - self.libraries) * (1 - self.fragmentation))

    def assumptions(self) -> list[str]:
        mib = 2**20
        return [
            f"{self.context // mib} MiB for the context of the driver and of torch's libraries",
            f"{self.libraries // mib} MiB for workspaces inside cuBLAS and cuDNN, which no op states",
            f"{self.fragmentation:.0%} of the rest lost to the allocator's fragmentation",
        ]


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24000MB" or a card of `CARDS`. Errors: ValueError."""
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    name = name if name in CARDS else f"rtx-{name}" if f"rtx-{name}" in CARDS else name
    if name in CARDS:
        return CARDS[name]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if not match or not float(match[1]):
        near = difflib.get_close_matches(name, CARDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"memory: expected a size such as 24GiB or one of {', '.join(CARDS)}, came {text!r}{hint}")
    return int(float(match[1]) * _UNITS[match[2]])
