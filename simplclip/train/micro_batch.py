"""data.micro_batch = auto on a GPU: two small steps say how memory grows with the micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from open_clip.utils import to_2tuple

from simplclip import gradient_cache
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.models.trained import tokenizer
from simplclip.train import step as steps
from simplclip.train.config import Config, ConfigError
from simplclip.train.setup import State, make_state, width_of

FEW, MANY = 4, 8  # pairs at a time of the two steps
# of the GPU's free memory; the rest is for fragmentation and outputs of frozen beginnings
SHARE = 0.85


def measured(config: Config, device: torch.device) -> int | None:
    """Returns the largest micro-batch whose steps fit on a GPU, None if the whole batch fits.

    Runs steps of the config's model on random images; all that they allocate is freed. Raises
    ConfigError if not even one pair at a time fits, and as `make_state`.
    """
    size = config.data.batch_size
    precision, _ = hardware.pick_precision(config.run.precision, device)
    trial = config.replaced(data={"micro_batch": None}, run={"compile": False})
    trial = trial.replaced(run={"steps": config.run.steps or 1, "epochs": None})
    state = make_state(trial, device, precision)
    micro_batches = []
    with contextlib.suppress(InputError):
        gradient_cache.check(state.model)
        micro_batches = [n for n in range(size - 1, 0, -1) if size % n == 0]
    rows = size * (1 + config.data.captions_per_image)
    features = 3 * 4 * rows * width_of(config)  # float32, gathered, and their gradients
    limit = int(SHARE * torch.cuda.mem_get_info(device)[0]) - features
    peak = partial(peak_of_step, state)
    try:
        return largest_that_fits(size, micro_batches, limit, peak)
    finally:
        del state, peak
        torch.cuda.empty_cache()


def largest_that_fits(
    size: int, micro_batches: Sequence[int], limit: int, peak: Callable[[int], int]
) -> int | None:
    """Returns the largest of the micro-batches that fits, or None if the whole batch does.

    peak(pairs): runs a step with so many pairs at a time and returns its bytes, or raises
    torch.cuda.OutOfMemoryError. The line through two small steps says where to begin; where memory
    runs out, half as many are tried. micro_batches: by falling size. Raises ConfigError if none
    fits.
    """
    most = float(size)
    try:
        few, many = peak(FEW), peak(MANY)
        if many > few:
            most = FEW + (limit - few) * (MANY - FEW) / (many - few)
    except torch.cuda.OutOfMemoryError:
        most = FEW
    for pairs in (size, *micro_batches):
        if pairs > most and pairs > 1:
            continue
        try:
            peak(pairs)
        except torch.cuda.OutOfMemoryError:
            most = pairs / 2
            torch.cuda.empty_cache()
            continue
        return None if pairs == size else pairs
    raise ConfigError(
        f"data.micro_batch: expected one that fits the GPU, got auto; a batch of {size:,} does not "
        f"fit, even with {min((size, *micro_batches)):,} pairs at a time"
    )


def peak_of_step(state: State, pairs: int) -> int:
    """Runs a step of so many pairs at a time on a GPU; returns torch's peak bytes."""
    torch.cuda.reset_peak_memory_stats(state.device)
    run_step(state, pairs)
    torch.cuda.synchronize(state.device)
    return torch.cuda.max_memory_allocated(state.device)


def run_step(state: State, pairs: int) -> dict[str, float]:
    """Runs a step over two micro-batches or, of the whole batch, in one graph; changes weights."""
    size, captions = state.config.data.batch_size, state.config.data.captions_per_image
    section = state.config.model.model_dump()
    side = to_2tuple(state.model.visual.image_size)
    text = tokenizer(section)([" ".join(["a"] * 512)])  # as many tokens as there may be
    batch = {
        "image": torch.randint(256, (pairs, 3, *side), dtype=torch.uint8),
        "text": text.expand(pairs, captions, -1).contiguous(),
        "group": torch.arange(pairs),
    }
    if state.teacher:
        width = state.teacher["width"]
        batch["teacher_image"] = torch.randn(pairs, width).half()
        batch["teacher_text"] = torch.randn(pairs, captions, width).half()
    config = state.config
    if pairs < size:
        state.config = config.replaced(data={"batch_size": 2 * pairs, "micro_batch": pairs})
    try:
        batches = [batch, {**batch, "group": batch["group"] + pairs}]
        return steps.train_step(state, batches if pairs < size else [batch])
    finally:
        state.config = config
