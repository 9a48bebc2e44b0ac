"""Pixels and draws are open_clip's, views replay to the bit, colours change as in torchvision."""

import functools
import json
import random

import numpy as np
import pytest
import torch
from open_clip import get_model_config, get_pretrained_cfg
from open_clip.transform import (
    AugmentationCfg,
    PreprocessCfg,
    image_transform_v2,
    merge_preprocess_dict,
)
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms import functional as TF

from simplclip import models
from simplclip.common.errors import InputError
from simplclip.data import transforms
from simplclip.data.errors import BrokenSample
from simplclip.data.images import decode_pil, open_image
from simplclip.data.transforms import ImageTransform, decode_image, seeded
from support.data.photos import encode, photo
from support.programs import load_example


def size_of(file):
    width, height = open_image(file).size
    return height, width


@functools.cache
def drawings(count):
    """Returns emoji, as in the built-in data."""
    emoji = load_example("emoji/build")
    vendors = emoji.vendors()
    few = emoji.concepts(vendors)[:: 1800 // count][:count]
    return [vendor.draw(concept) for vendor in vendors.values() for concept in few]


SIZES = ((512, 512), (240, 320), (333, 500), (640, 427), (100, 91), (224, 224), (30, 700))
PHOTOS = [encode(photo(seed, size), quality=90) for seed, size in enumerate(SIZES)]


def real(name, tag):
    """Returns the preprocessing with which open_clip evaluates a pretrained model."""
    cfg = merge_preprocess_dict(PreprocessCfg(), get_pretrained_cfg(name, tag))
    return PreprocessCfg(**cfg | {"size": get_model_config(name)["vision_cfg"]["image_size"]})


EVALUATION = {
    "ViT-B-32": real("ViT-B-32", "openai"),
    "ViT-B-16-SigLIP": real("ViT-B-16-SigLIP", "webli"),
    "MobileCLIP2-S0": real("MobileCLIP2-S0", "dfndr2b"),
    "longest, not square": PreprocessCfg((96, 64), resize_mode="longest"),
    "shortest, not square": PreprocessCfg((64, 96), interpolation="bilinear"),
    "squash, not square": PreprocessCfg((64, 96), resize_mode="squash", interpolation="bilinear"),
}
ORDERS = [(name, "horizontal_first") for name in EVALUATION]


@pytest.mark.parametrize(("name", "order"), [*ORDERS, ("ViT-B-32", "of_pillow")])
def test_evaluation_equals_open_clip(name, order, request):
    drawn = [encode(image, "PNG") for image in drawings(2)]
    if order == "horizontal_first":
        request.getfixturevalue(order)
    cfg = EVALUATION[name]
    theirs, ours = image_transform_v2(cfg, is_train=False), ImageTransform(cfg)
    std = torch.tensor(cfg.std).view(3, 1, 1)
    for file in (*PHOTOS, *drawn):
        assert ours.draw(*size_of(file)) == {}
        found = ours.finish(ours.apply(file, {})[None])[0]
        expected = theirs(decode_pil(file))
        assert found.shape == expected.shape
        levels = (found - expected).abs() * std * 255
        same_order = order == "horizontal_first"
        # overshoots at edges are clipped in another order
        assert levels.max() < (2.01 if same_order else 32)
        assert levels.mean() < (0.05 if same_order else 0.25)
        # an image in memory is resized by Pillow, as open_clip does
        torch.testing.assert_close(ours(decode_pil(file)), expected, rtol=0, atol=2e-6)
        assert torch.equal(ours(file), ours.apply(file, {}))


def test_what_the_registry_gives_equals_open_clip():
    for name, cfg in (("siclip2-s0", "MobileCLIP2-S0"), ("open_clip:ViT-B-32", "ViT-B-32")):
        ours = models.transforms(name, train=False)
        assert isinstance(ours, ImageTransform)
        assert ours.size == EVALUATION[cfg].input_size[1:]
        assert ours.mean == tuple(EVALUATION[cfg].mean)
        image = decode_pil(PHOTOS[0])
        theirs = image_transform_v2(EVALUATION[cfg], False)
        assert (ours(image) - theirs(image)).abs().max() < 0.02


@pytest.mark.parametrize(
    "augment", [{}, {"scale": (0.08, 1.0)}, {"scale": (0.3, 0.5), "ratio": (0.9, 2.0)}]
)
def test_crops_are_torchvisions(augment):
    ours = ImageTransform(PreprocessCfg(), augment)
    scale, ratio = augment.get("scale", (0.9, 1.0)), augment.get("ratio", (3 / 4, 4 / 3))
    for size in ((512, 512), (90, 400), (400, 90), (1, 50)):
        torch.manual_seed(1)
        crop = ours.draw(*size)["crop"]
        torch.manual_seed(1)
        assert crop == list(RandomResizedCrop.get_params(torch.empty(0, *size), scale, ratio))


@pytest.mark.parametrize("size", [256, 128, 31])
def test_a_jpeg_is_decoded_smaller_where_the_crop_allows(size, monkeypatch):
    decoded = []

    def recorded(encoded, *, least):
        decoded.append(decode_image(encoded, least=least))
        return decoded[-1]

    monkeypatch.setattr(transforms, "decode_image", recorded)
    ours, file = ImageTransform(PreprocessCfg(size=size), {"scale": (0.5, 1.0)}), PHOTOS[0]
    crops = [0, 0, 512, 512], [9, 3, 497, 507], [100, 50, 400, 300]
    for crop in (*crops, [10, 20, 257, 300], [10, 20, 255, 300]):
        view = {"image": [512, 512], "crop": crop}
        found = ours.apply(file, view).float()
        assert found.shape == (3, size, size)
        scale = max(scale for scale in (1, 2, 4, 8) if scale * size <= min(crop[2:]) or scale == 1)
        assert decoded.pop().shape == (3, 512 // scale, 512 // scale)
        whole = ours.apply_decoded(decode_image(file), view).float()
        assert (found - whole).abs().mean() < (4 if scale > 1 else 0.01)
    ImageTransform(PreprocessCfg(size=size)).apply(file, {})
    assert decoded[0].shape == (3, 512, 512)  # evaluation uses open_clip's transform


AUGMENT = {
    "scale": (0.3, 1.0),
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "color_jitter_prob": 0.8,
    "gray_scale_prob": 0.2,
}


@pytest.mark.parametrize("augment", ["affine", AUGMENT, {}, None])
def test_views_replay_bit_for_bit(augment):
    ours = ImageTransform(PreprocessCfg(size=48), augment)
    for file in (*PHOTOS[:3], encode(photo(3, (60, 70)), "PNG")):
        torch.manual_seed(5)
        view = ours.draw(*size_of(file))
        torch.manual_seed(5)
        assert torch.equal(ours(file), ours.apply(file, view))
        again = json.loads(json.dumps(view))
        assert again == view
        assert torch.equal(ours.apply(file, again), ours.apply(file, view))
    assert ("colour" in view) == (augment in ("affine", AUGMENT))


def test_draws_come_from_torchs_generator_alone():
    for augment in ("affine", AUGMENT):
        ours = ImageTransform(PreprocessCfg(), augment)
        before, numpys = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        torch.manual_seed(0)
        first = [ours.draw(300, 200) for _ in range(20)]
        assert random.getstate() == before
        assert (np.random.get_state()[1] == numpys).all()  # noqa: NPY002
        torch.manual_seed(0)
        assert [ours.draw(300, 200) for _ in range(20)] == first
        assert all(view != first[0] for view in first[1:])


def test_a_view_fits_an_image_that_was_made_smaller():
    image = photo(2, (400, 600))
    small = encode(image.resize((300, 200), Image.Resampling.BICUBIC), quality=95)
    ours = ImageTransform(PreprocessCfg(size=64), {})
    view = {"image": [400, 600], "crop": [100, 60, 240, 300]}
    found, expected = ours.apply(small, view), ours.apply(encode(image, quality=95), view)
    assert (found.float() - expected.float()).abs().mean() < 4
    assert ours.apply(encode(image.resize((2, 1))), view).shape == (3, 64, 64)


def test_affine_is_what_it_was():
    """The views equal those of PIL's RandomAffine, up to rounding to 8 bits."""
    ours = ImageTransform(PreprocessCfg(48, mean=(0.5,) * 3, std=(0.5,) * 3), "affine")
    torch.manual_seed(0)
    for image in drawings(4):
        view = ours.draw(72, 72)
        angle, x, y, zoom, *shear = view["affine"]
        assert -15 <= angle <= 15
        assert max(abs(x), abs(y)) <= 5
        assert 0.8 <= zoom <= 1.15
        assert -5 <= shear[0] <= 5
        assert shear[1] == 0
        small = image.resize((48, 48), Image.Resampling.BICUBIC)
        how = {"interpolation": TF.InterpolationMode.BILINEAR, "fill": [255] * 3}
        moved = TF.affine(small, angle, [x, y], zoom, shear, **how)
        del view["colour"]
        found = ours.apply_decoded(decode_image(encode(image, "PNG")), view).float()
        levels = (found - TF.pil_to_tensor(moved).float()).abs()
        assert levels.median() <= 1
        assert (levels > 4).float().mean() < 0.02  # edges of drawings are softer here
    white = encode(Image.new("RGB", (72, 72), "white"), "PNG")
    assert all(ours(white).unique().numel() == 1 for _ in range(20))  # no line around the image


@pytest.mark.parametrize("grey", [0.0, 1.0])
def test_colours_change_as_torchvisions(grey):
    """To the bit as they change uint8, and up to rounding as they change PIL images."""
    settings, image = (0.9, 0.9, 0.9, 0.5), photo(3, (48, 48))
    augment = {"color_jitter": settings, "color_jitter_prob": 1.0, "gray_scale_prob": grey}
    ours = ImageTransform(PreprocessCfg(size=48), augment | {"scale": (1.0, 1.0)})
    pixels = TF.pil_to_tensor(image)
    theirs = v2.Compose([v2.ColorJitter(*settings), v2.RandomGrayscale(grey)])

    def expected(image):
        torch.manual_seed(seed)
        RandomResizedCrop.get_params(pixels, (1.0, 1.0), (3 / 4, 4 / 3))
        torch.rand(2)  # whether colours change, whether to grey
        return theirs(image)

    for seed in range(30):
        torch.manual_seed(seed)
        found = ours.apply_decoded(pixels, ours.draw(48, 48))
        assert torch.equal(found, expected(pixels))
        assert (found.float() - TF.pil_to_tensor(expected(image)).float()).abs().mean() < 3


def test_draws_of_colour():
    torch.manual_seed(0)
    ours = ImageTransform(PreprocessCfg(), AUGMENT)
    rows = torch.tensor([ours.draw(9, 9)["colour"] for _ in range(6000)], dtype=torch.float64)
    kept = (rows[:, :4] == torch.tensor([1.0, 1, 1, 0])).all(1)
    assert abs(kept.double().mean() - 0.2) < 0.03
    assert abs(rows[:, 8].mean() - 0.2) < 0.03
    assert abs(torch.corrcoef(torch.stack([kept.double(), rows[:, 8]]))[0, 1]) < 0.06
    for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        values = rows[~kept, column]
        assert low <= values.min() < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
        assert abs(values.std() - (high - low) / 12**0.5) < 0.02 * (high - low)
    orders, counts = rows[~kept, 4:8].unique(dim=0, return_counts=True)
    assert len(orders) == 24
    assert counts.max() < 1.5 * counts.min()
    greys = ImageTransform(PreprocessCfg(), {"gray_scale_prob": 0.5})
    only = [greys.draw(9, 9)["colour"] for _ in range(200)]
    assert {tuple(row[:8]) for row in only} == {(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0)}
    assert 60 < sum(row[8] for row in only) < 140


@pytest.mark.parametrize("channels_last", [False, True])
def test_finish(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    cfg = PreprocessCfg(size=32)
    ours = ImageTransform(cfg)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    before = images.clone()
    for batch in (images, images.contiguous(memory_format=torch.channels_last)):
        found = ours.finish(batch, channels_last=channels_last)
        expected = TF.normalize(batch / 255, cfg.mean, cfg.std)
        assert found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        assert torch.equal(batch, before)


def test_a_pil_image_is_preprocessed_whole_and_batches_are_channels_last():
    images = [ImageTransform(PreprocessCfg(size=32), {})(file) for file in PHOTOS[:4]]
    batch = transforms.stack_pixels(images)
    assert torch.equal(batch, torch.stack(images))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    ours = ImageTransform(PreprocessCfg(size=48), AUGMENT)
    torch.manual_seed(3)
    found = ours(decode_pil(PHOTOS[2]))
    torch.manual_seed(3)
    view = ours.draw(*size_of(PHOTOS[2]))
    pixels = ours.apply_decoded(decode_pil(PHOTOS[2]), view)
    assert torch.equal(found, ours.finish(pixels[None])[0])


def test_what_is_seen_of_a_panorama_is_as_your_photos_says():
    """Of three thirds in red, green and blue: all when siclip-lite0 trains, else the middle."""
    file = np.zeros((60, 180, 3), np.uint8)
    for third in range(3):
        file[:, 60 * third : 60 * (third + 1), third] = 255
    panorama = Image.fromarray(file)
    seen = {}
    for augment in (None, "none", {"scale": [0.6, 1.0]}):
        transform = models.transforms("siclip-lite0", train=True, augment=augment)
        with seeded(0):
            pixels = torch.stack([transform(panorama) for _ in range(20)])
        seen[str(augment)] = (pixels > 0.5).float().mean((0, 2, 3))
    assert (seen["None"] > 0.15).all()
    assert seen["none"].tolist() == [0, 1, 0]
    assert seen["{'scale': [0.6, 1.0]}"][1] > 0.7
    evaluated = models.transforms("siclip-lite0", train=False)(panorama)
    assert (evaluated > 0.5).float().mean((1, 2)).tolist() == [0, 1, 0]
    assert evaluated.shape == (3, 48, 48)


def test_an_image_one_pixel_wide_does_not_become_gigabytes():
    file = encode(Image.new("L", (60_000, 1)), "PNG")
    with pytest.raises(BrokenSample, match="image too large"):
        ImageTransform(PreprocessCfg(size=224))(file)
    assert ImageTransform(PreprocessCfg(size=224), {})(file).shape == (3, 224, 224)
    for mode in ("L", "LA"):  # open_clip raises, as its height becomes 0
        file = encode(Image.new(mode, (600, 1)), "PNG")
        longest = ImageTransform(PreprocessCfg(size=32, resize_mode="longest"))
        assert longest(file).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("flip", ", got 'flip': "),
        ({"scal": (0.1, 1)}, r", got \{'scal'.*unexpected keyword argument 'scal'"),
        (AugmentationCfg(re_count=2), " without timm's transforms, got .*re_count=2"),
        ({"color_jitter": 0.4}, ", color_jitter with color_jitter_prob, got "),
        ({"color_jitter_prob": 0.4}, ", got "),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.9), "color_jitter_prob": 0.4}, ", got .*: hue values"),
        *(({"scale": value}, ", got ") for value in ("x", (0.9, 0.1), (-3, -1), (1, 2, 3))),
        ({"ratio": 5}, ", got .*ratio=5"),
    ],
)
def test_augmentations_that_are_refused(augment, message):
    expected = r"augment: expected 'affine', 'none' or fields of AugmentationCfg \(scale, .*\)"
    with pytest.raises(InputError, match=expected + message):
        ImageTransform(PreprocessCfg(), augment)
