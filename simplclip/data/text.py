"""Text of files from elsewhere: what is used of a caption, a label or a name, and JSON that cannot end the program."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

LONGEST = 8192  # characters of a caption that are used: more than any tokenizer takes, and tokenizers may be quadratic
TXT_BYTES = 1 << 20  # of a txt file that are read
JSON_BYTES = 1 << 24  # of a sample's json; a larger one is broken
_NO_CHARACTER = re.compile("[\ud800-\udfff\0]")


def clean(text: str) -> str:
    """A caption or name without spaces around it, cut to LONGEST; lone surrogates and NUL become U+FFFD."""
    return _NO_CHARACTER.sub("\ufffd", text.removeprefix("\ufeff").strip()[:LONGEST].rstrip())


def decoded(data: bytes) -> str:
    """The text of the first TXT_BYTES of a txt file. Raises UnicodeDecodeError."""
    return codecs.getincrementaldecoder("utf-8-sig")().decode(data[:TXT_BYTES], len(data) <= TXT_BYTES)


def json_of(data: str | bytes, most: int | None = None) -> Any:
    """What JSON of at most `most` bytes holds. Raises ValueError for all that is wrong with it."""
    if most is not None and len(data) > most:
        raise ValueError(f"{len(data):,} bytes, of at most {most:,}")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
