"""The pixels of a parsed sample: its image under a transform, in a view that is drawn from a seed
or was stored.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from simplclip.data.decode_images import decode_pil
from simplclip.data.errors import BrokenSample, ShardError
from simplclip.data.samples import Pair, stable_hash
from simplclip.data.transforms import ImageTransform, View

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
    if not isinstance(transform, ImageTransform):
        return _pixels_of_other(transform, pair, view)
    if view is None:
        return transform(pair.encoded)
    try:
        return transform.apply(pair.encoded, view)
    except BrokenSample:
        raise
    except Exception as error:  # the type depends on what a damaged sidecar has for a view
        detail = f"view {str(view)[:100]}: {error!r}"
        raise BrokenSample("bad teacher features", detail) from None


def _pixels_of_other(transform: Callable, pair: Pair, view: View | None) -> torch.Tensor:
    """Returns what a caller's own transform makes of a sample's decoded image."""
    if view is not None:
        raise ShardError(
            f"sample {pair.name!r} has the views that a teacher saw, which only simplclip's "
            f"ImageTransform replays, got {transform!r}"
        )
    image = decode_pil(pair.encoded)
    try:
        return transform(image)
    except Exception as error:
        error.add_note(f"The transform failed on sample {pair.key!r} of shard {pair.url!r}.")
        raise
