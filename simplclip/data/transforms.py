"""open_clip's image transforms on uint8 tensors.

A view is what was drawn for one image: a crop, changes of colour. It can be stored and replayed. A
stored view may also have RandAugment's operations, which are not drawn here.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as F

from simplclip.common.errors import InputError
from simplclip.data.errors import BrokenSample, ShardError
from simplclip.data.images import JPEGS, check_pixels, decode_pil, open_image, to_rgb
from simplclip.data.samples import Pair, stable_hash

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
RATIO = (3 / 4, 4 / 3)  # RandomResizedCrop's default aspect ratios
CHANGES = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
UNCHANGED = (1.0, 1.0, 1.0, 0.0)  # with these parameters CHANGES change nothing
# of torchvision's RandAugment, in its order
OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)

View = dict[str, Any]  # JSON values: what was drawn for an image


class ImageTransform:
    """A transform of image files into the pixels that a model takes.

    It has three steps: `draw` draws a view, `apply` returns its pixels, uint8 [3, S, S], and
    `finish` normalises a batch of them on the device, float32 [N, 3, S, S]. Called with a file's
    bytes, it does the first two. Called with a PIL image, it does all three and returns what
    open_clip's preprocess returns, float32 [3, S, S]: as there, Pillow resizes the image in its own
    mode, and then it is converted to RGB. Files in RGB and grey are resized as tensors, which is
    faster; their pixels differ by at most two levels of 255.

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
        """Takes the settings, see the class; draws nothing.

        Raises InputError for an augmentation with parts of timm or values out of range.
        """
        self.size: tuple[int, int] = tuple(cfg.input_size[1:])
        self.mean, self.std = tuple(cfg.mean), tuple(cfg.std)
        self.resize_mode, self.fill = cfg.resize_mode, cfg.fill_color
        self.interpolation = BILINEAR if cfg.interpolation == "bilinear" else BICUBIC
        self.augment: Any = _parsed_augment(augment)  # None, "affine" or an AugmentationCfg
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
        """Draws a view of an image of this size in pixels, which JSON can store; {} for evaluation.

        Draws from torch's global generator on the CPU.
        """
        view: View = {}
        if self.augment == "affine":
            affine = self._affine
            angle, shift, zoom, shear = affine.get_params(
                affine.degrees, affine.translate, affine.scale, affine.shear, list(self.size[::-1])
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
        """Returns a view, uint8 [3, S, S], of a file's bytes or of what `open_image` returned.

        A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the crop is that many times as large as
        S. Raises BrokenSample.
        """
        least = self._size_for_crop(view) if "crop" in view else None
        return self.apply_decoded(decode_image(encoded, least=least), view)

    def apply_views(self, encoded: bytes | Image.Image, views: Sequence[View]) -> list[Tensor]:
        """Returns the pixels of an image in several views, as `apply` does; it is decoded once."""
        sizes = [self._size_for_crop(view) for view in views if "crop" in view]
        least = None
        if sizes:
            heights, widths = zip(*sizes)
            least = max(heights), max(widths)
        image = decode_image(encoded, least=least)
        return [self.apply_decoded(image, view) for view in views]

    def apply_decoded(self, image: Tensor | Image.Image, view: View) -> Tensor:
        """Returns the pixels of a decoded image in a view, uint8 [3, S, S].

        image: uint8 [3, H, W] on any device, or a PIL image, as `decode_image` returns them. It may
        be smaller than the one that the view was drawn for; the crop is then scaled down too.
        """
        if "crop" in view:
            pixels = self._crop_and_resize(image, view)
        elif "affine" in view:
            pixels = self._warp(image, view)
        else:
            size, interpolation = self._evaluation_size(*F.get_size(image))
            resized = F.resize(image, size, interpolation)
            pixels = to_tensor(center_crop_or_pad(resized, list(self.size), self.fill))
        if "colour" in view:
            pixels = _change_colour(pixels, view["colour"])
        if "operations" in view:
            pixels = _operate(pixels, view)
        return pixels

    def finish(self, images: Tensor, *, channels_last: bool = False) -> Tensor:
        """Normalises images, uint8 [N, 3, S, S]: returns the model's input, float32 [N, 3, S, S].

        That is a new tensor on their device. channels_last: its memory format, else contiguous.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        floats = images.to(torch.float32, memory_format=layout)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std)):
            # by numbers: copying tensors to a GPU would wait for it
            floats[:, channel].sub_(255 * mean).div_(255 * std)
        return floats

    def __call__(self, image: bytes | Image.Image) -> Tensor:
        """Draws a view of an image and returns its pixels in it.

        image: a file's bytes -> uint8 [3, S, S]; a PIL image -> float32 [3, S, S], normalised.
        Draws from torch's global generator on the CPU if it augments. Raises BrokenSample.
        """
        if not isinstance(image, Image.Image):
            file = open_image(image)
            return self.apply(file, self.draw(file.height, file.width))
        view = self.draw(image.height, image.width)
        pixels = self.apply_decoded(image, view)
        return self.finish(pixels[None])[0]

    def _size_for_crop(self, view: View) -> tuple[int, int]:
        """Returns the least (height, width) of an image whose crop has the model's size."""
        height, width = view["image"]
        _, _, crop_height, crop_width = view["crop"]
        return (
            math.ceil(height * self.size[0] / max(1, crop_height)),
            math.ceil(width * self.size[1] / max(1, crop_width)),
        )

    def _crop_and_resize(self, image: Tensor | Image.Image, view: View) -> Tensor:
        """Returns a view's crop at the model's input size, uint8 [3, S, S]."""
        top, left, bottom, right = _crop_of(view, F.get_size(image))
        crop = F.crop(image, top, left, bottom - top, right - left)
        # copied, since resizing contiguous rows saves more time than the copy takes
        if isinstance(crop, Tensor):
            crop = crop[None].contiguous(memory_format=torch.channels_last)[0]
        return to_tensor(F.resize(crop, list(self.size), BICUBIC))

    def _warp(self, image: Tensor | Image.Image, view: View) -> Tensor:
        """Returns an image warped by a view's "affine", uint8 [3, S, S]; what comes in is white."""
        angle, x, y, zoom, *shear = view["affine"]
        height, width = view["size"]
        shift = [x * (self.size[1] / width), y * (self.size[0] / height)]
        # torchvision draws a grey line around the image unless the fill is black. The negative
        # turns white into black.
        negative = ~to_tensor(F.resize(image, list(self.size), BICUBIC))
        return ~F.affine(negative, angle, shift, zoom, shear, interpolation=BILINEAR)

    def _evaluation_size(self, height: int, width: int) -> tuple[list[int], InterpolationMode]:
        """Returns ([height, width], interpolation) of evaluation's resizing before it crops."""
        if self.resize_mode == "squash":
            return list(self.size), self.interpolation
        longest = self.resize_mode == "longest"
        ratios = height / self.size[0], width / self.size[1]
        ratio = max(ratios) if longest else min(ratios)
        size = [max(1, round(height / ratio)), max(1, round(width / ratio))]
        check_pixels(*size)  # an image one pixel wide would become gigabytes
        if longest:
            return size, self.interpolation
        if self.size[0] == self.size[1]:  # as open_clip calls torchvision, which rounds otherwise
            return [self.size[0]], self.interpolation
        return size, BICUBIC  # to which open_clip passes no interpolation on


def finish_on_device(
    transform: Any, images: Tensor, device: torch.device, *, channels_last: bool = False
) -> Tensor:
    """Returns a loader's images on `device` as the model's input, float32 [N, 3, S, S].

    images: uint8 ones are normalised there by `transform.finish`; others are complete and only
    moved. The move does not block. channels_last: memory format of normalised ones, else
    contiguous.
    """
    images = images.to(device, non_blocking=True)
    if images.dtype != torch.uint8:
        return images
    return transform.finish(images, channels_last=channels_last)


def augmentation(transform: object) -> Any:
    """Returns what a transform draws as a JSON value, to compare: "none", "affine" or a dict.

    The dict has open_clip's fields. Of a transform other than ImageTransform it is the repr.
    """
    augment = getattr(transform, "augment", repr(transform))
    if isinstance(augment, AugmentationCfg):
        return json.loads(json.dumps(asdict(augment)))
    return augment or "none"


def decode_image(
    encoded: bytes | Image.Image, *, least: tuple[int, int] | None = None
) -> Tensor | Image.Image:
    """Decodes RGB and grey to uint8 [3, H, W]; other modes to a PIL image, as `decode_pil`.

    encoded: a file's bytes, or what `open_image` returned of them, which is changed. A JPEG that is
    2, 4 or 8 times as large as `least`, height and width, is decoded at that fraction of its sides
    (rounded up), which is faster. Raises BrokenSample.
    """
    image: Any = open_image(encoded) if isinstance(encoded, bytes) else encoded
    size = image.size
    if least:
        image.draft(None, least[::-1])
    if image.format in JPEGS and image.mode == "RGB" and image.size == size:
        # damage: Pillow reads what it can, or says what is wrong
        with contextlib.suppress(ValueError):
            # in half of Pillow's time
            return torch.from_numpy(simplejpeg.decode_jpeg(image.fp.getvalue())).permute(2, 0, 1)
    image = decode_pil(image)
    return to_tensor(image) if image.mode in ("RGB", "L") else image


def to_tensor(image: Image.Image | Tensor) -> Tensor:
    """Returns an image as RGB, uint8 [3, H, W]; a tensor as it is."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Returns N images [3, S, S] as a batch [N, 3, S, S], channels last in memory."""
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _crop_of(view: View, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Returns (top, left, bottom, right) of a view's crop in an image that now has `size`."""
    top, left, height, width = view["crop"]
    whole_height, whole_width = view["image"]
    if min(top, left) < 0 or top + height > whole_height or left + width > whole_width:
        raise InputError(f"view: expected a crop inside the image, got {view}")
    y, x = size[0] / whole_height, size[1] / whole_width
    first_row, first_column = int(top * y + 0.5), int(left * x + 0.5)
    end_row, end_column = int((top + height) * y + 0.5), int((left + width) * x + 0.5)
    return first_row, first_column, max(end_row, first_row + 1), max(end_column, first_column + 1)


def _parsed_augment(augment: Any) -> Any:
    """Returns the argument `augment` of ImageTransform as None, "affine" or an AugmentationCfg."""
    if augment is None or augment == "affine":
        return augment
    fields = ", ".join(AugmentationCfg.__dataclass_fields__)
    expected = f"augment: expected 'affine', 'none' or fields of AugmentationCfg ({fields})"
    try:
        if not isinstance(augment, AugmentationCfg):
            augment = AugmentationCfg(**augment)
        (least, most), (narrow, wide) = augment.scale, augment.ratio or RATIO
        if not (0 < least <= most and 0 < narrow <= wide):
            raise ValueError("scale and ratio are two numbers above 0 in order")
        if augment.color_jitter_prob:
            ColorJitter(*augment.color_jitter)
    except (TypeError, ValueError) as error:
        raise InputError(f"{expected}, got {augment!r}: {error}") from None
    if augment.use_timm or augment.re_prob or augment.re_count:
        raise InputError(f"{expected} without timm's transforms, got {augment!r}")
    if augment.color_jitter and not augment.color_jitter_prob:
        raise InputError(f"{expected}, color_jitter with color_jitter_prob, got {augment!r}")
    return augment


def _operate(image: Tensor, view: View) -> Tensor:
    """Returns an image after RandAugment's operations of a view, [name, magnitude] each.

    Shifts are in pixels of the view's "size", height and width, and scaled to the image's.
    """
    sides = dict(zip(("TranslateY", "TranslateX"), zip(F.get_size(image), view["size"])))
    for name, magnitude in view["operations"]:
        side, view_side = sides.get(name, (1, 1))
        scaled = magnitude * side / view_side
        image = _apply_op(image, name, scaled, InterpolationMode.NEAREST, fill=None)
    return image


def _draw_colour(jitter: ColorJitter | None, jitter_prob: float, grey_prob: float) -> list[float]:
    """Draws a parameter of each of CHANGES, their order (indices), and 1 to become grey."""
    change, grey = torch.rand(2).tolist()
    factors = list(UNCHANGED)
    order = [0, 1, 2, 3]
    if jitter is not None and change < jitter_prob:
        drawn_order, *drawn_factors = jitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        order = drawn_order.tolist()
        for index, factor in enumerate(drawn_factors):
            if factor is not None:
                factors[index] = factor
    return [*factors, *map(float, order), float(grey < grey_prob)]


def _change_colour(image: Tensor, colour: Sequence[float]) -> Tensor:
    """Returns an image, uint8 [3, H, W], with its colours changed."""
    factors, order, grey = colour[:4], colour[4:8], colour[8]
    for index in map(int, order):
        if factors[index] != UNCHANGED[index]:
            image = CHANGES[index](image, factors[index])
    return F.rgb_to_grayscale(image, 3) if grey else image


# an ImageTransform, or a function of an RGB image -> float32 [3, S, S]
Transform = ImageTransform | Callable[[Image.Image], torch.Tensor]

_NUMPY: Any = np.random  # Any, since numpy's types leave out the global bit generator
_NUMPY_GENERATOR = np.random.MT19937(0)


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Context in which torch's, random's and numpy's global generators are seeded by `parts`."""
    seed = stable_hash("/".join(map(str, parts)))
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    numpy_generator = _NUMPY.get_bit_generator()
    # torch.manual_seed would also seed the GPU's generators.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    # 30 times cheaper than saving and restoring the state
    _NUMPY.set_bit_generator(_NUMPY_GENERATOR)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        _NUMPY.set_bit_generator(numpy_generator)


def pixels_of(transform: Transform, pair: Pair, view: View | None = None) -> torch.Tensor:
    """Returns the transformed image of a sample, [3, S, S]: uint8 by an ImageTransform.

    The errors of a caller's function name the sample. view: the one to replay; None: the transform
    draws one, from global generators. Raises BrokenSample, and ShardError for a view that a
    function cannot replay.
    """
    if view is None:
        image: Any = pair.encoded
        if not isinstance(transform, ImageTransform):
            image = decode_pil(image)
        try:
            return transform(image)
        except BrokenSample:
            raise
        except Exception as error:
            error.add_note(f"The transform failed on sample {pair.key!r} of shard {pair.url!r}.")
            raise
    if not isinstance(transform, ImageTransform):
        raise ShardError(
            f"sample {pair.name!r} has the views that a teacher saw, which only simplclip's "
            f"ImageTransform replays, got {transform!r}"
        )
    try:
        return transform.apply(pair.encoded, view)
    except BrokenSample:
        raise
    except Exception as error:  # the type depends on what a damaged sidecar has for a view
        detail = f"view {str(view)[:100]}: {error!r}"
        raise BrokenSample("bad teacher features", detail) from None
