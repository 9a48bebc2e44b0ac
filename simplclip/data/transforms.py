"""open_clip's image transforms on uint8 tensors. What is drawn for an image is a view, which can be stored and replayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, center_crop_or_pad
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import ColorJitter, InterpolationMode, RandomAffine
from torchvision.transforms.v2 import functional as F

from simplclip.common.errors import InputError
from simplclip.data import colour as colours
from simplclip.data.decode import SCALES, check_pixels, decode, rgb, size_of, to_tensor

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop

View = dict[str, Any]  # JSON values: what was drawn for an image


class ImageTransform:
    """Makes the pixels of an image file for a model.

    A loader calls `draw` for each image, `apply` for its pixels (uint8), and `finish` once for a batch, on the device:

        view = transform.draw(*size_of(encoded))
        pixels = transform.apply(encoded, view)                  # uint8 [3, S, S]
        images = transform.finish(torch.stack([pixels, ...]))    # float32 [N, 3, S, S], changed in colour, normalised

    Called with a file's bytes it returns pixels of a new draw; called with a PIL image it does all of this and returns what
    open_clip's preprocess does, float32 [3, S, S].

    Args:
        cfg: open_clip's preprocessing.
        augment: None for evaluation: the image is resized, then cropped at the centre or padded, as open_clip does. For
            training open_clip's AugmentationCfg or its fields: a random resized crop (bicubic, whatever the model's
            interpolation, as in open_clip; unlike there, `ratio` is heeded), then a change of colour with the probability
            color_jitter_prob and to grey with gray_scale_prob. "affine": small rotations, shifts, zooms and changes of
            colour without mirroring, for drawings on white.
        max_pixels: as for `decode`.
    """

    def __init__(
        self,
        cfg: PreprocessCfg,
        augment: AugmentationCfg | Mapping[str, Any] | str | None = None,
        *,
        max_pixels: int | None = None,
    ) -> None:
        self.size: tuple[int, int] = tuple(cfg.input_size[1:])
        self.mean, self.std = tuple(cfg.mean), tuple(cfg.std)
        self.resize_mode, self.fill = cfg.resize_mode, cfg.fill_color
        self.interpolation = BILINEAR if cfg.interpolation == "bilinear" else BICUBIC
        self.max_pixels = max_pixels
        self.augment: Any = _checked(augment)  # None, "affine" or an AugmentationCfg
        self._jitter, self._jitter_prob, self._grey_prob = None, 0.0, 0.0
        if self.augment == "affine":
            self._affine = RandomAffine(15, (0.1, 0.1), (0.8, 1.15), 5)
            self._jitter, self._jitter_prob = ColorJitter(0.3, 0.3, 0.3, 0.03), 1.0
        elif self.augment is not None:
            self._jitter_prob, self._grey_prob = self.augment.color_jitter_prob or 0.0, self.augment.gray_scale_prob or 0.0
            if self._jitter_prob:
                self._jitter = ColorJitter(*self.augment.color_jitter)

    def draw(self, height: int, width: int) -> View:
        """A view of an image of this size, drawn from torch's global generator on the CPU; {} for evaluation."""
        view: View = {}
        if self.augment == "affine":
            a = self._affine
            angle, shift, zoom, shear = a.get_params(a.degrees, a.translate, a.scale, a.shear, list(self.size[::-1]))
            view |= {"size": list(self.size), "affine": [angle, *shift, zoom, *shear]}
        elif self.augment is not None:
            crop = _draw_crop(height, width, self.augment.scale, self.augment.ratio or RATIO)
            view |= {"image": [height, width], "crop": crop}
        if self._jitter is not None or self._grey_prob:
            view["colour"] = colours.draw(self._jitter, self._jitter_prob, self._grey_prob)
        return view

    def apply(self, encoded: bytes, view: View) -> Tensor:
        """The pixels of a file in a view, uint8 [3, S, S], without its colour. Raises BrokenSample as `decode`.

        A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the view's crop is at least as many times larger than S.
        """
        scale = 1
        if "crop" in view and self._room(view["image"], view) >= SCALES[-1]:
            room = self._room(size_of(encoded, self.max_pixels), view)
            scale = next((scale for scale in SCALES if scale <= room), 1)
        return self.render(decode(encoded, scale=scale, max_pixels=self.max_pixels), view)

    def drawn(self, encoded: bytes) -> tuple[Tensor, View]:
        """The pixels of a file in a view that is drawn for it, as of `draw` and `apply`, and the view."""
        if self.augment == "affine":  # of the whole image, which is decoded once for its size and its pixels
            image = decode(encoded, max_pixels=self.max_pixels)
            view = self.draw(*image.shape[1:])
            return self.render(image, view), view
        view = self.draw(*size_of(encoded, self.max_pixels))
        return self.apply(encoded, view), view

    def render(self, image: Tensor, view: View) -> Tensor:
        """As `apply`, of a decoded image, uint8 [3, H, W], on its device.

        The image may be smaller than the one that the view was drawn for: the crop is made smaller with it.
        """
        if "crop" in view:
            top, left, bottom, right = _box(image.shape[1:], view)
            # Copied, since resizing is that much faster where rows follow one another.
            crop = image[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
            return F.resize(crop, list(self.size), BICUBIC)[0]
        if "affine" in view:
            angle, x, y, zoom, *shear = view["affine"]
            shift = [x * (self.size[1] / view["size"][1]), y * (self.size[0] / view["size"][0])]
            # torchvision draws a grey line around an image unless it fills with black, which white is on the negative.
            negative = ~F.resize(image, list(self.size), BICUBIC)
            return ~F.affine(negative, angle, shift, zoom, shear, interpolation=BILINEAR)
        size, interpolation = self._resized(*image.shape[1:])
        return center_crop_or_pad(F.resize(image, size, interpolation), list(self.size), self.fill)

    def finish(
        self,
        images: Tensor,
        colour: Tensor | None = None,
        *,
        channels_last: bool = False,
    ) -> Tensor:
        """The model's input, float32 [N, 3, S, S]: images changed in colour and normalised, on their device.

        Args:
            images: uint8 [N, 3, S, S].
            colour: float32 [N, P], the "colour" of the images' views, where they have any; see `colour.change`.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        floats = images.to(torch.float32, memory_format=layout)
        unit = 255.0
        if colour is not None:
            floats, unit = colours.change(floats.div_(unit), colour), 1.0
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (self.mean, self.std))
        return floats.sub_(mean * unit).div_(std * unit)

    def __call__(self, image: bytes | Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            return self.drawn(image)[0]
        pixels = to_tensor(rgb(image))
        view = self.draw(*pixels.shape[1:])
        colour = torch.tensor([view["colour"]]) if "colour" in view else None
        return self.finish(self.render(pixels, view)[None], colour)[0]

    def _room(self, size: tuple[int, int], view: View) -> float:
        """How many times larger than S the view's crop is in an image of this size."""
        top, left, bottom, right = _box(size, view)
        return min((bottom - top) / self.size[0], (right - left) / self.size[1])

    def _resized(self, height: int, width: int) -> tuple[list[int], InterpolationMode]:
        """Evaluation: the size that an image is resized to before it is cropped or padded, and the interpolation."""
        if self.resize_mode == "squash":
            return list(self.size), self.interpolation
        fit, square = max if self.resize_mode == "longest" else min, self.size[0] == self.size[1]
        if fit is min and square:  # open_clip calls torchvision, which rounds in another way
            side, short = self.size[0], min(height, width)
            size = [side if length == short else int(side * length / short) for length in (height, width)]
        else:
            ratio = fit(height / self.size[0], width / self.size[1])
            size = [round(height / ratio), round(width / ratio)]
        check_pixels(size[0], size[1], None)  # a line of a pixel's width would become gigabytes
        return size, self.interpolation if fit is max or square else BICUBIC  # open_clip passes none on for other sizes


def augmentation(transform: Any) -> Any:
    """The augmentation that a transform draws, as a JSON value to compare: "none", "affine" or open_clip's fields."""
    augment = getattr(transform, "augment", repr(transform))
    return json.loads(json.dumps(asdict(augment))) if isinstance(augment, AugmentationCfg) else augment or "none"


def stack(images: Sequence[Tensor]) -> Tensor:
    """Pixels [3, S, S] as a batch [N, 3, S, S] that lies in memory as they do, channels last; torch.stack would turn each.

    In a loader process it is written straight into shared memory.
    """
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _draw_crop(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> list[int]:
    """Top, left, height and width, in the distribution of torchvision's RandomResizedCrop, in a quarter of its time."""
    low, high = map(math.log, ratio)
    for _ in range(10):
        size, shape, y, x = torch.rand(4, dtype=torch.float64).tolist()
        area, aspect = height * width * (scale[0] + (scale[1] - scale[0]) * size), math.exp(low + (high - low) * shape)
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return [int(y * (height - h + 1)), int(x * (width - w + 1)), h, w]
    # The largest crop at the centre whose ratio is allowed.
    h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    return [(height - h) // 2, (width - w) // 2, h, w]


def _box(size: Sequence[int], view: View) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a view's crop in its image of another size."""
    (top, left, height, width), (y, x) = view["crop"], (now / then for now, then in zip(size, view["image"]))
    first, last = (int(top * y + 0.5), int(left * x + 0.5)), (int((top + height) * y + 0.5), int((left + width) * x + 0.5))
    return *first, max(last[0], first[0] + 1), max(last[1], first[1] + 1)


def _checked(augment: Any) -> Any:
    if augment is None or augment == "affine":
        return augment
    if isinstance(augment, str):
        raise InputError(f"augment: expected 'affine', 'none' or fields of AugmentationCfg, got {augment!r}")
    if isinstance(augment, Mapping):
        try:
            augment = AugmentationCfg(**augment)
        except TypeError:
            known = ", ".join(asdict(AugmentationCfg()))
            raise InputError(f"augment: expected fields of AugmentationCfg ({known}), got {dict(augment)}") from None
    for name in ("use_timm", "re_prob", "re_count"):
        if getattr(augment, name):
            raise InputError(
                f"augment.{name}: expected none, as timm's transforms take PIL images, got {getattr(augment, name)}"
            )
    jitter = augment.color_jitter
    if bool(augment.color_jitter_prob) != (jitter is not None) or (jitter is not None and len(jitter) != 4):
        raise InputError(
            "augment.color_jitter: expected brightness, contrast, saturation and hue, and their color_jitter_prob, "
            f"got {jitter} and {augment.color_jitter_prob}"
        )
    return augment
