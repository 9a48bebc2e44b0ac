"""The steps of a plan, on fake or real tensors: that of our trainer, and that of open_clip's models and losses."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import open_clip
import torch
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from simplclip import data, models
from simplclip.common import hardware
from simplclip.memory.count import Counter
from simplclip.models.inherit import TAG
from simplclip.train.config import Config, ConfigError
from simplclip.train.state import Training, lr_factor, make_optimizer
from simplclip.train.step import train_step

TEACHER_SCALE = 100.0


class Step(Protocol):
    """Interface of a step for `predict` and `measure`. modules: their tensors are on the device from the beginning."""

    modules: list[nn.Module]
    optimizer: torch.optim.Optimizer

    def materialize(self, device: torch.device) -> None:
        """Gives the modules real weights on `device`."""

    def place(self, device: torch.device, counter: Counter | None = None) -> None:
        """Prepares the step on `device`, where the modules already are; `counter` is notified of its phases."""

    def batches(self, whole: bool) -> list[dict[str, Tensor]]:
        """The micro-batches of a step, in the host's memory.

        If not `whole`, they have no values, and those between the second and the last are merged into one that the towers do
        not process, since only its number of rows matters.
        """

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        """One step of the optimizer."""


class TrainerStep:
    """A step of `simplclip train`: config.data.batch_size pairs, by gradient caching if it has a micro_batch.

    teacher_width: D̂; if None, it is read from the shards.
    """

    def __init__(self, config: Config, precision: str, teacher_width: int | None = None) -> None:
        self.config, self.precision = config, precision
        self.training = _Planned(config, torch.device("cpu"), precision, teacher_width)
        self.modules = [self.training.model, self.training.loss]

    def resized(self, config: Config) -> TrainerStep:
        """The same step with another section `data`. Both share the modules, so that only one may run at a time."""
        other = copy.copy(self)
        other.training = copy.copy(self.training)
        other.config = other.training.config = config
        return other

    def materialize(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)

    def place(self, device: torch.device, counter: Counter | None = None) -> None:
        this = self.training
        this.device, this.counter = device, counter
        this.optimizer = make_optimizer(this.model, this.loss, self.config)
        this.schedule = LambdaLR(this.optimizer, lambda step: lr_factor(step, self.config))
        this.scaler = torch.amp.GradScaler(device.type, enabled=False)  # it would read values of tensors
        this.step = busiest(self.config)
        this.model.train()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.training.optimizer

    def batches(self, whole: bool) -> list[dict[str, Tensor]]:
        c = self.config.data
        size = c.micro_batch or c.batch_size
        count = c.batch_size // size
        if whole or count < 4:
            return [self._batch(size, whole) for _ in range(count)]
        between = self._batch((count - 3) * size, whole)
        between["unseen"] = between.pop("image"), between.pop("text")
        return [self._batch(size, whole), self._batch(size, whole), between, self._batch(size, whole)]

    def _batch(self, size: int, whole: bool) -> dict[str, Tensor]:
        this, k = self.training, self.config.data.captions_per_image
        captions = () if k == 1 else (k,)
        with torch.device("cpu" if whole else "meta"):
            text = tokens(self.config.model.name, this.model, size * k, whole)
            batch = {"image": pictures(this.model, size), "text": text.unflatten(0, (size, *captions))}
            batch["group"] = torch.arange(size)
            if this.teacher:
                batch["teacher_image"] = torch.ones(size, this.teacher["width"], dtype=torch.float16)
                batch["teacher_text"] = torch.ones(size, *captions, this.teacher["width"], dtype=torch.float16)
        return batch

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        train_step(self.training, batches)


def busiest(config: Config) -> int:
    """The first step of a run with the largest number of active loss terms."""
    schedules, steps = config.loss.weights.values(), config.run.steps
    turns = sorted({0, steps - 1, *(s.start for s in schedules), *(s.start + 1 for s in schedules)})
    return max((step for step in turns if step < steps), key=lambda step: sum(s.at(step, steps) > 0 for s in schedules))


class _Planned(Training):
    """Training without its teacher and sources, of which only widths and shapes matter."""

    counter: Counter | None = None

    def __init__(self, config: Config, device: torch.device, precision: str, teacher_width: int | None) -> None:
        self.teacher_width = teacher_width
        super().__init__(config, device, precision)

    def read_teacher(self) -> dict[str, Any]:
        if self.teacher_width is None:
            try:
                return super().read_teacher()
            except (ValueError, data.ShardError) as error:
                raise ConfigError(
                    f"{error}. To plan without the shards: --teacher-width, the width of its features"
                ) from None
        return {"name": "a teacher", "width": self.teacher_width, "logit_scale": TEACHER_SCALE}

    def sources(self) -> Any:
        sources = self.config.inherit.source
        return [_architecture(source) for source in ([sources] if isinstance(sources, str) else sources)]

    def encode(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Encodes a batch; for a merged one (see `batches`) only makes features of its size."""
        if "image" not in batch:
            size, k = len(batch["group"]), self.config.data.captions_per_image
            rows, (width, dtype) = (size, size * k), self._features
            return tuple(torch.empty(n, width, dtype=dtype, device=self.device) for n in rows)
        if self.counter is None:
            return super().encode(batch)
        with self.counter.during("encode", "activations"):
            features = super().encode(batch)
        self._features = features[0].shape[1], features[0].dtype
        return features

    def terms(self, batches: list[dict[str, Any]], image: Tensor, text: Tensor) -> dict[str, Tensor]:
        if self.counter is None:
            return super().terms(batches, image, text)
        with self.counter.during("loss", "loss"):
            return super().terms(batches, image, text)


