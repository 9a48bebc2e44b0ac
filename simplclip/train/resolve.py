"""What a config leaves open, resolved once, before the first step of its run.

data.micro_batch    auto: the largest that fits a GPU, as small steps of random pairs show
data.train          tables and folders: the shards that the run packs
run.epochs          becomes run.steps, by the number of samples
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.utils import to_2tuple
from rich.console import Console

from simplclip import data, gradient_cache
from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.common.files import remove_leftovers
from simplclip.common.progress import print_lines
from simplclip.models.trained import tokenizer
from simplclip.train import checkpoint
from simplclip.train import step as steps
from simplclip.train.config import Config, ConfigError, check_new_run
from simplclip.train.setup import State, checkpoint_blocks, make_state, width_of

# of the GPU's free memory; the rest is for fragmentation and outputs of frozen beginnings
SHARE = 0.85


class Resolved(NamedTuple):
    """A config in which nothing is open, and the number of its images."""

    config: Config
    samples: int | None  # images that train in an epoch; None if no meta.json has their number


def resolve(config: Config, former: dict[str, Any] | None, console: Console) -> Resolved:
    """Measures a micro-batch, packs tables and folders, and counts the steps.

    Leftovers of killed processes are removed. Raises ConfigError if the samples are not counted, or
    if the config cannot begin a run; `former`: the checkpoint of one that goes on.
    """
    out = Path(config.run.out)
    if not former:
        check_new_run(config)
    remove_leftovers(out, checkpoint.WRITTEN.fullmatch)
    micro_batch = config.data.micro_batch
    if micro_batch == "auto":
        micro_batch, checkpointed = measured(config)
        config = config.replaced(model={"grad_checkpointing": checkpointed})
        line = memory_line(micro_batch, checkpointed)
        print_lines(f"{line}, as measured", console)
    shards = data.pack_shards(config.data.train, out / "shards")
    samples = config.data.samples
    if samples is None:
        samples = data.dataset_size(shards)
        if samples is not None:
            samples = max(1, round(samples * (1 - config.eval.hold_out)))
    count = config.run.steps
    if config.run.epochs is not None:
        if samples is None:
            raise ConfigError(
                "data.samples: expected the number of samples N, for run.epochs, by --set "
                "data.samples=N, got null and no meta.json"
            )
        count = max(1, round(samples * config.run.epochs / config.data.batch_size))
    config = config.replaced(
        data={"train": shards, "micro_batch": micro_batch}, run={"steps": count, "epochs": None}
    )
    return Resolved(config, samples)


def memory_line(micro_batch: int | None, checkpointed: bool) -> str:
    """Returns the line that says what data.micro_batch = auto chose."""
    form = " with model.grad_checkpointing = true" if checkpointed else ""
    return f"memory     data.micro_batch = {micro_batch or 'null'}{form} fits"


def measured(config: Config) -> tuple[int | None, bool]:
    """Returns the largest micro-batch whose steps fit on a GPU, None if the whole batch fits, and
    whether blocks are checkpointed.

    Runs steps of the config's model on random images; all that they allocate is freed. Raises
    ConfigError without a GPU, with several ranks, and if not even one pair at a time fits.
    """
    device, size = hardware.pick_device(config.run.device), config.data.batch_size
    if device.type != "cuda" or ranks.count() > 1:
        raise ConfigError(
            "data.micro_batch: expected a number, got auto, which is measured on one GPU; "
            "elsewhere `simplclip train` predicts it"
        )
    precision, _ = hardware.pick_precision(config.run.precision, device)
    trial = config.replaced(
        data={"micro_batch": None}, run={"compile": False, "steps": 1, "epochs": None}
    )
    checkpointed = config.model.grad_checkpointing
    with torch.random.fork_rng():
        state = make_state(trial, device, precision)
        sizes = [size]
        with contextlib.suppress(InputError):
            gradient_cache.check(state.model)
            sizes = [pairs for pairs in range(1, size + 1) if size % pairs == 0]
        rows = size * (1 + config.data.captions_per_image)
        features = 3 * 4 * rows * width_of(config)  # float32, gathered, and their gradients
        limit = int(SHARE * torch.cuda.mem_get_info(device)[0]) - features
        peak = partial(peak_of_step, state, size)
        checkpoint = None if checkpointed else partial(checkpoint_blocks, state.model)
        try:
            pairs, chosen = what_fits(sizes, limit, peak, checkpoint)
        finally:
            del state, peak, checkpoint
            torch.cuda.empty_cache()
    return None if pairs == size else pairs, checkpointed or chosen


def what_fits(
    sizes: Sequence[int],
    limit: int,
    peak: Callable[[int], int],
    checkpoint: Callable[[], object] | None,
) -> tuple[int, bool]:
    """Returns the pairs at a time that fit in `limit`, and whether `checkpoint` was called.

    These are all, the last of the growing sizes, if they fit at once, before or after `checkpoint`
    is called; else the last size before the first that does not fit. peak(pairs): runs a step with
    so many pairs at a time and returns its bytes, or raises torch.cuda.OutOfMemoryError. Raises
    ConfigError if none fits.
    """

    def fits(pairs: int) -> bool:
        try:
            return peak(pairs) <= limit
        except torch.cuda.OutOfMemoryError:
            return False

    fitting = list(itertools.takewhile(fits, sizes))
    if len(fitting) == len(sizes):
        return sizes[-1], False
    if checkpoint is not None:
        checkpoint()
        if fits(sizes[-1]):
            return sizes[-1], True
    if fitting:
        return fitting[-1], False
    raise ConfigError(
        f"data.micro_batch: expected one that fits the GPU, got auto; a batch of {sizes[-1]:,} "
        f"does not fit, even with {sizes[0]:,} pairs at a time"
    )


def peak_of_step(state: State, size: int, pairs: int) -> int:
    """Runs a step of so many pairs at a time on a GPU; returns torch's peak bytes."""
    torch.cuda.reset_peak_memory_stats(state.device)
    run_step(state, size, pairs)
    torch.cuda.synchronize(state.device)
    return torch.cuda.max_memory_allocated(state.device)


def run_step(state: State, size: int, pairs: int) -> dict[str, float]:
    """Runs a step over two micro-batches or, of a whole batch of `size`, in one graph.

    It changes the weights, and `state.config`.
    """
    captions = state.config.data.captions_per_image
    side = to_2tuple(state.model.visual.image_size)
    words = " ".join(["a"] * 512)  # as many tokens as there may be
    text = tokenizer(state.config.model.model_dump())([words])
    batch = {
        "image": torch.randint(256, (pairs, 3, *side), dtype=torch.uint8),
        "text": text.expand(pairs, captions, -1).contiguous(),
        "group": torch.arange(pairs),
    }
    if state.teacher:
        width = state.teacher["width"]
        batch["teacher_image"] = torch.randn(pairs, width).half()
        batch["teacher_text"] = torch.randn(pairs, captions, width).half()
    batches = [batch]
    sizes: dict[str, int | None] = {"batch_size": size, "micro_batch": None}
    if pairs < size:
        batches.append({**batch, "group": batch["group"] + pairs})
        sizes = {"batch_size": 2 * pairs, "micro_batch": pairs}
    state.config = state.config.replaced(data=sizes)
    return steps.train_step(state, batches)
