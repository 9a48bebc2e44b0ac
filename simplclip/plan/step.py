"""The steps that a plan looks at, on fake or on real tensors: our trainer's, and that of open_clip's models and losses."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import open_clip
import torch
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from simplclip import hardware, models
from simplclip.config import Config
from simplclip.inherit import TAG
from simplclip.plan.count import Counter
from simplclip.train.loop import train_step
from simplclip.train.training import Training, lr_factor, make_optimizer

TEACHER_SCALE = 100.0


class Step(Protocol):
    """What `predict` and `measure` run. `modules`: whose tensors are on the device from the beginning."""

    modules: list[nn.Module]
    optimizer: torch.optim.Optimizer

    def materialize(self, device: torch.device) -> None:
        """Gives the modules real weights on `device`."""

    def place(self, device: torch.device, counter: Counter | None = None) -> None:
        """The step runs on `device`, where the modules are by now; `counter` is told of its parts."""

    def batches(self, whole: bool) -> list[dict[str, Tensor]]:
        """The micro-batches of a step, in the host's memory.

        Not `whole`: without values, and those between the second and the last without pixels, as one more of the same.
        """

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        """One step of the optimizer."""


class TrainerStep:
    """A step of `simplclip train`: config.data.batch_size pairs, by gradient caching where it has a micro_batch.

    teacher_width: D̂, where the shards that would say it need not be there.
    """

    def __init__(self, config: Config, precision: str, teacher_width: int | None = None) -> None:
        self.config, self.precision = config, precision
        self.training = _Planned(config, torch.device("cpu"), precision, teacher_width)
        self.modules = [self.training.model, self.training.loss]

    def materialize(self, device: torch.device) -> None:
        for module in self.modules:
            module.to(device)

    def place(self, device: torch.device, counter: Counter | None = None) -> None:
        this = self.training
        this.device, this.counter = device, counter
        this.optimizer = make_optimizer(this.model, this.loss, self.config)
        this.schedule = LambdaLR(this.optimizer, lambda step: lr_factor(step, self.config))
        this.scaler = torch.amp.GradScaler(device.type, enabled=False)  # its figures would have to be read
        this.model.train()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.training.optimizer

    def batches(self, whole: bool) -> list[dict[str, Tensor]]:
        c, this = self.config.data, self.training
        size = c.micro_batch or c.batch_size
        count, k = c.batch_size // size, c.captions_per_image
        text = tokens(self.config.model.name, size * k if whole else 1)
        with torch.device("cpu" if whole else "meta"):
            text = text if whole else torch.empty(size * k, text.shape[1], dtype=text.dtype)
            batch = {"group": torch.arange(size)}
            if this.teacher:
                width, captions = this.teacher["width"], () if k == 1 else (k,)
                batch["teacher_image"] = torch.ones(size, width, dtype=torch.float16)
                batch["teacher_text"] = torch.ones(size, *captions, width, dtype=torch.float16)
            pixels = {"image": pictures(this.model, size), "text": text if k == 1 else text.unflatten(0, (size, k))}
        middle = 0 if whole else max(0, count - 3)
        return [batch | pixels] * min(2, count - 1) + [batch] * middle + [batch | pixels] * (count - middle - min(2, count - 1))

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        train_step(self.training, batches)


class _Planned(Training):
    """Training whose teacher and sources need not be there: only widths and shapes count."""

    counter: Counter | None = None

    def __init__(self, config: Config, device: torch.device, precision: str, teacher_width: int | None) -> None:
        self.teacher_width = teacher_width
        super().__init__(config, device, precision)

    def read_teacher(self) -> dict[str, Any]:
        if self.teacher_width is None:
            return super().read_teacher()
        return {"name": "a teacher", "width": self.teacher_width, "logit_scale": TEACHER_SCALE}

    def sources(self) -> Any:
        sources = self.config.inherit.source
        return [_architecture(source) for source in ([sources] if isinstance(sources, str) else sources)]

    def encode(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Of a micro-batch without pixels, which stands for one more like the others, the features alone."""
        if "image" not in batch:
            return tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self._like)
        if self.counter is None:
            return super().encode(batch)
        with self.counter.during("encode", "activations"):
            features = super().encode(batch)
        self._like = [(t.shape, t.dtype) for t in features]
        return features

    def terms(self, batches: list[dict[str, Any]], image: Tensor, text: Tensor) -> dict[str, Tensor]:
        if self.counter is None:
            return super().terms(batches, image, text)
        with self.counter.during("loss", "loss"):
            return super().terms(batches, image, text)


def _architecture(source: str) -> Any:
    """An open_clip tag's tensors, empty: nothing is downloaded to count bytes."""
    name, slash, _ = source.removeprefix(TAG).partition("/")
    if not slash or name not in open_clip.list_models():
        return source
    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta", pretrained_image=False, pretrained_text=False)
    return {key: torch.empty(t.shape, dtype=t.dtype) for key, t in model.state_dict().items()}


class OpenClipStep:
    """A step of open_clip's trainer on one of its models, with its ClipLoss, or DistillClipLoss from stored features.

    teacher_width: of the features of a teacher for DistillClipLoss; None: ClipLoss. No teacher is in memory, which
    open_clip's own trainer would have there.
    """

    def __init__(self, name: str, batch_size: int, precision: str, teacher_width: int | None = None) -> None:
        self.name, self.batch_size, self.precision, self.teacher_width = name, batch_size, precision, teacher_width
        with torch.device("meta"):
            self.model = models.create(models.PLAIN + name, device="meta", output_dict=True).train()
        self.loss = ClipLoss() if teacher_width is None else DistillClipLoss()
        self.modules: list[nn.Module] = [self.model, self.loss]

    def materialize(self, device: torch.device) -> None:
        self.model = models.create(models.PLAIN + self.name, device=device, output_dict=True).train()
        self.modules = [self.model, self.loss]

    def place(self, device: torch.device, counter: Counter | None = None) -> None:
        self.device, self.counter = device, counter
        card = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=card)  # torch's choice on either

    def batches(self, whole: bool) -> list[dict[str, Tensor]]:
        size, text = self.batch_size, tokens(models.PLAIN + self.name, self.batch_size if whole else 1)
        with torch.device("cpu" if whole else "meta"):
            batch = {"image": pictures(self.model, size)}
            batch["text"] = text if whole else torch.empty(size, text.shape[1], dtype=text.dtype)
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


def tokens(name: str, count: int) -> Tensor:
    """int64 [count, L] of a real caption, so that its end is found."""
    return models.tokenizer(name)(["a photo of a small thing"]).expand(count, -1).contiguous()


def pictures(model: nn.Module, count: int) -> Tensor:
    size = model.visual.image_size
    return torch.zeros(count, 3, *((size, size) if isinstance(size, int) else size))
