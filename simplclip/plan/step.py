"""The step that a plan runs, on fake or real tensors: a step of our trainer, by the functions of
simplclip.train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from simplclip import data, models
from simplclip.common.errors import UserError
from simplclip.models.crop import TextCrop
from simplclip.models.inherit import inherit
from simplclip.models.lora import add_lora
from simplclip.models.packaged import STATES
from simplclip.models.trained import model_options
from simplclip.train import setup
from simplclip.train import step as steps
from simplclip.train.beginning import Beginning
from simplclip.train.config import Config, corners_of
from simplclip.train.objective import Objective
from simplclip.train.rates import freeze_zeros

Batch = dict[Any, Any]
Encode = Callable[[Batch], Tensor]
CPU = torch.device("cpu")


class Observer(Protocol):
    """What counts the memory of a step, see count.Counter."""

    def during(self, kind: str) -> AbstractContextManager:
        """Returns a context in which allocations are of a kind."""

    def hold(self, tensors: object, kind: str, instead_of: tuple[str, ...]) -> None:
        """Makes tensors that are of one of the kinds `instead_of` of another kind."""

    def set_repeats(self, times: int) -> None:
        """Makes each kernel that starts from now on stand for `times` runs."""


class Step(Protocol):
    """What `predict` runs.

    The modules get tensors on a device, then `place` makes all else there, then `run` runs.
    """

    modules: list[nn.Module]  # all that have weights; `place` may add some
    averages: list[Tensor]  # copies of weights, made by `place`
    optimizer: torch.optim.Optimizer  # made by `place`

    def place(self, device: torch.device, observer: Observer | None) -> None:
        """Makes optimizer, averages and all else that `run` needs on `device`, as attributes.

        The tensors of `modules` are there already. observer: is told of "activations" and "loss",
        and of micro-batches that stand for several; None: every micro-batch runs.
        """

    def batches(self, real: bool) -> list[Batch]:
        """Returns the micro-batches of one step, in the host's memory.

        real: whether they have values, to run on a device; otherwise only shapes matter, and one
        may stand for several.
        """

    def run(self, batches: list[Batch]) -> object:
        """Runs one training step, with an update of the weights."""


class TrainerStep:
    """A step of `simplclip train`: config.data.batch_size images, by gradient caching if
    config.data has a micro_batch.

    teacher_width: D̂; None: as the shards say. Only the shapes of weights and features matter:
    where the shards are not on this machine, the student's width is assumed. `assumed` says so.
    memory: bytes of the device; None: as of this machine's. device: on which the step is placed,
    for the layout.
    """

    def __init__(
        self,
        config: Config,
        precision: str,
        teacher_width: int | None = None,
        memory: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        """Makes the model of the config on the meta device, prepared for training.

        precision: "fp32", "bf16" or "fp16". The other arguments are in the docstring of the class.
        """
        self.memory = memory
        self.assumed = list[str]()
        if config.run.compile is True:
            self.assumed.append("the memory of towers that are not compiled")
        config = config.replaced(run={"compile": False})
        self.config, self.precision = config, precision
        self.number = busiest_step(config)  # which step of the run
        with torch.device("meta"):  # folding frozen parts makes new modules
            self.prepared = setup.prepare_model(*shapes_of(config), [], config, device)
        self.modules: list[nn.Module] = [self.prepared.model, *self.prepared.folded.values()]
        self.teacher = self._teacher(teacher_width) if config.loss.needs_teacher else None
        mean = config.data.mean_tokens
        if mean is not None and self.prepared.crop:
            self.assumed.append(
                f"in one graph, texts of {mean:g} tokens, and an eighth and 8 more, which groups "
                "of lengths add"
            )
        elif mean is not None:
            self.assumed.append(
                "texts of full length, whatever data.mean_tokens, since this model's texts cannot "
                "be cropped"
            )

    def _teacher(self, width: int | None) -> dict[str, Any]:
        """Returns what the loss needs to know of a teacher; `width` comes before the stamp's."""
        if width is None:
            try:
                return data.teacher_stamp(self.config.data.sidecars)
            except (UserError, OSError) as error:
                width = setup.width_of(self.config)
                self.assumed.append(
                    f"a teacher of the student's width, {width} (--teacher-width): {error}"
                )
        return {"name": "a teacher", "width": width, "logit_scale": 100.0}

    def place(self, device: torch.device, observer: Observer | None) -> None:
        """Makes the training state on `device`; see `Step.place`."""
        self.observer = observer
        crop = self.prepared.crop
        if crop is not None:  # all texts have one length
            crop.undo()
            crop = TextCrop(self.prepared.model, 1, 1) if self.tokens else None
        prepared = replace(self.prepared, crop=crop)
        self.state = setup.make_state(
            self.config, device, self.precision, prepared=prepared, teacher=self.teacher
        )
        # an enabled one reads values of tensors
        self.state.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.state.step = self.number
        self.optimizer = self.state.optimizer
        self.modules = [prepared.model, *prepared.folded.values(), self.state.objective.loss]
        self.averages = list(self.state.ema.averages.values()) if self.state.ema else []
        steps.keep_frozen(self.state, self.memory)
        if observer:
            self.state.objective = _Objective(self.state.objective, observer)
            self.state.wrappers = {tower: _Tower(observer) for tower in ("image", "text")}

    def run(self, batches: list[Batch]) -> None:
        """Runs one step of the trainer on the state that `place` made; updates its weights."""
        if self.observer:
            self._skip_micro_batches(batches, self.observer)
        steps.train_step(self.state, batches)

    def _skip_micro_batches(self, batches: list[Batch], observer: Observer) -> None:
        """Leaves out the micro-batches between the first and the last in both towers."""
        beginnings = self.state.beginnings
        for tower in ("image", "text"):
            found = beginnings.get(tower)
            beginnings[tower] = FewMicroBatches(tower, batches, found, observer)

    @property
    def tokens(self) -> int | None:
        """The number of tokens of each text; None: the model's context length.

        One graph keeps all texts, so that their mean length counts. Rounding and groups of lengths
        add less than an eighth and 8 tokens for captions like COCO's and CC12M's. A micro-batch is
        filled up to as many tokens as padded texts have.
        """
        config = self.config.data
        if self.prepared.crop is None or config.mean_tokens is None:
            return None
        if config.micro_batch is not None:
            return None
        return math.ceil(config.mean_tokens * 9 / 8 + 8)

    def batches(self, real: bool) -> list[Batch]:
        """Returns the micro-batches of a step, on the CPU or, unless `real`, on the meta device."""
        size = self.config.data.images_at_a_time
        count = self.config.data.batch_size // size
        sizes = [size] * count
        if not real and count >= 4:  # those between the first and the last need not run
            sizes = [size, (count - 2) * size, size]
        return [self._batch(images, real) for images in sizes]

    def _batch(self, size: int, real: bool) -> Batch:
        """Returns a batch as the loader gives it; texts are [size, L], or [size, k, L]."""
        k, model = self.config.data.captions_per_image, self.prepared.model
        captions = (k,) if k > 1 else ()
        with torch.device("cpu" if real else "meta"):
            image, text = inputs(self.config.model.name, model, size, k, real, self.tokens)
            batch = {
                "image": image,
                "text": text.unflatten(0, (size, *captions)),
                "group": torch.arange(size),
            }
            if self.teacher:
                width = self.teacher["width"]
                batch["teacher_image"] = torch.ones(size, width, dtype=torch.float16)
                batch["teacher_text"] = torch.ones(size, *captions, width, dtype=torch.float16)
        return batch


