"""Changes the colours of a batch of images, each by its own parameters, as torchvision's ColorJitter and Grayscale do."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import ColorJitter

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
COLUMNS = 9  # factors of brightness, contrast and saturation, shift of hue, in which order (four indices), whether grey
_CACHE = 1 << 19  # elements that a CPU changes at once: several times as fast as a whole batch


def draw(jitter: ColorJitter | None, jitter_prob: float, grey_prob: float) -> list[float]:
    """Draws the parameters of one image, as open_clip's color_jitter and gray_scale do, from torch's global generator."""
    change, grey = torch.rand(2).tolist()
    factors, order = [1.0, 1.0, 1.0, 0.0], [0, 1, 2, 3]
    if jitter is not None and change < jitter_prob:
        drawn, *values = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        factors = [none if value is None else value for value, none in zip(values, factors)]
        order = drawn.tolist()
    return [*factors, *map(float, order), float(grey < grey_prob)]


def change(images: Tensor, colour: Tensor) -> Tensor:
    """Changes images [N, 3, H, W] (floats from 0 to 1) in place, by parameters float32 [N, COLUMNS]; returns them.

    The parameters are read on the CPU. If they are on a GPU, reading them costs a synchronisation.
    """
    part = max(1, _CACHE // images[0].numel()) if images.device.type == "cpu" else len(images)
    for some, rows in zip(images.split(part), colour.split(part)):
        _change(some, rows.tolist())
    return images


def _change(images: Tensor, rows: list[list[float]]) -> None:
    for step in range(4):
        for which, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            none = 0.0 if function is _hue else 1.0
            chosen = [(i, row[which]) for i, row in enumerate(rows) if row[4 + step] == which and row[which] != none]
            _apply(images, chosen, function)
    _apply(images, [(i, 0.0) for i, row in enumerate(rows) if row[8]], _saturation)


def _apply(images: Tensor, chosen: list[tuple[int, float]], function) -> None:
    if chosen:
        indices, factors = zip(*chosen)
        place = torch.tensor(indices, device=images.device)
        factor = torch.tensor(factors, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
        images[place] = function(images[place], factor)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _grey(images).mul_(1 - factor).add(images.mul_(factor)).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shifts the hue. A channel is max - range * clamp(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6; n is 5, 3, 1 for RGB."""
    red, green, blue = images.split(1, dim=1)
    low, high = torch.aminmax(images, dim=1, keepdim=True)
    spread = high - low
    safe = spread.where(spread > 0, 1)
    hue = torch.where(
        high == red,
        (green - blue) / safe,
        torch.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    k = torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype, device=images.device).view(1, 3, 1, 1) + (hue + 6 * shift)
    k.remainder_(6)
    return high - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(spread)
