"""Captions and JSON of files from elsewhere: no content ends the program. It imports no torch, so that packing is quick."""

from __future__ import annotations

import json
import re
from typing import Any

from simplclip.data.errors import BrokenSample

LONGEST = 8192  # characters of a caption that are used: more than any tokenizer takes, and tokenizers may be quadratic
_NO_CHARACTER = re.compile("[\ud800-\udfff\0]")

Sample = dict[str, Any]  # the files of a sample by suffix, see tars.py


def record_of(sample: Sample) -> dict[str, Any]:
    """Parses the json of a sample; {} without one. Raises BrokenSample."""
    record: Any = {}
    if "json" in sample:
        try:
            record = json_of(sample["json"])
        except ValueError as error:
            raise BrokenSample("bad json", error) from None
        if not isinstance(record, dict):
            raise BrokenSample("bad json", f"expected an object, got {type(record).__name__}")
    return record


def captions_of(sample: Sample, record: dict[str, Any], *, txt_lines: bool = False) -> list[str]:
    """Returns the captions of a sample, at least one. Raises BrokenSample.

    txt_lines: each line of the txt is a caption, as in clip-benchmark's layout; else the txt is one, its white space joined.
    """
    several, single = record.get("captions"), record.get("caption")
    if isinstance(several, list) and (captions := not_empty(several)):
        return captions
    texts = [*(several if isinstance(several, list) else ()), single]
    if captions := not_empty([single]):
        return captions
    if "txt" in sample:
        try:
            text = sample["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample("caption not UTF-8", error) from None
        texts = text.splitlines() if txt_lines else [" ".join(text.split())]
        if captions := not_empty(texts):
            return captions
    raise BrokenSample("empty caption" if any(isinstance(text, str) for text in texts) else "missing caption", "")


def not_empty(texts: list[Any]) -> list[str]:
    """Cleans texts by `clean`; returns those that are not empty."""
    return [cleaned for text in texts if isinstance(text, str) and (cleaned := clean(text))]


def clean(text: str) -> str:
    """Strips a caption or name and cuts it to LONGEST characters. Lone surrogates and NUL become U+FFFD."""
    return _NO_CHARACTER.sub("\ufffd", text.removeprefix("\ufeff").strip()[:LONGEST].rstrip())


def json_of(data: str | bytes) -> Any:
    """Parses JSON. Raises ValueError for any error in it, also for too deep nesting."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
