"""Files from elsewhere: which are images, how large they may be, and what their headers say. It imports no torch."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from simplclip.data.errors import BrokenSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_BYTES = 256 << 20  # most bytes of an image, if no other limit is given
TEXT_BYTES = 16 << 20  # most bytes of a text file of a sample; parsed JSON takes up to 30 times as many


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
