"""The state of a run, made from a config or a checkpoint in three steps.

load_model      a model on the CPU with its weights; load_start those with which a run began
prepare_model   the model as it trains: layout, folded copies, cropped texts
make_state      all that a step needs: objective, optimizer, averages
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simplclip import data, models
from simplclip.common.errors import InputError, first_line
from simplclip.data.transforms import augmentation
from simplclip.models.crop import TextCrop, crop_texts
from simplclip.models.fold import fold_frozen
from simplclip.models.inherit import WeightTable, freeze, freeze_norms, inherit
from simplclip.models.lora import add_lora
from simplclip.models.naming import SCALARS
from simplclip.models.packaged import STATES
from simplclip.models.trained import (
    CheckpointError,
    build_model,
    image_transform,
    model_options,
    other_pixels,
)
from simplclip.models.weights import checksums, load_error, plain_name
from simplclip.nn import SimplifiedBlock
from simplclip.train.beginning import Beginning
from simplclip.train.config import Config, ConfigError, from_dict
from simplclip.train.objective import Objective, share_norms
from simplclip.train.optimizer import Average, freeze_zeros, load_optimizer, make_optimizer


@dataclass
class PreparedModel:
    """A model with its weights, as it trains."""

    model: Any
    frozen: list[str]  # names of frozen modules and parameters
    # names of frozen modules -> the folded copies that run in their places
    folded: dict[str, nn.Module]
    crop: TextCrop | None  # None: texts are computed at full length
    lines: list[str]  # for the log: where the weights come from, what is cropped and folded


@dataclass
class State:
    """A run and how far it is. Between two steps it is the state after a whole step.

    A step changes tensors, `step` and `updating` alone.
    """

    config: Config
    device: torch.device
    precision: str
    prepared: PreparedModel
    transform: Any  # of images
    channels_last: bool  # the layout of images
    # name, width and logit_scale of the teacher whose features the samples have
    teacher: Mapping[str, Any] | None
    objective: Objective  # with objective.loss, the module of the loss's own parameters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Average | None
    lines: list[str]  # for the log
    # by tower: the frozen beginnings whose outputs gradient caching keeps
    beginnings: dict[str, Beginning] = field(default_factory=dict)
    # by tower: what exchanges gradients between ranks
    wrappers: dict[str, nn.Module] = field(default_factory=dict)
    step: int = 0  # steps that are done
    # the loaders' states of all ranks after the step's last batch
    data: list[dict[str, Any]] | None = None
    updating: bool = False  # while a step changes the weights, which cannot be undone

    @property
    def model(self) -> Any:
        return self.prepared.model

    @property
    def logit_bias(self) -> Tensor | None:
        """The model's bias [] of the sigmoid loss; None for the contrastive loss."""
        if self.config.loss.base != "sigmoid":
            return None
        return getattr(self.model, "logit_bias", None)

    def stateful(self) -> dict[str, Any]:
        """Returns what has a state_dict in a checkpoint, by key; "ema" if the run has averages."""
        items = {
            "model": self.model,
            "loss": self.objective.loss,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
        }
        return items | ({"ema": self.ema} if self.ema else {})


def load_model(
    config: Config, checkpoint: Mapping[str, Any] | None = None
) -> tuple[Any, list[str], list[str]]:
    """Makes a run's model on the CPU with its weights; raises as `make_state`.

    They are those of `checkpoint`, a last.pt, or else those from which the run starts. Returns the
    model, the names of its frozen modules and parameters, and lines for the log.
    """
    section = config.model.model_dump()
    model: Any = build_model(section, config.loss.base)
    if checkpoint:
        add_lora(model, section["lora"], [], config.inherit.train)
        freeze(model, checkpoint["frozen"])
        _load(model, checkpoint["model"])
        return model, checkpoint["frozen"], []
    tables = take_start(model, config)
    frozen = [name for table in tables for name in table.names]
    lines = [line for table in tables for line in str(table).splitlines()]
    frozen, more = add_lora(model, section["lora"], frozen, config.inherit.train)
    frozen += freeze_zeros(model, config)
    transform = image_transform(section)
    for source in sources_of(config):
        if pixels := other_pixels(source, transform):
            more.append(
                f"warning    {source} was trained on images normalised by {pixels}; this model's "
                f"have mean {transform.mean} and std {transform.std}. To train on the former: "
                f"--set 'model.options.preprocess={pixels}'"
            )
    return model, frozen, [*lines, *more]


def shapes_of(config: Config) -> tuple[nn.Module, list[str]]:
    """Returns a run's model on the meta device, and the names of its frozen modules and parameters.

    Nothing is downloaded: where a file of inherit.source is missing, the tensors of the original
    model stand for it.
    """
    name, source = config.model.name, config.inherit.source
    section = config.model.model_dump()
    model = models.create(name, device="meta", **model_options(section, config.loss.base))
    frozen = list[str]()
    if source is not None:
        sources: list[Any] = [source] if isinstance(source, str) else list(source)
        for index, file in enumerate(sources):
            if file not in STATES and not Path(file).exists():
                sources[index] = models.create(name, device="meta", simplified=False)
        settings = config.inherit
        frozen = inherit(model, sources, train=settings.train, blocks=settings.blocks).names
    frozen, _ = add_lora(model, section["lora"], frozen, config.inherit.train)
    return model, frozen + freeze_zeros(model, config)


