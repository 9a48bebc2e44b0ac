"""Images that compress like photographs: noise of several frequencies and gradients, and drawings
on it.
"""

import io
import zlib

import numpy as np
from PIL import Image


def photo(seed=0, size=(240, 320)):
    """Returns an image, uint8 RGB. size: height and width."""
    rng = np.random.default_rng(seed)
    total = np.linspace(0, 1, size[1])[None, :, None] * rng.random(3) + np.linspace(0, 1, size[0])[
        :, None, None
    ] * rng.random(3)
    for cells in (3, 6, 12, 24, 48, 96, 192):
        noise = rng.random((cells, cells, 3)).astype(np.float32) * 0.4 + rng.random(
            (cells, cells, 1)
        ).astype(np.float32)
        channels = [
            Image.fromarray(noise[..., i]).resize(size[::-1], Image.Resampling.BICUBIC)
            for i in range(3)
        ]
        total = total + np.stack(channels, -1) * 3 / cells**0.7
    total = (total - total.min()) / np.ptp(total)
    return Image.fromarray((total * 255).round().astype(np.uint8))


def encode(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_that_claims(side):
    """Returns a small PNG whose header claims side x side pixels."""
    small = bytearray(encode(Image.new("RGB", (4, 4)), "PNG"))
    small[16:24] = side.to_bytes(4, "big") * 2
    small[29:33] = zlib.crc32(bytes(small[12:29])).to_bytes(4, "big")
    return bytes(small)
