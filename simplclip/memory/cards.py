"""Memory of cards, by name or by size. Nothing here needs torch."""

import re

from simplclip.common.errors import InputError

# GiB of memory of cards, from their data sheets.
CARDS = {"rtx-3090": 24, "rtx-4090": 24, "rtx-5090": 32, "rtx-3060": 12, "a100-40": 40, "a100-80": 80, "h100": 80}


def parse_memory(text: str) -> int:
    """Returns the bytes of a size such as "24GiB", or of a card in `CARDS`. Raises InputError.

    "24GB" means "24GiB": the memory of cards is counted in powers of two, though vendors write GB.
    """
    name = re.sub(r"[\s_]+", "-", text.strip().lower())
    for card in (name, f"rtx-{name}"):
        if card in CARDS:
            return CARDS[card] << 30
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])I?B", text.strip().upper())
    if not match or not float(match[1]):
        raise InputError(f"memory: expected a size such as 24GiB or one of {', '.join(CARDS)}, got {text!r}")
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]])
