"""The steps of a plan, on fake or real tensors: a step of our trainer, and a step of open_clip's models and losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from simplclip import data, models
from simplclip.common import hardware
from simplclip.models.crop import TextCrop
from simplclip.models.packaged import SOURCES
from simplclip.models.weights import TAG
from simplclip.train.settings import Config
from simplclip.train.state import Training, lr_factor, make_optimizer
from simplclip.train.step import train_step

TEACHER_SCALE = 100.0
During = Callable[[str, str], AbstractContextManager]  # the context of a phase, which allocates memory of a kind


class TrainerStep(Training):
    """A step of `simplclip train`: config.data.batch_size images, by gradient caching if config.data has a micro_batch.

    teacher_width: D̂; if None, it is read from the shards. Only the shapes of the teacher's features and of inherited weights
    matter. Where the files of these are not on this machine, their shapes are assumed, and `assumed` says which. `predict`
    and `measure` use `modules`, `optimizer`, `materialize`, `place`, `batches` and `run`, which OpenClipStep has too.
    """

    def __init__(self, config: Config, precision: str, teacher_width: int | None = None) -> None:
        self.teacher_width, self.assumed = teacher_width, list[str]()
        super().__init__(config, torch.device("cpu"), precision)
        if (mean := config.data.mean_tokens) is not None:
            why = self.padded or (config.run.compile and "compiled towers crop a batch to its longest text")
            told = f"in one graph, texts of {mean:g} tokens, and an eighth and 8 more, which groups of lengths add"
            self.assumed.append(f"texts of full length, whatever data.mean_tokens: {why}" if why else told)

    def resized(self, config: Config) -> TrainerStep:
        """Returns the step of a config that differs only in its section `data`. Both share the model: run one at a time."""
        other = copy.copy(self)
        other.config = config
        return other

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose weights are in memory."""
        return [self.model, self.loss, *self.folded.copies]

    @property
    def tokens(self) -> int | None:
        """The length with which each text is predicted; None: full length.

        One graph keeps all texts, so that their mean length counts. Rounding and groups of lengths add less than an eighth
        and 8 tokens for captions like COCO's and CC12M's. A micro-batch is filled up to as many tokens as padded texts have.
        """
        c = self.config.data
        if self.crop is None or self.crop.groups == 1 or c.mean_tokens is None or c.micro_batch is not None:
            return None
        return math.ceil(c.mean_tokens * 9 / 8 + 8) + self.crop.reach

    def materialize(self, device: torch.device) -> None:
        """Gives the modules real weights on `device`."""
        for module in self.modules:
            module.to(device)

    def place(self, device: torch.device, during: During) -> None:
        """Makes the optimizer on `device`, where the weights already are. The step enters `during` for each of its phases."""
        self.device, self.during = device, during
        self.optimizer = make_optimizer(self.model, self.loss, self.config)
        self.schedule = LambdaLR(self.optimizer, lambda step: lr_factor(step, self.config))
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)  # an enabled scaler reads values of tensors
        self.step = busiest_step(self.config)
        self._seen: dict[str, dict[str, tuple[int, torch.dtype]]] = {}  # tower -> width and dtype of each of its outputs
        self.model.train()
        if self.crop is not None:  # the predicted texts have one length
            self.crop.undo()
            self.crop = TextCrop(self.model, 1, self.crop.groups) if self.tokens else None

    def batches(self, real: bool) -> list[dict[str, Any]]:
        """Returns the micro-batches of a step, in the host's memory.

        real: whether the tensors have values, to run the step. For a prediction they have only shapes, and the micro-batches
        between the second and the last are merged into one. The towers do not process the merged one, since each of its parts
        would take the same memory as the second. `text_batches` does the same for texts.
        """
        self.real, size = real, self.config.data.images_at_a_time
        count = self.config.data.batch_size // size
        if real or count < 4:
            return [self._batch(size, real) for _ in range(count)]
        between = self._batch((count - 3) * size, real) | {"unseen": True}
        return [self._batch(size, real), self._batch(size, real), between, self._batch(size, real)]

    def _batch(self, size: int, real: bool) -> dict[str, Any]:
        k = self.config.data.captions_per_image
        captions = () if k == 1 else (k,)
        with torch.device("cpu" if real else "meta"):
            image, text = inputs(self.config.model.name, self.model, size, k, real, self.tokens)
            pixels = {"image": image} if self.prefix is None else {"prefix": torch.zeros(size, *self.prefix.shape).half()}
            batch = {**pixels, "text": text.unflatten(0, (size, *captions)), "group": torch.arange(size)}
            if self.teacher:
                batch["teacher_image"] = torch.ones(size, self.teacher["width"], dtype=torch.float16)
                batch["teacher_text"] = torch.ones(size, *captions, self.teacher["width"], dtype=torch.float16)
        return batch

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        """Runs one training step."""
        train_step(self, batches)

    def read_teacher(self) -> dict[str, Any]:
        """Returns the teacher: of width `teacher_width`, else as named by the shards, else assumed of the student's width."""
        width = self.teacher_width
        if width is None:
            try:
                return super().read_teacher()
            except (ValueError, data.ShardError) as error:
                model = self.config.model
                width = model.options.get("embed_dim", models.spec_of(model.name).config["embed_dim"])
                self.assumed.append(f"a teacher of the student's width, {width} (--teacher-width): {error}")
        return {"name": "a teacher", "width": width, "logit_scale": TEACHER_SCALE}

    def start(self) -> None:
        """Loads nothing: the values of weights do not change the memory."""

    def sources(self) -> Any:
        sources = self.config.inherit.source
        return [self._architecture(source) for source in ([sources] if isinstance(sources, str) else sources)]

    def _architecture(self, source: str) -> Any:
        """Returns the source; for a missing file, or an open_clip tag, which would be downloaded, tensors of its shapes."""
        name, slash, _ = source.removeprefix(TAG).partition("/")
        original = models.original(self.config.model.name)
        if slash and name in open_clip.list_models():
            original = models.PLAIN + name
        elif original is None or Path(source).exists() or source in SOURCES:
            return source
        else:
            self.assumed.append(f"weights of {original.removeprefix(models.PLAIN)}, since {source} is not on this machine")
        with torch.device("meta"):
            model = models.create(original, device="meta")
        values, numbers = {}, torch.Generator()
        for key, tensor in model.state_dict().items():
            values[key] = value = torch.zeros(tensor.shape, dtype=tensor.dtype)
            if value.is_floating_point():
                value.uniform_(0.01, 0.03, generator=numbers)
        return values

    def outputs(self, tower: str, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns a tower's outputs for a batch; for a merged batch (see `batches`), empty tensors of the same shapes."""
        if "unseen" in batch:
            rows = len(batch["group"]) if tower == "image" else batch["text"].shape[:-1].numel()
            like = self._seen[tower].items()
            return {name: torch.empty(rows, width, dtype=dtype, device=self.device) for name, (width, dtype) in like}
        with self.during("encode", "activations"):
            outputs = super().outputs(tower, batch)
        self._seen[tower] = {name: (t.shape[1], t.dtype) for name, t in outputs.items()}
        return outputs

    def width(self) -> int:
        """Returns D. The step must have run before."""
        return self._seen["image"]["image"][0]

    def text_batches(self, batches: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Tensor | None]:
        parts, rows = super().text_batches(batches)
        if parts is batches or self.real or len(parts) < 4:
            return parts, rows
        unseen = sum(len(part["text"]) for part in parts[2:-1])
        return [*parts[:2], {"text": parts[2]["text"][:1].expand(unseen, -1), "unseen": True}, parts[-1]], rows

    def groups(self, batches: list[dict[str, Any]]) -> Tensor:
        """Returns groups that are not known to be different, as those of fake tensors cannot be read."""
        return torch.cat([batch["group"] for batch in batches]).to(self.device)

    def terms(self, batches: list[dict[str, Any]], image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.during("loss", "loss"):
            return super().terms(batches, image, text)


def busiest_step(config: Config) -> int:
    """The first step of a run with the largest number of active loss terms.

    On a CPU, a step of a large batch without the teacher's terms may keep rows, at most STORE_BYTES, that this step does not.
    """
    schedules, steps = config.loss.weights.values(), config.run.steps
    turns = sorted({0, steps - 1, *(s.start for s in schedules), *(s.start + 1 for s in schedules)})
    return max((step for step in turns if step < steps), key=lambda step: sum(s.at(step, steps) > 0 for s in schedules))


class OpenClipStep:
    """A step of open_clip's trainer on a model, with its loss for that model or with stored teacher features.

    name, options: as for `models.create`. teacher_width: the width of a teacher's features for DistillClipLoss; None:
    SigLipLoss for a model with a logit bias, else ClipLoss. No teacher is in memory, unlike in open_clip's own trainer.
    """

    def __init__(self, name: str, batch_size: int, precision: str, teacher_width: int | None = None, **options: Any) -> None:
        self.name, self.batch_size, self.precision, self.teacher_width = name, batch_size, precision, teacher_width
        self.options = options | {"output_dict": True}
        with torch.device("meta"):
            self.materialize(torch.device("meta"))
        if teacher_width is not None:
            self.loss = DistillClipLoss()
        else:
            self.loss = ClipLoss() if getattr(self.model, "logit_bias", None) is None else SigLipLoss()

    def materialize(self, device: torch.device) -> None:
        self.model: Any = models.create(self.name, device=device, **self.options).train()

    @property
    def modules(self) -> list[nn.Module]:
        return [self.model, self.loss]

    def place(self, device: torch.device, during: During) -> None:
        self.device, self.during = device, during
        card = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, foreach=card)  # torch's default on both devices

    def batches(self, real: bool) -> list[dict[str, Tensor]]:
        with torch.device("cpu" if real else "meta"):
            image, text = inputs(self.name, self.model, self.batch_size, 1, real)
            batch = {"image": image, "text": text}
            if self.teacher_width is not None:
                for name in ("dist_image_features", "dist_text_features"):
                    batch[name] = torch.ones(self.batch_size, self.teacher_width, dtype=torch.float16)
        return [batch]

    def run(self, batches: list[dict[str, Tensor]]) -> None:
        (batch,) = batches
        self.optimizer.zero_grad()
        with hardware.autocast(self.precision, self.device):
            with self.during("encode", "activations"):
                batch = {name: t.to(self.device) for name, t in batch.items()}
                outputs = self.model(batch.pop("image"), batch.pop("text"))
            with self.during("loss", "loss"):
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


Step = TrainerStep | OpenClipStep


def inputs(name: str, model: Any, size: int, captions: int, real: bool, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Returns images [size, 3, H, W], and token ids, int64 [size * captions, L].

    real: whether the tokens are a caption, at whose end some models pool. Otherwise the tokens are zeros.
    tokens: L, if it is less than the model's context length.
    """
    side = model.visual.image_size
    image = torch.zeros(size, 3, *((side, side) if isinstance(side, int) else side))
    length = model.context_length if hasattr(model, "context_length") else model.text.context_length
    words = "a photo of a small thing"
    if tokens is not None and tokens < length:
        words, length = " ".join(["a"] * tokens), tokens  # the tokenizer puts the end in the last place
    if real:
        return image, models.tokenizer(name, length)([words]).expand(size * captions, -1).contiguous()
    return image, torch.zeros(size * captions, length, dtype=torch.int64)
