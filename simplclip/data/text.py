"""Text of files from elsewhere: what is used of a caption, a label or a name, and JSON that cannot end the program."""

from __future__ import annotations

import json
import re
from typing import Any

LONGEST = 8192  # characters of a caption that are used: more than any tokenizer takes, and tokenizers may be quadratic
BYTES = 16 << 20  # most bytes of a text of a sample; parsed, JSON takes up to 30 times as many
_NO_CHARACTER = re.compile("[\ud800-\udfff\0]")


def clean(text: str) -> str:
    """A caption or name without spaces around it, cut to LONGEST; lone surrogates and NUL become U+FFFD."""
    return _NO_CHARACTER.sub("\ufffd", text.removeprefix("\ufeff").strip()[:LONGEST].rstrip())


def json_of(data: str | bytes) -> Any:
    """What JSON holds. Raises ValueError for all that is wrong with it."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
