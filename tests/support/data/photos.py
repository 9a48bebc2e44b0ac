"""Images that compress like photographs: gradients, and noise of several frequencies."""

import functools
import io
import re
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


@functools.cache
def photo(seed: int = 0, size: tuple[int, int] = (240, 320)) -> Image.Image:
    """Returns an image, uint8 RGB. size: height and width."""
    rng = np.random.default_rng(seed)
    height, width = size
    across = np.linspace(0, 1, width)[None, :, None] * rng.random(3)
    down = np.linspace(0, 1, height)[:, None, None] * rng.random(3)
    pixels = across + down
    for cells in (3, 6, 12, 24, 48, 96, 192):
        coloured = rng.random((cells, cells, 3)).astype(np.float32)
        grey = rng.random((cells, cells, 1)).astype(np.float32)
        noise = coloured * 0.4 + grey
        channels = [
            Image.fromarray(noise[..., i]).resize((width, height), Image.Resampling.BICUBIC)
            for i in range(3)
        ]
        pixels = pixels + np.stack(channels, -1) * 3 / cells**0.7
    pixels = (pixels - pixels.min()) / np.ptp(pixels)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """Returns the bytes of an image file. options: of PIL's `save`."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_that_claims(side: int) -> bytes:
    """Returns a small PNG whose header claims side x side pixels."""
    small = bytearray(encode(Image.new("RGB", (4, 4)), "PNG"))
    small[16:24] = side.to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)


def with_tag(tiff: bytes, former: int, tag: int, value: int) -> bytes:
    """Returns a TIFF in which the entry of a former tag is that of a tag with one number."""
    entry = re.escape(struct.pack("<H", former)) + rb"[\x03\x04]\x00\x01\x00\x00\x00...."
    new_entry = struct.pack("<HHII", tag, 4, 1, value)
    return re.sub(entry, lambda found: new_entry, tiff, flags=re.DOTALL)
