"""Image files (JPEG, PNG, WebP) to pixels: `decode` to a uint8 tensor, `decode_pil` to a PIL image.

simplejpeg, which is faster, decodes JPEGs. Pillow decodes the other formats, CMYK and damaged files. Both give equal pixels.
Only the first frame of an animation is used, and EXIF's orientation is ignored, as in open_clip.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simplclip.data.errors import BrokenSample
from simplclip.data.files import is_jpeg, open_image

try:
    import simplejpeg
except ImportError:  # it has no wheel for this platform
    simplejpeg = None

SCALES = (8, 4, 2)  # scales that `decode` takes besides 1


def size_of(encoded: bytes, max_pixels: int | None = None) -> tuple[int, int]:
    """Reads height and width from the header. max_pixels: as for `decode`."""
    if (size := _jpeg_size(encoded, max_pixels)) is not None:
        return size
    image = _open(encoded, max_pixels)
    return image.height, image.width


def decode(encoded: bytes, *, scale: int = 1, max_pixels: int | None = None) -> Tensor:
    """Decodes a file to RGB, uint8 [3, H, W].

    Args:
        encoded: the file.
        scale: 1, 2, 4 or 8, by which the sides of a JPEG are divided (and rounded up) while it is decoded, which is faster;
            other formats stay as they are.
        max_pixels: the most pixels that a header may promise, by default Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises BrokenSample: "not an image", "truncated image", or, before anything is decoded, "image too large".
    """
    if (size := _jpeg_size(encoded, max_pixels)) is not None:
        height, width = (-(-side // scale) if scale > 1 else 0 for side in size)
        try:
            array = simplejpeg.decode_jpeg(encoded, "RGB", min_height=height, min_width=width)
        except ValueError:
            pass  # Pillow decodes the file, or names the reason why it cannot
        else:
            return torch.from_numpy(array).permute(2, 0, 1)
    return to_tensor(decode_pil(encoded, scale=scale, max_pixels=max_pixels))


def decode_pil(encoded: bytes, *, scale: int = 1, max_pixels: int | None = None) -> Image.Image:
    """Decodes a file as `decode` does, to a PIL image."""
    image = _open(encoded, max_pixels)
    try:
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        return rgb(image)
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("truncated image", error) from None


def rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB as open_clip does, without its alpha. 16 bits are scaled to 8."""
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Converts an RGB image to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def check_pixels(height: int, width: int, max_pixels: int | None) -> None:
    """Raises BrokenSample("image too large") for more than `max_pixels` pixels, by default Pillow's limit."""
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    if limit is not None and height * width > limit:
        raise BrokenSample("image too large", f"{width} x {height} pixels, more than {limit}")


def _jpeg_size(encoded: bytes, max_pixels: int | None) -> tuple[int, int] | None:
    """Reads height and width of an image that simplejpeg can decode; None for other images."""
    if simplejpeg is None or not is_jpeg(encoded):
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return None  # Pillow may take the file, or names the reason why it cannot
    check_pixels(height, width, max_pixels)
    return (height, width) if space in ("YCbCr", "Gray", "RGB") else None


def _open(encoded: bytes, max_pixels: int | None) -> Image.Image:
    _, image = open_image(encoded)
    check_pixels(image.height, image.width, max_pixels)
    return image
