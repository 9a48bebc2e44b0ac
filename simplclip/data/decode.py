"""Decoding of images."""

from __future__ import annotations

import io
import warnings

from PIL import Image, UnidentifiedImageError

from simplclip.data.broken import BrokenSample


def decode_pil(data: bytes) -> Image.Image:
    """Decodes an image as RGB; transparent images are composed on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BrokenSample("image too large", error) from None
    except UnidentifiedImageError:
        raise BrokenSample("not an image", f"{len(data)} bytes that are not jpg, png or webp") from None
    except Exception as error:  # decoders raise many types for damaged bytes
        raise BrokenSample("not an image", error) from None
    try:
        return on_white(image) if image.has_transparency_data else image.convert("RGB")
    except Exception as error:
        raise BrokenSample("truncated image", error) from None


def on_white(image: Image.Image, size: tuple[int, int] | None = None) -> Image.Image:
    """RGB; centred on white of `size`, by default its own."""
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", size or image.size, "white")
    canvas.alpha_composite(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas.convert("RGB")
