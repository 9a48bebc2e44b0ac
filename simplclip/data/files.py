"""Files from elsewhere: headers of images, captions and JSON, of which no content ends the program. It imports no torch."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Callable
from typing import Any

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from simplclip.data.errors import BrokenSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 256 << 20  # most bytes of an image, if no other limit is given
TEXT_BYTES = 16 << 20  # most bytes of a text file of a sample; parsed JSON takes up to 30 times as many
LONGEST = 8192  # characters of a caption that are used: more than any tokenizer takes, and tokenizers may be quadratic
_NO_CHARACTER = re.compile("[\ud800-\udfff\0]")

# "__key__", "__url__", "__shard__" (the source's name), and bytes or a BrokenSample by suffix
Sample = dict[str, Any]


def file_bytes(path: str | os.PathLike, limit: int = MAX_BYTES) -> bytes:
    """Reads a file. Raises OSError, and BrokenSample if it is too large.

    What is no regular file is refused by OSError: reading a named pipe or a device may take for ever.
    """
    try:
        about = os.stat(path)
    except ValueError:  # a name with NUL
        about = None
    if about is None or not stat.S_ISREG(about.st_mode):
        raise OSError(f"expected a file, got {os.fspath(path)!r}")
    if about.st_size <= limit:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        if len(content) <= limit:
            return content
    raise BrokenSample("file too large", f"{os.fspath(path)!r} of {about.st_size:,} bytes, expected at most {limit:,}")


def state_of(path: str | os.PathLike) -> dict[str, int]:
    """Returns what tells in a meta.json whether a file has changed."""
    about = os.stat(path)
    return {"bytes": about.st_size, "mtime_ns": about.st_mtime_ns}


def is_jpeg(encoded: bytes) -> bool:
    return encoded[:3] == b"\xff\xd8\xff"


def open_image(encoded: bytes) -> tuple[str, Image.Image]:
    """Returns the suffix of an image by its content, and the image, whose pixels are not decoded yet. Raises BrokenSample.

    Image.open would apply a limit of pixels, and try other formats.
    """
    plugin: Callable[[io.BytesIO], Image.Image]
    if is_jpeg(encoded):
        suffix, plugin = "jpg", JpegImagePlugin.JpegImageFile
    elif encoded[:8] == b"\x89PNG\r\n\x1a\n":
        suffix, plugin = "png", PngImagePlugin.PngImageFile
    elif encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        suffix, plugin = "webp", WebPImagePlugin.WebPImageFile
    else:
        raise BrokenSample("not an image", f"{len(encoded)} bytes that are not jpg, png or webp")
    try:
        return suffix, plugin(io.BytesIO(encoded))
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("not an image", error) from None


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
