"""open_clip's image transforms on uint8 tensors.

A view is what was drawn for one image; it can be stored and replayed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import simplejpeg
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, center_crop_or_pad
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import ColorJitter, InterpolationMode, RandomAffine, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from simplclip.common.errors import InputError
from simplclip.data.decode_images import check_pixels, decode_pil, open_image, rgb

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
RATIO = (3 / 4, 4 / 3)  # RandomResizedCrop's default aspect ratios
CHANGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
UNCHANGED = (1.0, 1.0, 1.0, 0.0)  # with these parameters CHANGES change nothing

View = dict[str, Any]  # JSON values: what was drawn for an image


class ImageTransform:
    """A transform of image files into the pixels that a model takes.

    Called with a file's bytes, it draws a view (`draw`) and returns its pixels (`apply`), uint8 [3,
    S, S]; `finish` turns a batch of them into the model's input on the device, float32 [N, 3, S,
    S]. Called with a PIL image, it does all three steps and returns what open_clip's preprocess
    returns, float32 [3, S, S]. As there, an image of another mode than RGB and grey, such as RGBA
    or P, is resized in its own mode by Pillow and then converted to RGB.

    Args:
        cfg: open_clip's preprocessing.
        augment: None for evaluation: the image is resized, then cropped at the centre or padded, as
            open_clip does. For training open_clip's AugmentationCfg or its fields: a random resized
            crop (bicubic, whatever the model's interpolation, as in open_clip; unlike there,
            `ratio` is heeded), then a change of colour with the probability color_jitter_prob and
            to grey with gray_scale_prob. "affine": small rotations, shifts, zooms and changes of
            colour without mirroring, for drawings on white.
    """

    def __init__(
        self, cfg: PreprocessCfg, augment: AugmentationCfg | Mapping[str, Any] | str | None = None
    ) -> None:
        self.size: tuple[int, int] = tuple(cfg.input_size[1:])
        self.mean, self.std = tuple(cfg.mean), tuple(cfg.std)
        self.resize_mode, self.fill = cfg.resize_mode, cfg.fill_color
        self.interpolation = BILINEAR if cfg.interpolation == "bilinear" else BICUBIC
        self.augment: Any = _checked(augment)  # None, "affine" or an AugmentationCfg
        self._jitter = None
        self._jitter_prob = 0.0
        self._grey_prob = 0.0
        if self.augment == "affine":
            self._affine = RandomAffine(15, (0.1, 0.1), (0.8, 1.15), 5)
            self._jitter, self._jitter_prob = ColorJitter(0.3, 0.3, 0.3), 1.0
        elif self.augment is not None:
            self._jitter_prob = self.augment.color_jitter_prob or 0.0
            self._grey_prob = self.augment.gray_scale_prob or 0.0
            if self._jitter_prob:
                self._jitter = ColorJitter(*self.augment.color_jitter)

    def draw(self, height: int, width: int) -> View:
        """Draws a view of an image of this size, from torch's global generator on the CPU; {} for
        evaluation.
        """
        view: View = {}
        if self.augment == "affine":
            a = self._affine
            angle, shift, zoom, shear = a.get_params(
                a.degrees, a.translate, a.scale, a.shear, list(self.size[::-1])
            )
            view |= {"size": list(self.size), "affine": [angle, *shift, zoom, *shear]}
        elif self.augment is not None:
            scale, ratio = self.augment.scale, self.augment.ratio or RATIO
            # top, left, height, width
            crop = RandomResizedCrop.get_params(torch.empty(0, height, width), scale, ratio)
            view |= {"image": [height, width], "crop": list(crop)}
        if self._jitter is not None or self._grey_prob:
            view["colour"] = _draw_colour(self._jitter, self._jitter_prob, self._grey_prob)
        return view

    def apply(self, encoded: bytes | Image.Image, view: View) -> Tensor:
        """Returns the pixels of a file, or of what `open_image` returned of it, in a view, uint8
        [3, S, S].

        Raises BrokenSample. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop is that
        many times as large as S.
        """
        return self.apply_all(encoded, [view])[0]

    def apply_all(self, encoded: bytes | Image.Image, views: Sequence[View]) -> list[Tensor]:
        """Returns the pixels of a file in several views, as `apply` does.

        It is decoded once, as large as they need it.
        """
        # The sides of a whole image whose crop is as large as S.
        sides = [
            [
                math.ceil(whole * side / max(1, part))
                for whole, side, part in zip(view["image"], self.size, view["crop"][2:])
            ]
            for view in views
            if "crop" in view
        ]
        image = decode(
            encoded, least=(max(y for y, _ in sides), max(x for _, x in sides)) if sides else None
        )
        return [self.render(image, view) for view in views]

    def render(self, image: Tensor | Image.Image, view: View) -> Tensor:
        """Does what `apply` does, for what `decode` returned: uint8 [3, H, W] on any device, or a
        PIL image.

        The image may be smaller than the one that the view was drawn for; the crop is then scaled
        down too.
        """
        if "crop" in view:
            top, left, bottom, right = _box(F.get_size(image), view)
            crop = F.crop(image, top, left, bottom - top, right - left)
            # copied, since resizing contiguous rows saves more time than the copy takes
            if isinstance(crop, Tensor):
                crop = crop[None].contiguous(memory_format=torch.channels_last)[0]
            pixels = to_tensor(F.resize(crop, list(self.size), BICUBIC))
        elif "affine" in view:
            angle, x, y, zoom, *shear = view["affine"]
            shift = [x * (self.size[1] / view["size"][1]), y * (self.size[0] / view["size"][0])]
            # torchvision draws a grey line around the image unless the fill is black. The negative
            # turns white into black.
            negative = ~to_tensor(F.resize(image, list(self.size), BICUBIC))
            pixels = ~F.affine(negative, angle, shift, zoom, shear, interpolation=BILINEAR)
        else:
            size, interpolation = self._resized(*F.get_size(image))
            pixels = to_tensor(
                center_crop_or_pad(F.resize(image, size, interpolation), list(self.size), self.fill)
            )
        return _changed_colour(pixels, view["colour"]) if "colour" in view else pixels

    def finish(self, images: Tensor, *, channels_last: bool = False) -> Tensor:
        """Normalises images, uint8 [N, 3, S, S], on their device: the model's input, float32 [N, 3,
        S, S].
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        floats = images.to(torch.float32, memory_format=layout)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
            # by numbers: copying tensors to a GPU would wait for it
            floats[:, channel].sub_(255 * mean).div_(255 * std)
        return floats

    def __call__(self, image: bytes | Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            file = open_image(image)
            return self.apply(file, self.draw(file.height, file.width))
        return self.finish(
            self.render(_resizable(image), self.draw(image.height, image.width))[None]
        )[0]

    def _resized(self, height: int, width: int) -> tuple[list[int], InterpolationMode]:
        """Returns the size to which evaluation resizes an image before it crops or pads, and the
        interpolation.
        """
        if self.resize_mode == "squash":
            return list(self.size), self.interpolation
        fit, square = max if self.resize_mode == "longest" else min, self.size[0] == self.size[1]
        if fit is min and square:  # open_clip calls torchvision, which rounds in another way
            side, short = self.size[0], min(height, width)
            size = [
                side if length == short else int(side * length / short)
                for length in (height, width)
            ]
        else:
            ratio = fit(height / self.size[0], width / self.size[1])
            size = [max(1, round(height / ratio)), max(1, round(width / ratio))]
        check_pixels(*size)  # an image one pixel wide would become gigabytes
        # open_clip passes none on for other sizes
        return size, self.interpolation if fit is max or square else BICUBIC


def finished(
    transform: Any, images: Tensor, device: torch.device, *, channels_last: bool = False
) -> Tensor:
    """Moves a loader's images to the device, and completes uint8 ones by `transform.finish` there;
    others are complete.
    """
    images = images.to(device, non_blocking=True)
    return (
        transform.finish(images, channels_last=channels_last)
        if images.dtype == torch.uint8
        else images
    )


def augmentation(transform: Any) -> Any:
    """The augmentation that a transform draws, as a JSON value to compare: "none", "affine" or
    open_clip's fields.
    """
    augment = getattr(transform, "augment", repr(transform))
    return (
        json.loads(json.dumps(asdict(augment)))
        if isinstance(augment, AugmentationCfg)
        else augment or "none"
    )


def decode(
    encoded: bytes | Image.Image, *, least: tuple[int, int] | None = None
) -> Tensor | Image.Image:
    """Decodes and raises as `decode_pil` does.

    Returns RGB as uint8 [3, H, W], other modes as a PIL image.

    least: height and width that are enough. A JPEG that is 2, 4 or 8 times as large is decoded at
    that fraction of its sides
        (rounded up), which is faster; other formats stay as they are.
    """
    image: Any = open_image(encoded) if isinstance(encoded, bytes) else encoded
    size = image.size
    if least:
        image.draft(None, least[::-1])
    if image.format == "JPEG" and image.mode == "RGB" and image.size == size:
        # damage: Pillow reads what it can, or says what is wrong
        with contextlib.suppress(ValueError):
            # in half of Pillow's time
            return torch.from_numpy(simplejpeg.decode_jpeg(image.fp.getvalue())).permute(2, 0, 1)
    return _resizable(decode_pil(image))


def _resizable(image: Image.Image) -> Tensor | Image.Image:
    """Returns RGB and grey as uint8 [3, H, W], which is resized faster, and other modes as they
    are.
    """
    return to_tensor(image) if image.mode in ("RGB", "L") else image


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """Converts an image to RGB, uint8 [3, H, W]; returns a tensor as it is."""
    return (
        image
        if isinstance(image, Tensor)
        else torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)
    )