def take_start(model: Any, config: Config) -> list[WeightTable]:
    """Copies the weights from which a run starts into its model; returns what each source gave."""
    section = config.inherit
    starts: list[tuple[str, Any, dict[str, Any]]] = [
        ("model.checkpoint", config.model.checkpoint, {"train": "*"}),
        ("inherit.source", section.source, {"train": section.train, "blocks": section.blocks}),
    ]
    tables = list[WeightTable]()
    for key, source, options in starts:
        if source is None:
            continue
        try:
            tables.append(inherit(model, source, **options))
        except (InputError, FileNotFoundError) as error:
            raise ConfigError(f"{key}: {str(error).removeprefix('source: ')}") from None
    for name in SCALARS:  # a value of the config replaces that of the weights
        value = config.model.options.get(f"init_{name}")
        if value is not None:
            nn.init.constant_(getattr(model, name), value)
    return tables


def sources_of(config: Config) -> list[str]:
    """Returns the names of the weights from which a run starts."""
    inherited = config.inherit.source or []
    inherited = [inherited] if isinstance(inherited, str) else inherited
    return [*filter(None, [config.model.checkpoint, *inherited])]


def prepare_model(
    model: Any,
    frozen: list[str],
    lines: list[str],
    config: Config,
    device: torch.device,
) -> PreparedModel:
    """Prepares what `load_model` returned for training, in place, as the config says.

    device: of the training, where the model need not be yet.
    """
    lines = list(lines)
    if config.model.freeze_norms:
        freeze_norms(model)
    if config.model.grad_checkpointing:
        checkpoint_blocks(model)
    try:
        crop = crop_texts(model)
    except InputError as error:
        crop = None
        lines.append(f"texts      computed at full length: {error}")
    if runs_channels_last(model, config, device):
        model.visual.to(memory_format=torch.channels_last)
        lines.append("layout     the image tower is in channels_last (run.channels_last)")
    folded = fold_frozen(model)
    if folded:
        lines.append(f"frozen     folded, in channels_last: {', '.join(folded)}")
    prepared = PreparedModel(model, frozen, folded, crop, lines)
    if config.run.compile:
        compile_towers(prepared)
    return prepared


def checkpoint_blocks(model: Any) -> list[SimplifiedBlock]:
    """Makes a model's blocks compute again in backward; returns the simplified ones.

    Where a model has simplified blocks, its other ones keep what they keep.
    """
    blocks = [module for module in model.modules() if isinstance(module, SimplifiedBlock)]
    for block in blocks:
        block.recompute = True
    if not blocks:
        model.set_grad_checkpointing()
    return blocks


def runs_channels_last(model: Any, config: Config, device: torch.device) -> bool:
    """Whether the image tower runs in channels_last on a device.

    "auto": on a GPU, if it has several convolutions, each without groups or depthwise. timm's
    authors measured training on an RTX 3090: ResNet-50 826 images/s, 1,218 in channels_last;
    MobileNetV3 2,167 and 2,732; but RegNetY, whose convolutions have groups, 697 and 497.
    """
    if config.run.channels_last != "auto":
        return config.run.channels_last
    convolutions = [module for module in model.visual.modules() if isinstance(module, nn.Conv2d)]
    grouped = any(1 < conv.groups < conv.in_channels for conv in convolutions)
    return device.type == "cuda" and len(convolutions) > 1 and not grouped


def compiled_modules(prepared: PreparedModel) -> list[Any]:
    """Returns the modules that `compile_towers` compiles: towers' trunks and folded copies.

    Not the token embedding, whose compiled gradient adds in an order that changes.
    """
    text = getattr(prepared.model, "text", prepared.model)
    return [prepared.model.visual, text.transformer, *prepared.folded.values()]


def compile_towers(prepared: PreparedModel) -> None:
    """Makes the towers run by torch.compile from their next call on.

    Texts are cropped to one length, a multiple of 16, since a tower is compiled anew for each size;
    sizes are fixed, since what dynamo makes dynamic depends on earlier compilations.
    """
    if prepared.crop is not None:
        prepared.crop.multiple, prepared.crop.groups = 16, 1
    for module in compiled_modules(prepared):
        module.compile(dynamic=False)


