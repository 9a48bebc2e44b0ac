"""Decoding: what each format and mode becomes, and what is refused."""

import io
import random
import re

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, features

from simplclip.data.errors import BrokenSample
from simplclip.data.images import IMAGE_SUFFIXES, decode_pil, open_image
from simplclip.data.transforms import decode_image, to_tensor
from support.data.photos import encode, photo, png_that_claims, with_tag
from support.paths import ROOT


def by_pillow(encoded):
    return to_tensor(Image.open(io.BytesIO(encoded)).convert("RGB"))


def reason(call, *arguments, **options):
    with pytest.raises(BrokenSample) as caught:
        call(*arguments, **options)
    return caught.value.reason


RGB = photo()
CLEAR = Image.fromarray(np.dstack([np.array(RGB), np.array(photo(2))[..., 0]]))  # RGBA
TURNED = Image.Exif()
TURNED[0x0112] = 6  # by 90 degrees
PLAIN = {
    "jpg": encode(RGB),
    "jpg of 4:4:4": encode(RGB, quality=95, subsampling=0),
    "progressive jpg": encode(RGB, progressive=True),
    "jpg of RGB": encode(RGB, keep_rgb=True),
    "grey jpg": encode(RGB.convert("L")),
    "CMYK jpg": encode(RGB.convert("CMYK")),
    "jpg with bytes behind it": encode(RGB) + b"something else",
    "png": encode(RGB, "PNG"),
    "grey png": encode(RGB.convert("L"), "PNG"),
    "png with a palette": encode(RGB.quantize(16), "PNG"),
    "png of two colours": encode(RGB.convert("1"), "PNG"),
    "webp": encode(RGB, "WEBP"),
    "lossless webp": encode(RGB, "WEBP", lossless=True),
    # As open_clip reads them: the first frame, not turned. A mode other than RGB and grey is kept
    # until the image is resized.
    "png with alpha": encode(CLEAR, "PNG"),
    "grey png with alpha": encode(CLEAR.convert("LA"), "PNG"),
    "webp with alpha": encode(CLEAR, "WEBP", lossless=True, exact=True),
    "png with a transparent colour": encode(RGB.quantize(16), "PNG", transparency=1),
    "animated png": encode(RGB, "PNG", save_all=True, append_images=[photo(1)]),
    "animated webp": encode(RGB, "WEBP", save_all=True, append_images=[photo(1)], lossless=True),
    "jpg that viewers turn": encode(RGB, exif=TURNED),
    "gif": encode(RGB, "GIF"),
    "animated gif": encode(RGB, "GIF", save_all=True, append_images=[photo(1)]),
    "gif with a transparent colour": encode(RGB.quantize(16), "GIF", transparency=1),
    "bmp": encode(RGB, "BMP"),
    "bmp with a palette": encode(RGB.quantize(16), "BMP"),
    "tif": encode(RGB, "TIFF"),
    "compressed tif": encode(RGB, "TIFF", compression="tiff_lzw"),
    "tif of a jpg": encode(RGB, "TIFF", compression="jpeg"),
    "tif with pages": encode(RGB, "TIFF", save_all=True, append_images=[photo(1)]),
    "tif with alpha": encode(CLEAR, "TIFF"),
    "CMYK tif": encode(RGB.convert("CMYK"), "TIFF"),
    "deep grey tif": encode(RGB.convert("L").convert("I;16"), "TIFF"),
    "tif of floats": encode(RGB.convert("F"), "TIFF"),
}
if "avif" in features.modules and features.check("avif"):  # since Pillow 11.2
    PLAIN |= {"avif": encode(RGB, "AVIF"), "avif with alpha": encode(CLEAR, "AVIF")}


@pytest.mark.parametrize("kind", PLAIN)
def test_pixels_are_those_of_pillow(kind):
    found, file = decode_image(PLAIN[kind]), Image.open(io.BytesIO(PLAIN[kind]))
    kept = isinstance(found, Image.Image)
    assert kept == (file.mode not in ("RGB", "L"))
    assert not kept or found.mode == file.mode
    assert decode_pil(PLAIN[kind]).mode == (file.mode if kept else "RGB")
    found = to_tensor(found)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 240, 320)
    assert open_image(PLAIN[kind]).size == (320, 240)
    assert torch.equal(found, by_pillow(PLAIN[kind]))
    assert torch.equal(found, to_tensor(decode_pil(PLAIN[kind])))


