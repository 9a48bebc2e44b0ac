"""The state of training: model, loss, optimizer and schedule, saved to and restored from a checkpoint; or the model alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from simplclip import data, models
from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.data.transforms import augmentation, finished
from simplclip.models.crop import crop_texts
from simplclip.models.frozen import FrozenParts
from simplclip.models.inherit import freeze, freeze_norms, inherit
from simplclip.models.registry import first_line
from simplclip.models.weights import InheritanceError, WeightTable, load_weights
from simplclip.nn import SimplifiedBlock
from simplclip.train import checkpoint
from simplclip.train.config import ConfigError, from_dict
from simplclip.train.objective import Objective
from simplclip.train.prefix_cache import prefix_of
from simplclip.train.settings import SHAPE, Config, MicroBatch
from simplclip.train.together import Together, share_norms
from simplclip.train.trust import check_options

SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # initial values of SigLIP, arXiv 2303.15343


class Training:
    """Model, loss, optimizer and their progress. `batch` is the number of the loader's batches used in `epoch`.

    state: a checkpoint to continue from; without one the model inherits the weights that config.inherit names.
    """

    def __init__(self, config: Config, device: torch.device, precision: str, state: dict[str, Any] | None = None):
        self.config, self.device, self.precision = config, device, precision
        self.transform = image_transform(config)
        self.teacher = self.read_teacher() if config.loss.needs_teacher else None
        self._check_views()
        self.model = build_model(config)
        self.blocks = [module for module in self.model.modules() if isinstance(module, SimplifiedBlock)]
        self.weights = self.start() if config.model.checkpoint is not None and not state else None
        self.inheritance, self.frozen = None, state.get("frozen", []) if state else []
        freeze(self.model, self.frozen)
        if config.inherit.source is not None and not state:
            how = config.inherit
            self.inheritance = inherit(self.model, self.sources(), train=how.train, blocks=how.blocks)
            self.frozen = self.inheritance.names
            for name in ("logit_scale", "logit_bias"):  # a value of the config replaces the source's
                if (value := config.model.options.get(f"init_{name}")) is not None:
                    nn.init.constant_(getattr(self.model, name), value)
        if config.model.freeze_norms:
            freeze_norms(self.model)
        if config.model.recompute:
            for block in self.blocks:  # keeps only the block's input for backward
                block.recompute = True
            if not self.blocks:
                self.model.set_grad_checkpointing()
        share_norms(self.model, device)
        self.model.to(device)
        self.objective = Objective(config.loss, config.run.steps, self._width(), self.teacher)
        self.loss = self.objective.loss.to(device)
        self.average = Average(self.model, config.optim.ema) if config.optim.ema is not None else None
        self.optimizer = make_optimizer(self.model, self.loss, config)
        self.schedule = LambdaLR(self.optimizer, lambda step: lr_factor(step, config))
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step = self.epoch = self.batch = 0
        self.data: dict[str, Any] | None = None  # the loader's state in the epoch
        self.updating = False  # True while a step changes the parameters, which cannot be undone
        if state:
            for name, part in self._stateful():
                part.load_state_dict(state[name])
            for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas):
                group["lr"] = group["initial_lr"] * factor(state["step"])  # run.steps may have changed
            self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
            self.data = state["data"]
            checkpoint.set_rng_state(state["rng"])
        # torch.compile compiles a tower anew for each size, so it gets few.
        self.crop, self.padded = None, ""
        try:
            self.crop = crop_texts(self.model, **{"multiple": 16, "groups": 1} if config.run.compile else {})
        except InputError as error:
            self.padded = str(error).removeprefix("model: expected an open_clip model whose texts can be cropped, got ")
        self.together = Together(self.model, at_once=config.data.micro_batch is None)
        self.folded = FrozenParts(self.model, hardware.DTYPES[precision])
        copies = [part.folded for part in self.folded.parts if part.folded and part.name.startswith("visual")]
        weights = [p for module in (self.model.visual, *copies) for p in module.parameters()]
        self.channels_last = any(p.ndim == 4 and not p.is_contiguous() for p in weights)
        if config.run.compile:
            # The token embedding is not compiled, since its compiled gradient adds in an order that changes. Sizes are fixed,
            # since the choice of sizes that dynamo makes dynamic depends on earlier compilations.
            for part in (self.model.visual, getattr(self.model, "text", self.model).transformer):
                part.compile(dynamic=False)
        self.prefix = None
        if config.data.cache_prefix is not None:
            context = hardware.autocast(precision, device)
            self.prefix = prefix_of(config, self.folded, self.transform, self.teacher, context)

    def read_teacher(self) -> dict[str, Any]:
        """Returns the teacher of the samples' features: its name, width and logit scale, and its views if it saw any."""
        c = self.config.data
        return data.teacher_stamp([part.url for part in data.parts_of(c.train, "data.train")], c.sidecars)

    def _check_views(self) -> None:
        """Raises ConfigError if data.augment differs from the augmentation of the views that the teacher saw."""
        if self.config.data.augment is None or not self.teacher or "views" not in self.teacher:
            return
        wanted, stored = augmentation(self.transform), self.teacher["views"]["augment"]
        if wanted != stored:
            raise ConfigError(
                f"data.augment: expected null, or {stored!r} as in the views that the teacher {self.teacher['name']} saw and "
                f"training replays, got {wanted!r}"
            )

    def start(self) -> WeightTable | None:
        """Loads the weights of model.checkpoint."""
        try:
            return load_weights(self.model, self.config.model.checkpoint)
        except (InheritanceError, FileNotFoundError) as error:
            raise ConfigError(f"model.checkpoint: {str(error).removeprefix('source: ')}") from None

    def sources(self) -> Any:
        """Returns the source, or the list of sources, for `inherit`."""
        return self.config.inherit.source

    def progress(self) -> dict[str, Any]:
        """Returns the part of `state` that says where the run is."""
        return {"step": self.step, "epoch": self.epoch, "batch": self.batch, "data": self.data, "rng": checkpoint.rng_state()}

    def _stateful(self) -> Iterator[tuple[str, Any]]:
        for name in ("model", "loss", "optimizer", "schedule", "scaler"):
            yield name, getattr(self, name)
        if self.average:
            yield "ema", self.average

    def state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self._stateful()}
        return parts | self.progress() | {"frozen": self.frozen, "config": self.config.to_dict(), "ranks": ranks.count()}

    def outputs(self, tower: str, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the features of a tower for a batch, by the tower's name, as `terms` takes them."""
        return {tower: {"image": self.encode_image, "text": self.encode_text}[tower](batch)}

    def encode_image(self, batch: dict[str, Any]) -> Tensor:
        """Returns normalised features [N, D] of a batch's images, or of the cached outputs of the tower's prefix."""
        if "prefix" in batch:
            outputs = batch["prefix"].to(self.device, non_blocking=True)
            layout = torch.channels_last if outputs.ndim == 4 else torch.preserve_format
            images = outputs.to(torch.float32, memory_format=layout)
        else:
            images = self.pixels(batch)
        with hardware.autocast(self.precision, self.device):
            return self.model.encode_image(images, normalize=True)

    def pixels(self, batch: dict[str, Any]) -> Tensor:
        """Returns the complete images of a batch on the device."""
        colour = batch.get("colour")
        return finished(self.transform, batch["image"], self.device, colour=colour, channels_last=self.channels_last)

    def encode_text(self, batch: dict[str, Any]) -> Tensor:
        """Returns normalised features [N k, D] of the k captions of each image, or [M, D] of M captions."""
        text = batch["text"].flatten(0, -2)
        if self.crop is None:  # otherwise TextCrop needs the text on the CPU, and moves it
            text = text.to(self.device, non_blocking=True)
        with hardware.autocast(self.precision, self.device):
            return self.model.encode_text(text, normalize=True)

    def text_batches(self, batches: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Splits the captions of a step for the text tower; also returns the row of each one's features, None if in order.

        If texts are cropped, a micro-batch has at most as many tokens as the configured number of texts of full length. Ranks
        may have different numbers of micro-batches, since they exchange nothing between two of them.
        """
        micro = self.config.data.micro_batch
        if not isinstance(micro, MicroBatch) and self.crop is None:
            return batches, None
        parts = [batch["text"].flatten(0, -2) for batch in batches]
        texts = torch.cat(parts)
        size = (micro.text if isinstance(micro, MicroBatch) else len(parts[0])) or len(texts)
        if self.crop is None or size >= len(texts):
            return [{"text": part} for part in texts.split(size)], None
        rows = self.crop.split(texts, size * texts.shape[1])
        return [{"text": texts[some]} for some in rows], torch.cat(rows).argsort().to(self.device)

    def groups(self, batches: list[dict[str, Any]]) -> Tensor | None:
        """Returns the groups [N] of a step; None if all pairs of all ranks are known to be of different ones."""
        groups = torch.cat([batch["group"] for batch in batches])  # on the CPU, where reading them waits for nothing
        if ranks.count() == 1 and len(set(groups.tolist())) == len(groups):
            return None
        return groups.to(self.device, non_blocking=True)

    def terms(self, batches: list[dict[str, Any]], image: Tensor, text: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss over all `batches` from their features, and its weighted terms without gradients."""
        names = ("teacher_image", "teacher_text") if self.teacher else ()
        rest = [torch.cat([batch[name] for batch in batches]).to(self.device, non_blocking=True) for name in names]
        if self.teacher:
            rest[1] = rest[1].flatten(0, -2)
        group = self.groups(batches)
        with hardware.autocast(self.precision, self.device):
            scale, bias = self.together.learned(self.model.logit_scale, self.logit_bias)
            return self.objective(self.step, image, text, scale.exp(), bias, group, *rest)

    @property
    def logit_bias(self) -> Tensor | None:
        """The bias that the loss uses."""
        return getattr(self.model, "logit_bias", None) if self.config.loss.base == "sigmoid" else None

    def _width(self) -> int | None:
        """Returns D if the loss needs D, else None."""
        if self.config.loss.plane != "hadamard" and self.teacher is None:
            return None
        with torch.no_grad():
            tokens = tokenizer(self.config)(["a"]).to(self.device)
            return self.model.eval().encode_text(tokens).shape[-1]


class Average:
    """The exponential moving average of a run's weights, for evaluation and export.

    v = decay v + (1 - decay) w after each step, for every parameter w that trains. Memory: one copy of these parameters.

    Buffers are not averaged: a model with the averages has the buffers of the last step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        names = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.weights = list(dict.fromkeys(names.values()))
        self.averages = [weight.detach().clone() for weight in self.weights]
        places = {id(weight): i for i, weight in enumerate(self.weights)}
        self.names = {name: places[id(weight)] for name, weight in names.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        self._average(self.averages, self.weights, 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the model has the averages as its parameters."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, weight in enumerate(self.weights):
            weight.data, self.averages[i] = self.averages[i], weight.data

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages by the names of the model's state dict."""
        return {name: self.averages[i] for name, i in self.names.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, i in self.names.items():
            self.averages[i].copy_(state[name])


def image_transform(config: Config, train: bool = True) -> Any:
    """Returns the transform of the config's images, which augments if `train`."""
    augment, size = config.data.augment, config.model.shape("image_size")
    return models.transforms(config.model.name, train=train, augment=augment, image_size=size)


def tokenizer(config: Config) -> Any:
    """Returns the tokenizer of the config's model."""
    return models.tokenizer(config.model.name, config.model.shape("context_length"))


def model_options(config: Config) -> dict[str, Any]:
    """Returns arguments for `models.create`; with the base sigmoid, SigLIP's scale and bias where the config has none."""
    options = (SIGLIP if config.loss.base == "sigmoid" else {}) | config.model.options
    shape = {section: {name: config.model.shape(name)} for section, name in SHAPE.items() if config.model.shape(name)}
    return options | {section: (options.get(section) or {}) | values for section, values in shape.items()}


def build_model(config: Config) -> Any:
    """Builds the model that `config` names, with random weights. Raises ConfigError for options that the model rejects."""
    try:
        model = models.create(config.model.name, **model_options(config))
    except TypeError as error:
        got = f"{config.model.options}: {error}"
        raise ConfigError(f"model.options: expected options of {config.model.name}, got {got}") from error
    if any(map(config.model.shape, SHAPE.values())):
        models.check_shape(model, tokenizer(config))
    return model


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, trust: bool = False
) -> tuple[nn.Module, Config, dict[str, Any]]:
    """Returns the model in eval mode, config and raw state of a checkpoint. Raises FileNotFoundError, CheckpointError.

    trust: accept model.options that may fetch or unpickle files, see `trust.check_options`.
    """
    state = checkpoint.load(path)
    try:
        config = from_dict(state["config"], stored=True)
    except (ConfigError, LookupError) as error:
        reason = first_line(error) if isinstance(error, ConfigError) else "none"
        raise checkpoint.CheckpointError(f"{path}: expected a checkpoint with a valid config, got {reason}") from None
    if not trust:
        check_options(config.model.options, str(path))
    try:
        model = build_model(config)
        model.load_state_dict(state["model"] | state.get("ema", {}), strict=True)
    except InputError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # the type depends on the options, and on the damage
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise checkpoint.CheckpointError(
            f"{path}: expected weights of {config.model.name!r}, the model of its config: {reasons[:300]}"
        ) from None
    return model.to(device).eval(), config, state


def make_optimizer(model: nn.Module, loss: nn.Module, config: Config) -> torch.optim.AdamW:
    """Returns an AdamW that decays matrices only: no norms, biases, gains, scales, class tokens or parameters of the loss."""
    o = config.optim
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:  # A matrix has two dimensions above 1; a layer scale [C, 1, 1] is a gain.
            (decayed if sum(n > 1 for n in p.shape) >= 2 else rest).append(p)
    rest += [p for p in loss.parameters() if p.requires_grad]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = decayed[0].device.type in ("cpu", "cuda")
    try:
        options: dict[str, Any] = {**o.options, "betas": tuple(o.options["betas"])}
        return torch.optim.AdamW(groups, lr=o.lr, fused=fused, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.options: expected arguments of torch.optim.AdamW, got {o.options}: {error}") from None


def lr_factor(step: int, config: Config) -> float:
    """Returns the share of optim.lr at `step` (from 0): linear warm-up, then a cosine down to 0."""
    o, steps = config.optim, config.run.steps
    if step < o.warmup:
        return (step + 1) / o.warmup
    done = min(1.0, (step - o.warmup) / max(1, steps - o.warmup))
    return 0.5 * (1 + math.cos(math.pi * done))
