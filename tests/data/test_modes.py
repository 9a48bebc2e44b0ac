"""Images of every mode have open_clip's pixels, in evaluation and in training."""

import io
import warnings

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from simplclip.data.images import is_transparent, opaque, open_image
from simplclip.data.samples import Pair
from simplclip.data.transforms import ImageTransform, pixels_of
from support.data.photos import encode, photo

# height and width
SIZES = {"small": (7, 9), "exact": (32, 32), "odd": (53, 37), "wide": (20, 90), "tall": (110, 33)}


def with_alpha(image):
    """Returns an image whose alpha has every value, and the colours behind it."""
    alpha = np.random.default_rng(1).integers(-200, 456, (image.height, image.width))
    image = image.copy()
    image.putalpha(Image.fromarray(alpha.clip(0, 255).astype(np.uint8)))
    return image


def animated(image):
    more = [image.rotate(180)]
    return Image.open(io.BytesIO(encode(image, "GIF", save_all=True, append_images=more)))


def palette(image):
    return image.quantize(16)


def sixteen_bits(image):
    """Returns a PNG of grey, which Pillow opens as I;16, or as I before 11."""
    return encode(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG")


# The bytes of a file, or a PIL image for what a program may have in memory.
MODES = {
    "1": lambda image: encode(image.convert("1"), "PNG"),
    "L": lambda image: encode(image.convert("L"), "PNG"),
    "LA": lambda image: encode(with_alpha(image.convert("L")), "PNG"),
    "P": lambda image: encode(palette(image), "PNG"),
    "P with a transparent colour": lambda image: encode(palette(image), "PNG", transparency=1),
    "P with transparency": lambda image: encode(
        palette(image), "PNG", transparency=bytes(range(0, 256, 16))
    ),
    "RGB": lambda image: encode(image, "PNG"),
    "RGB with a transparent colour": lambda image: encode(
        image, "PNG", transparency=image.getpixel((0, 0))
    ),
    "L with a transparent colour": lambda image: encode(
        image.convert("L"), "PNG", transparency=image.convert("L").getpixel((0, 0))
    ),
    "RGBA": lambda image: encode(with_alpha(image), "PNG"),
    "CMYK": lambda image: encode(with_alpha(image).convert("RGBA").convert("CMYK")),
    "CMYK in memory": lambda image: Image.frombytes(
        "CMYK", image.size, with_alpha(image).tobytes()
    ),
    "I;16": sixteen_bits,
    "I": lambda image: image.convert("L").convert("I").point(lambda value: value * 2 - 99),
    "F": lambda image: image.convert("L").convert("F").point(lambda value: value * 1.5 - 99.3),
    "RGBa": lambda image: with_alpha(image).convert("RGBa"),
    "YCbCr": lambda image: image.convert("YCbCr"),
    "gif": animated,
}
CONFIGS = {
    "shortest": PreprocessCfg(32),
    "longest": PreprocessCfg(32, resize_mode="longest", interpolation="bilinear", fill_color=128),
    "squash": PreprocessCfg(32, resize_mode="squash", interpolation="bilinear"),
    "not square": PreprocessCfg((24, 40)),
}


def check(mode, image, cfg, train):
    """Compares every way to the pixels of an image, a file or in memory, with open_clip's."""
    theirs = image_transform_v2(cfg, is_train=train)
    ours = ImageTransform(cfg, {} if train else None)
    is_file = isinstance(image, bytes)

    def opened():
        return Image.open(io.BytesIO(image)) if is_file else image

    expected = theirs(opened())
    torch.testing.assert_close(ours(opened()), expected, rtol=0, atol=2e-6)
    ways = []
    if is_file:
        view = ours.draw(opened().height, opened().width)
        pair = Pair(image, [], {}, "key", "url", "shard")
        ways += [
            ours.finish(pixels[None])[0]
            for pixels in (ours(image), ours.apply(image, view), pixels_of(ours, pair))
        ]
        ways.append(pixels_of(theirs, pair))
    plain = opened().mode in ("RGB", "L")
    for found in ways:
        assert found.shape == expected.shape
        levels = (found - expected).abs() * torch.tensor(cfg.std).view(3, 1, 1) * 255
        assert levels.max() < (2.01 if plain else 0.01)
        assert levels.mean() < 0.05


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # by open_clip
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_open_clips(mode, size, horizontal_first, monkeypatch):
    image = MODES[mode](photo(3, SIZES[size]))
    for cfg in CONFIGS.values():
        check(mode, image, cfg, train=False)
    height, width = SIZES[size]
    crops = [0, 0, height, width], [2, 1, height - 3, width - 2], [1, 3, height // 2, width // 2]
    for crop in crops:
        drawn = staticmethod(lambda *_, crop=crop: crop)
        monkeypatch.setattr(RandomResizedCrop, "get_params", drawn)
        check(mode, image, CONFIGS["shortest"], train=True)


def test_open_clip_raises_for_premultiplied_alpha():
    premultiplied = with_alpha(photo().convert("L")).convert("La")
    theirs = image_transform_v2(CONFIGS["shortest"], is_train=False)
    ours = ImageTransform(CONFIGS["shortest"])
    for transform in (theirs, ours):
        with pytest.raises(ValueError, match="La"):
            transform(premultiplied)


def test_a_transparent_palette_gives_no_warning_and_stays_as_it_is():
    file = MODES["P with transparency"](photo(size=SIZES["exact"]))
    image = Image.open(io.BytesIO(file))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageTransform(CONFIGS["shortest"])(image)
        ImageTransform(CONFIGS["shortest"], "affine")(image)
        assert Pair(file, [], {}, "", "", "").image.mode == "RGB"
    assert "transparency" in image.info


def test_opaque_pictures_are_black_where_they_are_transparent():
    for image in (with_alpha(photo()), with_alpha(photo().convert("L"))):
        colours = np.asarray(image.convert("RGB")).astype(int)
        alpha = np.asarray(image.getchannel("A"))
        seen = np.asarray(opaque(image)).astype(int)
        assert (seen[alpha == 0] == 0).all()
        assert (seen[alpha == 255] == colours[alpha == 255]).all()
        assert abs(seen - colours)[alpha > 100].max() <= 2
        pair = Pair(encode(image, "PNG"), [], {}, "", "", "")
        assert pair.image.tobytes() == opaque(image).tobytes()
    assert opaque(photo()).tobytes() == photo().tobytes()


def test_pictures_with_transparency_are_seen():
    image = photo(1, (200, 300))

    def transparent(file):
        return is_transparent(open_image(file))

    for form in ("PNG", "WEBP"):
        assert transparent(encode(with_alpha(image), form))
    for mode in ("LA", "P with transparency", "RGB with a transparent colour"):
        assert transparent(MODES[mode](image))
    for mode in ("1", "L", "P", "RGB", "RGBA"):  # nothing of the last one is transparent
        assert not transparent(encode(image.convert(mode), "PNG"))
    whole = encode(with_alpha(image), "PNG")
    assert not transparent(whole[: len(whole) // 2])
