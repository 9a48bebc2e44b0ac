"""Image files (JPEG, PNG, WebP): their headers, and their pixels by Pillow. It imports no torch.

Only the first frame of an animation is used, and EXIF's orientation is ignored, as in open_clip.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from simplclip.data.errors import BrokenSample

SUFFIXES = ("jpg", "jpeg", "png", "webp")
_PLUGINS: dict[bytes, Callable[[io.BytesIO], Image.Image]] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}


def open_image(encoded: bytes) -> Image.Image:
    """Reads the header of a file. Image.open would try other formats, and warn of many pixels.

    Raises BrokenSample: "not an image", or "image too large" for more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    plugin = next((plugin for magic, plugin in _PLUGINS.items() if encoded.startswith(magic)), None)
    if plugin is None:
        raise BrokenSample("not an image", f"{len(encoded)} bytes that are not jpg, png or webp")
    try:
        image = plugin(io.BytesIO(encoded))
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("not an image", error) from None
    check_pixels(image.height, image.width)
    return image


def check_pixels(height: int, width: int) -> None:
    """Raises BrokenSample("image too large") for more pixels than Pillow's limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise BrokenSample("image too large", f"{width} x {height} pixels, more than {limit} (PIL.Image.MAX_IMAGE_PIXELS)")


def decode_pil(encoded: bytes | Image.Image) -> Image.Image:
    """Decodes a file, or what `open_image` returned of it, to RGB. Raises BrokenSample, also "truncated image"."""
    image = open_image(encoded) if isinstance(encoded, bytes) else encoded
    try:
        image.load()
        image.info.pop("transparency", None)  # of which Pillow would warn; `rgb` may be given a caller's own image
        return rgb(image)
    except Exception as error:
        raise BrokenSample("truncated image", error) from None


def rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB as open_clip does, without its alpha. 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