def _architecture(source: str) -> Any:
    """Empty tensors of an open_clip tag, so that nothing is downloaded."""
    name, slash, _ = source.removeprefix(TAG).partition("/")
    if not slash or name not in open_clip.list_models():
        return source
    with torch.device("meta"):
        model = models.create(models.PLAIN + name, device="meta")
    return {key: torch.empty(t.shape, dtype=t.dtype) for key, t in model.state_dict().items()}


class OpenClipStep:
    """A step of open_clip's trainer on one of its models, with its loss for that model or with stored teacher features.

    teacher_width: the width of a teacher's features for DistillClipLoss; None: CoCaLoss for a CoCa, SigLipLoss for a model
    with a logit bias, else ClipLoss. No teacher is in memory, unlike in open_clip's own trainer.
    """

    def __init__(self, name: str, batch_size: int, precision: str, teacher_width: int | None = None) -> None:
        self.name, self.batch_size, self.precision, self.teacher_width = name, batch_size, precision, teacher_width
        with torch.device("meta"):
            self.model = models.create(models.PLAIN + name, device="meta", output_dict=True).train()
        self.loss = self._loss()
        self.modules: list[nn.Module] = [self.model, self.loss]

    def _loss(self) -> nn.Module:
        if self.teacher_width is not None:
            return DistillClipLoss()
        if hasattr(self.model, "text_decoder"):
            return CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
        return ClipLoss() if getattr(self.model, "logit_bias", None) is None else SigLipLoss()

    def materialize(self, device: torch.device) -> None:
        self.model = models.create(models.PLAIN + self.name, device=device, output_dict=True).train()
        self.modules = [self.model, self.loss]

    def place(self, device: torch.device, counter: Counter | None = None) -> None:
        self.device, self.counter = device, counter
        card = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=card)  # torch's default on both devices

    def batches(self, whole: bool) -> list[dict[str, Tensor]]:
        size = self.batch_size
        with torch.device("cpu" if whole else "meta"):
            text = tokens(models.PLAIN + self.name, self.model, size, whole)
            batch = {"image": pictures(self.model, size), "text": text}
            if self.teacher_width is not None:
                for name in ("dist_image_features", "dist_text_features"):
                    batch[name] = torch.ones(size, self.teacher_width, dtype=torch.float16)
        return [batch]

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        (batch,) = batches
        self.optimizer.zero_grad()
        with hardware.autocast(self.precision, self.device):
            with self._during("encode", "activations"):
                batch = {name: t.to(self.device) for name, t in batch.items()}
                outputs = self.model(batch.pop("image"), batch.pop("text"))
            with self._during("loss", "loss"):
                if batch:
                    batch = {name: t.to(outputs["image_features"].dtype) for name, t in batch.items()}
                    outputs |= batch | {"dist_logit_scale": torch.full((), TEACHER_SCALE, device=self.device)}
                loss = sum(self.loss(**outputs, output_dict=True).values())
        del outputs, batch
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))

    def _during(self, phase: str, kind: str) -> AbstractContextManager:
        return nullcontext() if self.counter is None else self.counter.during(phase, kind)


def tokens(name: str, model: nn.Module, count: int, whole: bool) -> Tensor:
    """Token ids, int64 [count, L]. whole: those of a real caption with an end; some tokenizers are downloaded for it."""
    if whole:
        return models.tokenizer(name)(["a photo of a small thing"]).expand(count, -1).contiguous()
    length = model.context_length if hasattr(model, "context_length") else model.text.context_length
    return torch.zeros(count, length, dtype=torch.int64)


def pictures(model: nn.Module, count: int) -> Tensor:
    size = model.visual.image_size
    return torch.zeros(count, 3, *((size, size) if isinstance(size, int) else size))