def stack(images: Sequence[Tensor]) -> Tensor:
    """Stacks pixels [3, S, S] to a batch [N, 3, S, S], channels last as the pixels are; torch.stack
    would transpose each.

    In a loader process the batch is written straight into shared memory.
    """
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _box(size: Sequence[int], view: View) -> tuple[int, int, int, int]:
    """Returns top, left, bottom and right of a view's crop, scaled to the view's image in another
    `size`.
    """
    (top, left, height, width), (y, x) = (
        view["crop"],
        (now / then for now, then in zip(size, view["image"])),
    )
    first = (int(top * y + 0.5), int(left * x + 0.5))
    last = (int((top + height) * y + 0.5), int((left + width) * x + 0.5))
    return *first, max(last[0], first[0] + 1), max(last[1], first[1] + 1)


def _checked(augment: Any) -> Any:
    if augment is None or augment == "affine":
        return augment
    try:
        augment = augment if isinstance(augment, AugmentationCfg) else AugmentationCfg(**augment)
    except TypeError:
        fields = f"fields of AugmentationCfg ({', '.join(asdict(AugmentationCfg()))})"
        raise InputError(
            f"augment: expected 'affine', 'none' or {fields}, got {augment!r}"
        ) from None
    jitter, timm = augment.color_jitter, ("use_timm", "re_prob", "re_count")
    four = isinstance(jitter, (list, tuple)) and len(jitter) == 4
    rules = [
        (name, not getattr(augment, name), "none, as timm's transforms take PIL images")
        for name in timm
    ]
    rules += [("scale", _is_range(augment.scale), "two numbers above 0 in order")]
    rules += [
        ("ratio", augment.ratio is None or _is_range(augment.ratio), "two numbers above 0 in order")
    ]
    expected = "brightness, contrast, saturation and hue, and their color_jitter_prob"
    rules += [("color_jitter", four if augment.color_jitter_prob else jitter is None, expected)]
    for name, valid, expected in rules:
        if not valid:
            raise InputError(f"augment.{name}: expected {expected}, got {getattr(augment, name)!r}")
    return augment


