"""Image files (JPEG, PNG, WebP) to pixels: `decode` to a uint8 tensor, `decode_pil` to a PIL image.

Only the first frame of an animation is used, and EXIF's orientation is ignored, as in open_clip.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simplclip.data.errors import BrokenSample
from simplclip.data.files import open_image


def opened(encoded: bytes) -> Image.Image:
    """Reads the header of a file; its pixels are not decoded yet. Raises BrokenSample as `decode` does."""
    _, image = open_image(encoded)
    check_pixels(image.height, image.width)
    return image


def size_of(encoded: bytes) -> tuple[int, int]:
    """Reads height and width from the header."""
    image = opened(encoded)
    return image.height, image.width


def decode(encoded: bytes | Image.Image, *, least: tuple[int, int] | None = None) -> Tensor:
    """Decodes a file, or what `opened` returned of it, to RGB, uint8 [3, H, W].

    least: height and width that are enough. A JPEG that is 2, 4 or 8 times as large is decoded at that fraction of its sides
        (rounded up), which is faster; other formats stay as they are.
    Raises BrokenSample: "not an image", "truncated image", or, before anything is decoded, "image too large" for a header
    that promises more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    return to_tensor(decode_pil(encoded, least=least))


def decode_pil(encoded: bytes | Image.Image, *, least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes a file as `decode` does, to a PIL image."""
    image = opened(encoded) if isinstance(encoded, bytes) else encoded
    try:
        if least:
            image.draft(None, least[::-1])
        image.load()
        return rgb(image)
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("truncated image", error) from None


def rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB as open_clip does, without its alpha. 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_pixels(height: int, width: int) -> None:
    """Raises BrokenSample("image too large") for more pixels than Pillow's limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise BrokenSample("image too large", f"{width} x {height} pixels, more than {limit} (PIL.Image.MAX_IMAGE_PIXELS)")