def make_state(
    config: Config,
    device: torch.device,
    precision: str,
    checkpoint: Mapping[str, Any] | None = None,
    *,
    loaded: tuple[Any, list[str], list[str]] | None = None,
    prepared: PreparedModel | None = None,
    teacher: Mapping[str, Any] | None = None,
) -> State:
    """Makes the state of a run that begins, or that continues from `checkpoint`.

    checkpoint: the content of a last.pt; None for a run that begins.
    loaded: what `load_model` returned; prepared: what `prepare_model` returned of it, with all
    tensors on `device`. They are made here if None. The model is put into training mode, and its
    batch norms may become synchronised ones.
    teacher: name, width and logit_scale of the teacher, by default read from the data if a term
    needs a teacher.

    Raises InputError, FileNotFoundError; CheckpointError if the checkpoint does not fit the model.
    """
    if prepared is None:
        prepared = prepare_model(*(loaded or load_model(config, checkpoint)), config, device)
        for module in (prepared.model, *prepared.folded.values()):
            module.to(device)
    model = prepared.model
    transform = image_transform(config.model.model_dump(), train=True, augment=config.data.augment)
    if teacher is None and config.loss.needs_teacher:
        teacher = data.teacher_stamp(config.data.sidecars)
    _check_views(config, transform, teacher)
    share_norms(model, device)
    with device:
        objective = Objective(config.loss, config.run.steps or 1, width_of(config), teacher)
    state = State(
        config=config,
        device=device,
        precision=precision,
        prepared=prepared,
        transform=transform,
        channels_last=_has_channels_last(prepared),
        teacher=teacher,
        objective=objective,
        optimizer=make_optimizer(model, objective.loss, config),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        ema=Average(model, config.optim.ema) if config.optim.ema is not None else None,
        lines=[*prepared.lines],
    )
    if checkpoint:
        _continue_from(checkpoint, state)
    model.train()
    return state


def _has_channels_last(prepared: PreparedModel) -> bool:
    """Whether a weight of the image tower, or of its folded copies, is in channels_last."""
    modules = [prepared.model.visual]
    modules += [copy for name, copy in prepared.folded.items() if name.startswith("visual")]
    weights = [weight for module in modules for weight in module.parameters()]
    return any(weight.ndim == 4 and not weight.is_contiguous() for weight in weights)


def _continue_from(checkpoint: Mapping[str, Any], state: State) -> None:
    """Loads a checkpoint into `state`: all but the model's weights, which it has already."""
    for name, item in state.stateful().items():
        if name != "model":
            _load(item, checkpoint.get(name))
    state.step, state.data = checkpoint["step"], checkpoint["data"]
    state.lines.append(f"resume     continuing from step {state.step}")


def _load(item: Any, saved: Any) -> None:
    """Loads a state dict into an object; raises CheckpointError if it does not fit."""
    try:
        if isinstance(item, torch.optim.Optimizer):
            load_optimizer(item, saved)
        else:
            item.load_state_dict(saved)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        expected = f"the state of this model's {type(item).__name__}"
        raise CheckpointError(f"checkpoint: expected {expected}, got {load_error(error)}") from None


def _check_views(config: Config, transform: Any, teacher: Mapping[str, Any] | None) -> None:
    """Raises ConfigError if data.augment is not the augmentation of the teacher's views."""
    if teacher is None or config.data.augment is None:
        return
    views = teacher.get("views")
    if not views:
        return
    if augmentation(transform) != views["augment"]:
        raise ConfigError(
            f"data.augment: expected null, or {views['augment']!r} as in the views that the "
            f"teacher {teacher['name']} saw and training replays, got {augmentation(transform)!r}"
        )


def width_of(config: Config) -> int:
    """Returns D, the width of the model's features."""
    width: Any = config.model.options.get("embed_dim")
    return width or models.spec_of(config.model.name).config["embed_dim"]


def load_start(
    checkpoint: str | Path, state: Mapping[str, Any]
) -> tuple[str, Mapping[str, Tensor]]:
    """Returns the sources of the weights with which a run began, and these as a state dict.

    checkpoint: names the run in errors. state: its content, by `read_checkpoint`. With LoRA it has
    the start; else model.checkpoint and inherit.source of its config are read again, and compared
    with its checksums. Positional embeddings are not compared.
    Raises InputError, in one line, if a source is gone or has other weights, or if tensors of the
    model are in none of them.
    """
    config = from_dict(dict(state["config"]))
    names = ", ".join(sources_of(config))
    if config.model.lora:
        return names, {plain_name(name): weight for name, weight in state["start"].items()}
    expected = f"blend: expected the weights from which {checkpoint} started, got "
    try:
        model = build_model(config.model.model_dump(), config.loss.base)
        tables = take_start(model, config)
    except (InputError, OSError) as error:
        raise InputError(f"{expected}{first_line(error)}") from None
    start = model.state_dict()
    new = [name for name in start if name not in SCALARS]
    for table in tables:
        new = [name for name in new if table.status(name) == "new"]
    if new or config.inherit.blocks is not None:
        why = "whose blocks start by inherit.blocks"
        if new:
            why = f"in which {len(new)} tensors, {new[0]} first, are new"
        raise InputError(
            "blend: expected a run that starts from trained weights of its own architecture, got "
            f"{checkpoint}, {why}"
        )
    former = state.get("start")
    if not former:  # of an earlier version
        return f"{names}, not known to be unchanged", start
    for name, checksum in checksums(start).items():
        # they may be interpolated, whose last bits depend on the CPU
        is_position = name.endswith(("positional_embedding", "pos_embed"))
        if former[name] != checksum and not is_position:
            files = ", ".join(source for table in tables for source in table.sources)
            raise InputError(f"{expected}others in {files}, of {name} first")
    return names, start
