"""The sections of a configuration: every key with its type, its meaning and its default.

config.py reads them. Nothing here needs torch, so that a wrong key is answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    model_serializer,
    model_validator,
)
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from simplclip.common.terms import BY_NAME, TEACHER_TERMS, TERMS

DEVICES = r"^(auto|cpu|cuda(:\d+)?)$"
Count = Annotated[int, Field(ge=1)]
# a value of free options; YAML reads 1e-3 as text, which is a number here
Option = Annotated[StrictBool | StrictInt | float | Any, Field(union_mode="left_to_right")]


class Section(BaseModel):
    """Base class of sections: unknown keys and values of other types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def setting(default: Any, description: str, **limits: Any) -> Any:
    """Returns a field of a section; description: for --help-config, limits: of pydantic's Field.

    default: `...` if the key is required.
    """
    return Field(default, description=description, validate_default=True, **limits)


class LoraConfig(Section):
    """LoRA: what `models.lora.add_lora` takes."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    towers: list[Literal["image", "text"]] = Field(["image", "text"], min_length=1)
    modules: list[str] = Field(["*"], min_length=1)


class ModelConfig(Section):
    name: str = setting("siclip-tiny", "name of the model, see `simplclip.models.create`")
    options: dict[str, Option] = setting({}, "keyword arguments for `simplclip.models.create`")
    checkpoint: str | None = setting(
        None,
        "trained weights to start from: a run, a checkpoint, an export, open_clip's NAME/TAG or a "
        "file; all that fit are loaded, positional embeddings interpolated, and all train. Read at "
        "the start of a run alone",
    )
    image_size: int | None = setting(None, "pixels of a side; null: the model's own", ge=1)
    context_length: int | None = setting(None, "tokens of a text; null: the model's own", ge=2)
    freeze_norms: bool = setting(
        False, "keep batch norms in eval mode; gradient caching needs it unless they are inherited"
    )
    grad_checkpointing: bool = setting(
        False,
        "gradient checkpointing: blocks keep only their input and are computed again in backward, "
        "for about a quarter more time",
    )
    lora: LoraConfig | None = setting(
        None,
        "LoRA: of the towers only adapters of linear layers, and inherit.train, train; "
        "{rank: 8, alpha: 16, dropout: 0, towers: [image, text], modules: ['*']}, layers by name",
    )

    @model_validator(mode="after")
    def _check_shape(self) -> ModelConfig:
        """Raises ValueError if image_size or context_length has another value in `options`."""
        for section, name in (("vision_cfg", "image_size"), ("text_cfg", "context_length")):
            size, options = getattr(self, name), self.options.get(section)
            if size is None or not isinstance(options, dict):
                continue
            other = options.get(name, size)
            if other != size:
                raise ValueError(
                    f"{name}: expected one value, got {size} and options.{section}.{name} = {other}"
                )
        return self


class InheritConfig(Section):
    source: str | list[str] | None = setting(
        None,
        "weights to inherit: a checkpoint, an open_clip tag NAME/TAG, efficientnet-lite0, minilm, "
        "or a list",
    )
    train: list[str] = setting(
        [], "patterns of inherited tensors that are trained; the others are frozen"
    )
    blocks: Literal["average", "first"] | None = setting(
        None,
        "start simplified blocks from the source's blocks in their places; a matrix that they "
        "share is the average of theirs, or the first one's. null: simplified blocks start from "
        "random weights",
    )


class LoaderOptions(TypedDict, total=False):
    on_error: Literal["skip", "stop"]
    max_bytes: Count
    shuffle_buffer: Count


class DataConfig(Section):
    train: str | dict[str, Any] | list[str | dict[str, Any]] = setting(
        ...,
        "the pairs: tars by path, glob, brace pattern, URL or pipe:COMMAND; {shards, weight}: each "
        "sample weight times an epoch; a list of these. A table, JSON or folder is packed first",
    )
    samples: int | None = setting(
        None, "samples of an epoch, for run.epochs; null: as meta.json beside the shards says", ge=1
    )
    batch_size: int = setting(256, "images per step", ge=1)
    micro_batch: Count | Literal["auto"] | None = setting(
        None,
        "images, with their captions, at a time (gradient caching: the gradient is that of the "
        "whole batch); null: all; auto: as many as fit, measured on a GPU, else predicted",
    )
    mean_tokens: float | None = setting(
        None,
        "tokens of a caption on average, with start and end, for `simplclip plan` and micro_batch "
        "auto, where texts are computed at their length; null: texts of full length",
        ge=2,
    )
    captions_per_image: int = setting(
        1, "captions drawn for each image in each step; each makes a pair", ge=1
    )
    workers: int = setting(
        4, "loader processes, on which the order depends; 0 reads in the training process", ge=0
    )
    sidecars: list[str] = setting(
        [], "folders of `simplclip teacher` and `caption`, whose files are joined to the samples"
    )
    augment: str | dict[str, Any] | None = setting(
        None,
        "image augmentation: affine, none, or fields of open_clip's AugmentationCfg; null: that of "
        "the views which the teacher saw, else the model's default",
    )
    options: LoaderOptions = setting(
        {}, "on_error, max_bytes and shuffle_buffer of `simplclip.data.Loader`"
    )

    @property
    def images_at_a_time(self) -> int:
        """Images of a micro-batch; "auto" must have been replaced by a number."""
        assert self.micro_batch != "auto"
        return min(self.micro_batch or self.batch_size, self.batch_size)


class Schedule(Section):
    """A weight by step: linear from `value` at `start` to `to` at `end`, then constant.

    It is 0 before `start` and from `until` on. A number is one that is constant.
    """

    value: float = Field(ge=0)
    to: float | None = Field(None, ge=0)
    start: int = Field(0, ge=0)
    end: int | None = None
    until: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, weight: Any) -> Any:
        """Returns the fields of a schedule that is written as a number."""
        return weight if isinstance(weight, dict) else {"value": weight}

    @model_serializer
    def _as_number(self) -> Any:
        """Returns the number of a constant weight, else the fields."""
        fields = dict(self)
        return self.value if fields == dict(Schedule(value=self.value)) else fields

    @model_validator(mode="after")
    def _check_order(self) -> Schedule:
        """Raises ValueError if `end` or `until` is not after `start`, or `end` has no `to`."""
        for name, last in (("end", self.end), ("until", self.until)):
            if last is not None and last <= self.start:
                raise ValueError(f"expected {name} after start = {self.start}, got {last}")
        if self.end is not None and self.to is None:
            raise ValueError("expected `to`, the weight reached at `end`, got none")
        return self

    @property
    def largest(self) -> float:
        """The larger one of the weights `value` and `to`."""
        return max(self.value, self.to or 0.0)

    def at(self, step: int, steps: int) -> float:
        """Returns the weight at `step` (from 0) of a run of `steps` steps; `value` without `to`.

        Without `end`, `to` is reached at the last step before `until` or the run's end.
        """
        if step < self.start or (self.until is not None and step >= self.until):
            return 0.0
        if self.to is None:
            return self.value
        end = self.end or min(self.until or steps, steps) - 1
        done = min(1.0, (step - self.start) / max(1, end - self.start))
        return self.value + (self.to - self.value) * done


def corners_of(schedules: Iterable[Schedule], steps: int) -> list[int]:
    """Returns the steps, in order, between which the weights of all schedules are linear."""
    corners = {0, steps}
    for schedule in schedules:
        corners |= {schedule.start, schedule.end or 0, schedule.until or 0}
    corners |= {corner - 1 for corner in corners}  # where a weight may end at 0
    return sorted(corner for corner in corners if 0 <= corner < steps)


class LossConfig(Section):
    """The base, and each term's weight and choice: the names are those of the table of terms."""

    base: Literal["contrastive", "sigmoid"] = setting(
        "contrastive",
        "contrastive: softmax over the batch (CLIP); sigmoid: logistic loss of every pair "
        "(SigLIP), whose scale starts at 10 and whose bias at -10 unless model.options has "
        "init_logit_scale and init_logit_bias",
    )
    contrastive_weight: Schedule = setting(
        1.0, "of the base; each weight is a number, or a schedule {value, to, start, end, until}"
    )
    pm_weight: Schedule = setting(0.0, "weight of the pair matching loss")
    feature_weight: Schedule = setting(
        0.0, "weight of feature distillation: distance to the teacher's features"
    )
    relational_weight: Schedule = setting(
        0.0, "weight of relational distillation: KL to the teacher's softmax"
    )
    interactive_weight: Schedule = setting(
        0.0, "weight of interactive distillation: student against teacher across modalities"
    )
    interactive: Literal["infonce", "kl"] = setting("infonce", "form of interactive distillation")

    @property
    def weights(self) -> dict[str, Schedule]:
        """The schedules by term, without those that are always 0."""
        terms = [term for term in TERMS if not term.is_base or term.name == self.base]
        schedules: dict[str, Schedule] = {term.name: getattr(self, term.weight) for term in terms}
        return {name: schedule for name, schedule in schedules.items() if schedule.largest}

    @property
    def needs_teacher(self) -> bool:
        """Whether a term with a weight above 0 at some step needs a teacher's features."""
        return not TEACHER_TERMS.isdisjoint(self.weights)

    @property
    def compares_pairs(self) -> bool:
        """Whether every term says nothing about a batch of one pair."""
        return all(BY_NAME[name].compares_pairs for name in self.weights)