def shapes_of(config: Config) -> tuple[nn.Module, list[str]]:
    """Returns a run's model on the meta device, and the names of its frozen modules and parameters.

    Nothing is downloaded: where a file of inherit.source is missing, the tensors of the original
    model stand for it.
    """
    name, source = config.model.name, config.inherit.source
    lora = config.model.model_dump()["lora"]
    model = models.create(
        name, device="meta", **model_options(config.model.model_dump(), config.loss.base)
    )
    frozen = list[str]()
    if source is not None:
        sources: list[Any] = [source] if isinstance(source, str) else list(source)
        for index, file in enumerate(sources):
            if file not in STATES and not Path(file).exists():
                sources[index] = models.create(name, device="meta", simplified=False)
        settings = config.inherit
        frozen = inherit(model, sources, train=settings.train, blocks=settings.blocks).names
    frozen, _ = add_lora(model, lora, frozen, config.inherit.train)
    return model, frozen + freeze_zeros(model, config)


def steps_of_terms(config: Config) -> dict[tuple[str, ...], int]:
    """Returns the first step of a run, from 0, with each set of active loss terms."""
    schedules, steps = config.loss.weights, config.run.steps
    assert steps is not None  # epochs are steps by now
    first: dict[tuple[str, ...], int] = {}
    for corner in corners_of(schedules.values(), steps):
        for step in (corner, corner + 1):  # a weight may begin at 0
            active = tuple(name for name, each in schedules.items() if each.at(step, steps) > 0)
            if step < steps:
                first.setdefault(active, step)
    return first


