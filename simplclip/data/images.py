"""Image files: their headers, and their pixels by Pillow, without torch.

As in open_clip, only the first frame of an animation is used, and EXIF's orientation is ignored,
except that Pillow turns a TIFF by its own.
open_clip resizes an image in its own mode and then converts it to RGB; so a mode other than RGB and
grey is kept until then (transforms.py).
"""

from __future__ import annotations

import contextlib
import io
import warnings

import PIL
from PIL import Image

from simplclip.data.errors import BrokenSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
RAW_SUFFIXES = ("dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2")  # of cameras
OTHER_IMAGE_SUFFIXES = ("heic", "heif", "jxl", "jp2", "psd", "svg", *RAW_SUFFIXES)  # not read
CONVERT = "ImageMagick converts it, e.g. mogrify -format jpg *.heic"
JPEGS = ("JPEG", "MPO")  # MPO: a JPEG of several pictures, as some phones write it
Image.init()
# AVIF: since Pillow 11.2
FORMATS = [
    name for name in (*JPEGS, "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN
]
# modes that become another one; Pillow converts La and RGBa to no RGB
_DECODED_MODES = {"L": "RGB", "La": "LA", "RGBa": "RGBA"}
if int(PIL.__version__.partition(".")[0]) < 11:  # which cannot resize these
    _DECODED_MODES |= {"I;16": "I", "I;16B": "I"}


def open_image(encoded: bytes) -> Image.Image:
    """Reads the header of an image file of FORMATS; its pixels are not decoded yet.

    Raises BrokenSample: "not an image" for any other content; "image too large" for more pixels
    than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BrokenSample("image too large", error) from None
    except Exception:  # decoders raise many types for damaged bytes
        detail = f"{len(encoded)} bytes of none of the formats {', '.join(IMAGE_SUFFIXES)}"
        raise BrokenSample("not an image", detail) from None


def check_pixels(height: int, width: int) -> None:
    """Raises BrokenSample("image too large") above `PIL.Image.MAX_IMAGE_PIXELS`; None: no limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise BrokenSample("image too large", f"{width} x {height} pixels, more than {limit}")


def decode_pil(encoded: bytes | Image.Image) -> Image.Image:
    """Returns the decoded image of a file's bytes, or of what `open_image` returned, in place.

    Grey becomes RGB, and premultiplied alpha is divided out; other modes, e.g. RGBA or P, stay.
    Raises BrokenSample: "truncated image" for damaged pixels, and those of `open_image`.
    """
    image = open_image(encoded) if isinstance(encoded, bytes) else encoded
    try:
        image.load()
        mode = _DECODED_MODES.get(image.mode)
        return image if mode is None else image.convert(mode)
    except Exception as error:
        raise BrokenSample("truncated image", error) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns an image in mode RGB, itself if it is RGB already; alpha is dropped, not blended."""
    if image.mode == "P" and "transparency" in image.info:  # of which Pillow would warn
        image = image.copy()
        del image.info["transparency"]
    return image if image.mode == "RGB" else image.convert("RGB")


def opaque(image: Image.Image) -> Image.Image:
    """Returns an image as RGB; what is wholly transparent becomes black, as in open_clip."""
    premultiplied = {"LA": "La", "RGBA": "RGBa"}.get(image.mode)
    if premultiplied is not None:
        image = image.convert(premultiplied).convert(image.mode)
    return to_rgb(image)


def is_transparent(image: Image.Image) -> bool:
    """Whether some pixels are transparent; False for damaged ones. It is shrunk in place."""
    if image.mode not in ("LA", "RGBA") and "transparency" not in image.info:
        return False
    with contextlib.suppress(Exception):  # the type depends on the damage
        image.thumbnail((256, 256))
        return image.convert("RGBA").getchannel("A").histogram()[255] < image.width * image.height
    return False