def outcome(call, file):
    """Returns the pixels of a file, or the reason that it has none."""
    try:
        return to_tensor(call(file)).tolist()
    except BrokenSample as broken:
        return broken.reason


def test_jpegs_of_every_kind_and_damage_are_what_pillow_makes_of_them():
    """Bytes are changed, left out and cut off; another library decodes JPEGs."""
    draw = random.Random(20)
    for number in range(60):
        image = photo(number % 3, (draw.randrange(1, 70), draw.randrange(1, 70)))
        kind = {"progressive": number % 2 == 0, "restart_marker_blocks": number % 5}
        whole = encode(image, quality=(20, 90)[number // 2 % 2], subsampling=number % 3, **kind)
        damaged = [bytearray(whole) for _ in range(8)]
        for file in damaged[1:]:
            for _ in range(draw.randrange(1, 5)):
                place = draw.randrange(2, len(file))
                new = draw.randbytes(draw.choice((1, 1, 0)))
                file[place : place + draw.choice((1, 1, 9))] = new
            del file[len(file) - draw.choice((0, 0, 0, len(file) // 3)) :]
        outcomes = [
            [outcome(call, bytes(file)) for file in damaged] for call in (decode_image, decode_pil)
        ]
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] == by_pillow(whole).tolist()


@pytest.mark.slow
def test_reasons():
    jpg, png, webp = (PLAIN[kind] for kind in ("jpg", "png", "webp"))
    for call in (decode_image, decode_pil):
        for whole in (jpg, png, webp):
            assert reason(call, whole[: len(whole) // 2]) in ("truncated image", "not an image")
        assert reason(call, jpg[: len(jpg) // 2]) == "truncated image"
        assert reason(call, jpg[:-2]) == "truncated image"
        assert reason(call, png[: len(png) // 2]) == "truncated image"
    for call in (decode_image, decode_pil, open_image):
        for file in (b"", b"hello", jpg[:40], png[:20], webp[:16], encode(RGB, "PPM"), HEIC):
            assert reason(call, file) == "not an image"


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_a_tif_is_turned_by_pillow():
    file = encode(RGB, "TIFF", exif=TURNED)
    assert decode_pil(file).size == (240, 320)
    assert torch.equal(to_tensor(decode_image(file)), by_pillow(file))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_premultiplied_alpha_is_divided_out(mode):
    """open_clip raises for La, which has no way to RGB."""
    file = encode(CLEAR.convert(mode), "TIFF")
    premultiplied = with_tag(file, ExifTags.Base.ExtraSamples, ExifTags.Base.ExtraSamples, 1)
    assert decode_pil(premultiplied).mode == mode
    assert to_tensor(decode_image(premultiplied)).shape == (3, 240, 320)


@pytest.mark.parametrize("kind", ["jpg", "CMYK jpg", "png", "webp"])
def test_an_image_of_too_many_pixels_is_not_decoded(kind, monkeypatch):
    file = PLAIN[kind]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 240 * 320)
    assert to_tensor(decode_image(file)).shape == (3, 240, 320)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 240 * 320 - 1)
    for call in (decode_image, decode_pil, open_image):
        assert reason(call, file) == "image too large"


def test_the_limit_is_pillows_and_may_be_raised(monkeypatch):
    assert reason(open_image, png_that_claims(10_000)) == "image too large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(png_that_claims(60_000)).size == (60_000, 60_000)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(scale):
    image = photo(1, (250, 331))
    small = decode_image(encode(image, quality=95), least=(250 // scale, 331 // scale))
    assert small.shape == (3, -(-250 // scale), -(-331 // scale))
    means = torch.nn.functional.avg_pool2d(to_tensor(image).float(), scale, ceil_mode=True)
    assert (small.float() - means).abs().mean() < 3
    assert decode_image(PLAIN["png"], least=(240 // scale, 320 // scale)).shape == (3, 240, 320)


def test_the_page_on_security_names_every_format():
    page = (ROOT / "SECURITY.md").read_text().lower()
    suffixes = {"jpeg", "tiff"} | ({*IMAGE_SUFFIXES} - {"jpg", "tif"})
    assert [suffix for suffix in suffixes if not re.search(rf"\b{suffix}\b", page)] == []