def busiest_step(config: Config) -> int:
    """Returns the first step of a run, from 0, with the largest number of active loss terms.

    On a CPU, a step of a large batch without the teacher's terms may keep rows, at most
    STORE_BYTES, that this step does not.
    """
    first = steps_of_terms(config)
    return first[max(first, key=len)]


class _Tower(nn.Module):
    """An exchange of gradients in `State.wrappers` that observes the allocations of a tower."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def forward(self, encode: Encode, batch: Batch) -> Tensor:
        """Returns encode(batch)."""
        with self.observer.during("activations"):
            return encode(batch)


class _Objective(Objective):
    """The objective of a run, observed."""

    def __init__(self, objective: Objective, observer: Observer) -> None:
        self.objective = objective
        self.observer = observer

    def __call__(self, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss; args: those of Objective, made for it after the features."""
        self.observer.hold(args[3:], "loss", ("temporaries",))
        with self.observer.during("loss"):
            return self.objective(*args)


class FewMicroBatches(Beginning):
    """A frozen beginning in `State.beginnings`, by which only the first and the last micro-batch of
    a tower are encoded.

    Those between them would take the same memory as the first one; their features are empty tensors
    of the right shape.
    """

    def __init__(
        self, tower: str, batches: list[Batch], beginning: Beginning | None, observer: Observer
    ) -> None:
        self.tower = tower
        self.first, *self.skipped = batches[:-1] or batches
        self.times = sum(len(batch[tower]) for batch in (self.first, *self.skipped))
        self.times //= len(self.first[tower])
        self.beginning = beginning
        self.observer = observer
        self.layout: tuple[int, torch.dtype, torch.device]  # of the features

    def encode(self, function: Encode, batch: Batch) -> Tensor:
        """Returns the features [m, D] of a micro-batch, empty ones if it is not encoded."""
        self.observer.set_repeats(self.times if batch is self.first else 1)
        if any(batch is other for other in self.skipped):
            if self.beginning:
                self._keep(self.beginning, batch)
            rows = batch[self.tower].shape[: 1 if self.tower == "image" else -1].numel()
            width, dtype, device = self.layout
            return torch.empty(rows, width, dtype=dtype, device=device)
        features = self.beginning.encode(function, batch) if self.beginning else function(batch)
        self.layout = features.shape[1], features.dtype, features.device
        return features

    def _keep(self, beginning: Beginning, batch: Batch) -> None:
        """Keeps as much for a pair as of the first micro-batch; with autograd, drops it again."""
        if torch.is_grad_enabled():
            del batch[beginning]
            return
        times = batch[self.tower].shape[0] // self.first[self.tower].shape[0]
        with self.observer.during("activations"):
            batch[beginning] = [torch.cat([t] * times) for t in self.first[beginning]]


def inputs(
    name: str, model: Any, size: int, captions: int, real: bool, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Returns images, uint8 [size, 3, H, W], and token ids, int64 [size * captions, L].

    real: whether the tokens are a caption, at whose end some models pool; else they are zeros, as
    images are. tokens: L, if it is less than the model's context length.
    """
    height, width = to_2tuple(model.visual.image_size)
    image = torch.zeros(size, 3, height, width, dtype=torch.uint8)
    text_model = model if hasattr(model, "context_length") else model.text
    length = text_model.context_length
    words = "a photo of a small thing"
    if tokens is not None and tokens < length:
        # the tokenizer puts the end at the last of them
        words, length = " ".join(["a"] * tokens), tokens
    if not real:
        return image, torch.zeros(size * captions, length, dtype=torch.int64)
    text = models.tokenizer(name, length)([words])
    return image, text.expand(size * captions, -1).contiguous()
