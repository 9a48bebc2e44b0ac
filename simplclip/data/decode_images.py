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
from collections.abc import Callable

import PIL
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageStat,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from simplclip.data.errors import BrokenSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
RAW_SUFFIXES = ("dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2")  # of cameras
OTHER_IMAGE_SUFFIXES = ("heic", "heif", "jxl", "jp2", "psd", "svg", *RAW_SUFFIXES)  # not read
CONVERT = "ImageMagick converts it, e.g. mogrify -format jpg *.heic"
_PLUGINS: dict[bytes, Callable[[io.BytesIO], Image.Image]] = {
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
    b"GIF8": GifImagePlugin.GifImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"II*\0": TiffImagePlugin.TiffImageFile,
    b"MM\0*": TiffImagePlugin.TiffImageFile,
}
# modes that become another one; Pillow converts La and RGBa to no RGB
_DECODED_MODES = {"L": "RGB", "La": "LA", "RGBa": "RGBA"}
if int(PIL.__version__.partition(".")[0]) < 11:  # which cannot resize these
    _DECODED_MODES |= {"I;16": "I", "I;16B": "I"}
_CONTAINER = b"ftyp"  # of AVIF and HEIC, after four bytes; the brand follows
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
with contextlib.suppress(ImportError):  # before Pillow 11.2
    from PIL import AvifImagePlugin

    _PLUGINS |= dict.fromkeys(_AVIF_BRANDS, AvifImagePlugin.AvifImageFile)
LONGEST_SIDE = 65_535  # a JPEG's; resizing a longer side takes memory without limit


def open_image(encoded: bytes) -> Image.Image:
    """Reads the header of an image file of IMAGE_SUFFIXES; its pixels are not decoded yet.

    Raises BrokenSample: "not an image" for any other content; "image too large" for more pixels
    than `PIL.Image.MAX_IMAGE_PIXELS` or a side above LONGEST_SIDE.
    """
    # Image.open would try other formats, and warn of many pixels
    in_container = encoded[4:8] == _CONTAINER
    start = encoded[8:12] if in_container else encoded[:8]
    plugin = next((plugin for magic, plugin in _PLUGINS.items() if start.startswith(magic)), None)
    if plugin is None:
        detail = f"{len(encoded)} bytes of none of the formats {', '.join(IMAGE_SUFFIXES)}"
        if in_container:
            detail = f"perhaps HEIC, not read; {CONVERT}"
        raise BrokenSample("not an image", detail)
    try:
        image = plugin(io.BytesIO(encoded))
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("not an image", error) from None
    if max(image.size) > LONGEST_SIDE:
        detail = f"{image.width} x {image.height} pixels, more than {LONGEST_SIDE} on a side"
        raise BrokenSample("image too large", detail)
    check_pixels(image.height, image.width)
    return image


def check_pixels(height: int, width: int) -> None:
    """Raises BrokenSample("image too large") above `PIL.Image.MAX_IMAGE_PIXELS`; None: no limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise BrokenSample(
            "image too large",
            f"{width} x {height} pixels, more than {limit} (PIL.Image.MAX_IMAGE_PIXELS)",
        )


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


def remarks_on(image: Image.Image, size: int) -> list[str]:
    """Returns what is odd about an image's pixels, as phrases that `simplclip data pack` counts.

    [] if nothing is, or the pixels are damaged. An opaque image with many bytes for its size is not
    decoded. image: from `open_image`; it is shrunk in place. size: bytes of its file.
    """
    remarks: list[str] = []
    if _is_turned(image):
        remarks.append("turned by EXIF, which the model does not heed")
    any_alpha = image.mode in ("LA", "RGBA") or "transparency" in image.info
    deep = image.mode.startswith(("I", "F"))  # grey, which becomes white or black
    # compressed, an image of one colour takes fewer bytes
    compressed = image.format not in ("BMP", "TIFF")
    many_bytes = compressed and size > 4096 + image.width * image.height / 20
    if many_bytes and not any_alpha and not deep:
        return remarks
    with contextlib.suppress(Exception):  # the type depends on the damage
        image.thumbnail((256, 256))
        if any_alpha and ImageStat.Stat(image.convert("RGBA")).extrema[3][0] < 255:
            remarks.append("with transparency, which the model does not see")
        # lossy WebP has 4
        if all(high - low <= 8 for low, high in ImageStat.Stat(opaque(image)).extrema):
            remarks.append("of one colour as the model sees them")
    return remarks


def _is_turned(image: Image.Image) -> bool:
    """Whether an image's EXIF, if it stands before the pixels, says to turn or mirror it."""
    if "exif" not in image.info:  # without it, getexif decodes a PNG
        return False
    # the type of an error depends on the damage, of which Pillow may warn too
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


def opaque(image: Image.Image) -> Image.Image:
    """Returns an image as RGB; what is wholly transparent becomes black, as in open_clip."""
    premultiplied = {"LA": "La", "RGBA": "RGBa"}.get(image.mode)
    if premultiplied is not None:
        image = image.convert(premultiplied).convert(image.mode)
    return to_rgb(image)