class LayerDecay(Section):
    """A layer's rate by that of the layer after it, by tower; a number is that of both."""

    image: float = Field(1.0, gt=0, le=1)
    text: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, decay: Any) -> Any:
        """Returns the fields of a decay that is written as a number."""
        return decay if isinstance(decay, dict) else {"image": decay, "text": decay}


# options of adamw, unless optim.options replaces them
ADAMW = {"betas": [0.9, 0.98], "eps": 1e-6}


def _with_defaults(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """Returns optim.options; of adamw with those of `ADAMW` that they do not replace."""
    return ADAMW | options if info.data.get("name") == "adamw" else options


class OptimConfig(Section):
    name: str = setting(
        "adamw", "adamw: torch's; or another one of timm.optim.list_optimizers(), as lion or muon"
    )
    lr: float = setting(1e-3, "learning rate at the end of the warm-up", gt=0)
    layer_decay: LayerDecay | None = setting(
        None, "a layer's rate by that of the layer after it, e.g. 0.8 or {image: 0.8, text: 0.9}"
    )
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] = setting(
        {},
        "{PATTERN: FACTOR} of the rates of what a pattern matches, as in inherit.train; the last "
        "one counts, and 0 freezes",
    )
    warmup: int = setting(100, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(
        0.1, "weight decay of matrices; norms, biases, gains and scalars have none", ge=0
    )
    options: Annotated[dict[str, Option], AfterValidator(_with_defaults)] = setting(
        {},
        "further arguments of the optimizer; of adamw {betas: [0.9, 0.98], eps: 1e-6} and others",
    )
    ema: float | None = setting(
        None,
        "decay of the moving average of the weights to evaluate and export, e.g. 0.9999",
        gt=0,
        lt=1,
    )
    grad_clip: float | None = setting(
        1.0, "largest norm of the gradient; null disables clipping", gt=0
    )


class EvalConfig(Section):
    splits: dict[str, str | list[str]] = setting(
        {}, "held-out data by name: as in data.train, or as evaluate takes them"
    )
    hold_out: float = setting(
        0.0,
        "share of data.train, e.g. 0.1, that training skips and that is evaluated as the split "
        "held_out; samples of a group stay together",
        ge=0,
        lt=1,
    )
    every: int = setting(
        0, "steps between evaluations of the splits during training; 0: never", ge=0
    )
    templates: Annotated[list[str], Field(min_length=1)] = setting(
        ["a photo of {}"], "phrases around a label in zero-shot classification"
    )

    @model_validator(mode="after")
    def _check_split_names(self) -> EvalConfig:
        """Raises ValueError if one of `splits` has the name of the split of hold_out."""
        if self.hold_out and "held_out" in self.splits:
            raise ValueError(
                "splits: expected another name than held_out, which is that of eval.hold_out"
            )
        return self


class RunConfig(Section):
    out: Annotated[str, AfterValidator(os.path.expanduser)] = setting(
        ..., "folder of the run: config.yaml, metrics.csv, curves.png, last.pt, best.pt"
    )
    steps: int | None = setting(1000, "number of optimizer steps", ge=1)
    epochs: float | None = setting(
        None, "epochs of data.train in place of steps, see data.samples", gt=0
    )
    seed: int = setting(
        0, "seed of weights, data order, drawn captions and augmentation", ge=0, lt=2**62
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = setting(
        "auto", "of autocast; auto: bf16 if in hardware"
    )
    device: Annotated[str, Field(pattern=DEVICES)] = setting(
        "auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one"
    )
    compile: bool = setting(
        False,
        "compile the towers by torch.compile: minutes at the start, then faster steps on a GPU",
    )
    channels_last: Literal[True, False, "auto"] = setting(
        "auto",
        "layout of the image tower; auto: on a GPU, for convolutions that have no groups or are "
        "depthwise",
    )
    cudnn_benchmark: bool = setting(
        True, "let cuDNN time its algorithms on a GPU, since sizes are fixed"
    )
    keep_frozen: bool = setting(
        True,
        "gradient caching computes the frozen beginning of a tower once in a step and keeps its "
        "output, if all outputs take at most a tenth of the memory",
    )
    tensorboard: bool = setting(
        False, "also write scalars and pictures of evaluations for TensorBoard, in run.out"
    )
    log_every: int = setting(10, "steps between rows of metrics.csv", ge=1)
    save_every: int = setting(
        500,
        "steps between writes of last.pt; evaluations, the last step and ten minutes write it too",
        ge=1,
    )
    timeout_minutes: float = setting(
        10.0,
        "of several ranks: the time after which one that does not answer ends all",
        gt=0,
        le=10_080,
    )

    @model_validator(mode="before")
    @classmethod
    def _without_default_steps(cls, values: Any) -> Any:
        """Returns the values with steps set to None if epochs are given without steps."""
        if isinstance(values, dict) and values.get("epochs") is not None:
            return {"steps": None} | values
        return values

    @model_validator(mode="after")
    def _check_length(self) -> RunConfig:
        """Raises ValueError unless exactly one of steps and epochs is given."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"expected one of steps and epochs, got steps = {self.steps} and epochs = "
                f"{self.epochs}"
            )
        return self
