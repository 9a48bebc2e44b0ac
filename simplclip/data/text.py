"""Text of files from elsewhere: cleans captions, labels and names, and parses JSON so that no content ends the program."""

from __future__ import annotations

import json
import re
from typing import Any

LONGEST = 8192  # characters of a caption that are used: more than any tokenizer takes, and tokenizers may be quadratic
BYTES = 16 << 20  # most bytes of a text file of a sample; parsed JSON takes up to 30 times as many
_NO_CHARACTER = re.compile("[\ud800-\udfff\0]")


def clean(text: str) -> str:
    """Strips a caption or name and cuts it to LONGEST characters. Lone surrogates and NUL become U+FFFD."""
    return _NO_CHARACTER.sub("\ufffd", text.removeprefix("\ufeff").strip()[:LONGEST].rstrip())


def json_of(data: str | bytes) -> Any:
    """Parses JSON. Raises ValueError for any error in it, also for too deep nesting."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