def _is_range(ends: Any) -> bool:
    numbers = (
        isinstance(ends, (list, tuple))
        and len(ends) == 2
        and all(isinstance(end, (int, float)) for end in ends)
    )
    return numbers and 0 < ends[0] <= ends[1]


def _draw_colour(jitter: ColorJitter | None, jitter_prob: float, grey_prob: float) -> list[float]:
    """Draws as open_clip's color_jitter and gray_scale do, from torch's global generator.

    Returns a parameter for each of CHANGES, their order (four indices), and whether the image
    becomes grey (1 or 0).
    """
    change, grey = torch.rand(2).tolist()
    factors, order = list(UNCHANGED), [0, 1, 2, 3]
    if jitter is not None and change < jitter_prob:
        drawn, *values = jitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        factors = [none if value is None else value for value, none in zip(values, factors)]
        order = drawn.tolist()
    return [*factors, *map(float, order), float(grey < grey_prob)]


def _changed_colour(image: Tensor, colour: Sequence[float]) -> Tensor:
    """Changes the colours of an image, uint8 [3, H, W], by what `_draw_colour` returned."""
    for which in map(int, colour[4:8]):
        if colour[which] != UNCHANGED[which]:
            image = CHANGES[which](image, colour[which])
    return F.rgb_to_grayscale(image, 3) if colour[8] else image
