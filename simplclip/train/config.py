"""The configuration of a run: sections with every key, its type, meaning and default; read from
YAML, changed by `--set`.

`describe()` prints every key as a YAML file with comments. Nothing here needs torch, so that a
wrong key is answered at once.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from simplclip.common.errors import InputError

DEVICES = r"^(auto|cpu|cuda(:\d+)?)$"


class ConfigError(InputError):
    """Error for a configuration that is not valid; the message names the key."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def setting(default: Any, description: str, **limits: Any) -> Any:
    """Returns a field of a section; `...` as its default: it is required."""
    return Field(default, description=description, **limits)


class ModelConfig(Section):
    name: str = setting("siclip-tiny", "name of the model, see `simplclip.models.create`")
    options: dict[str, Any] = setting({}, "keyword arguments for `simplclip.models.create`")
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
    recompute: bool = setting(
        False,
        "blocks keep only their input and are computed again in backward: a quarter more time",
    )

    @model_validator(mode="after")
    def _one_shape(self) -> ModelConfig:
        for section, name in (("vision_cfg", "image_size"), ("text_cfg", "context_length")):
            options = self.options.get(section) or {}
            if not isinstance(options, dict):
                raise ValueError(f"options.{section}: expected a mapping, got {_shown(options)}")
            inside = options.get(name)
            if None not in (inside, value := getattr(self, name)) and inside != value:
                raise ValueError(
                    f"{name}: expected one value, got {value} and options.{section}.{name} = "
                    f"{inside}"
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


Count = Annotated[int, Field(ge=1)]


class LoaderOptions(TypedDict, total=False):
    on_error: Literal["skip", "stop"]
    max_bytes: Count
    shuffle_buffer: Count


class DataConfig(Section):
    train: str | dict[str, Any] | list[str | dict[str, Any]] = setting(
        ...,
        "the pairs: tars by path, glob, brace pattern, URL or pipe:COMMAND; {shards, weight}: each "
        "sample weight times an epoch; or a list of these. A table, a JSON or a folder is packed "
        "into the run's folder first",
    )
    samples: int | None = setting(
        None, "samples of an epoch, for run.epochs; null: as meta.json beside the shards says", ge=1
    )
    batch_size: int = setting(256, "images per step", ge=1)
    micro_batch: Count | Literal["auto"] | None = setting(
        None,
        "images, with their captions, at a time (gradient caching: the gradient is that of the "
        "whole batch); null: all; auto: as many as fit, see `simplclip plan`",
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
    """A weight by step: linear from `value` at `start` to `to` at `end`; 0 before `start` and from
    `until` on.
    """

    value: float = Field(ge=0)
    to: float | None = Field(None, ge=0)
    start: int = Field(0, ge=0)
    end: int | None = None
    until: int | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        for name, last in (("end", self.end), ("until", self.until)):
            if last is not None and last <= self.start:
                raise ValueError(f"expected {name} after start = {self.start}, got {last}")
        if self.end is not None and self.to is None:
            raise ValueError("expected `to`, the weight reached at `end`, got none")
        return self

    def at(self, step: int, steps: int) -> float:
        """The weight at `step` (from 0) of a run of `steps` steps; without `end`, `to` is reached
        at the last step.
        """
        if step < self.start or (self.until is not None and step >= self.until):
            return 0.0
        if self.to is None:
            return self.value
        end = self.end or min(self.until or steps, steps) - 1
        done = min(1.0, (step - self.start) / max(1, end - self.start))
        return self.value + (self.to - self.value) * done


# Of a value that may also be a section: an error is about the form that was given.
PLAIN_OR_SECTION = Discriminator(
    lambda value: "section" if isinstance(value, dict | Section) else "plain"
)
Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("plain")] | Annotated[Schedule, Tag("section")],
    PLAIN_OR_SECTION,
]


class LossConfig(Section):
    base: Literal["contrastive", "sigmoid"] = setting(
        "contrastive",
        "contrastive: softmax over the batch (CLIP); sigmoid: logistic loss of every pair "
        "(SigLIP), whose scale starts at 10 and whose bias at -10 unless model.options has "
        "init_logit_scale and init_logit_bias",
    )
    contrastive_weight: Weight = setting(
        1.0, "of the base; each weight is a number, or a schedule {value, to, start, end, until}"
    )
    pm_weight: Weight = setting(0.0, "weight of the pair matching loss")
    plane: Literal["scalar", "hadamard"] = setting("scalar", "hyperplane of the pair matching loss")
    feature_weight: Weight = setting(
        0.0, "weight of feature distillation: distance to the teacher's features"
    )
    relational_weight: Weight = setting(
        0.0, "weight of relational distillation: KL to the teacher's softmax"
    )
    interactive_weight: Weight = setting(
        0.0, "weight of interactive distillation: student against teacher across modalities"
    )
    interactive: Literal["infonce", "kl"] = setting("infonce", "form of interactive distillation")

    @property
    def weights(self) -> dict[str, Schedule]:
        """The schedule of each term by the term's name in the loss, without the schedules that are
        always 0.
        """
        terms = {
            f"{self.base}_loss": self.contrastive_weight,
            "relational_loss": self.relational_weight,
        }
        terms |= {"interactive_loss": self.interactive_weight, "feature_loss": self.feature_weight}
        terms |= {"pair_matching_loss": self.pm_weight}
        schedules = {
            term: w if isinstance(w, Schedule) else Schedule(value=w) for term, w in terms.items()
        }
        return {
            term: schedule for term, schedule in schedules.items() if schedule.value or schedule.to
        }

    @property
    def needs_teacher(self) -> bool:
        return bool({"relational_loss", "interactive_loss", "feature_loss"} & self.weights.keys())


# arguments of torch.optim.AdamW, unless optim.options replaces them
ADAMW = {"betas": [0.9, 0.98], "eps": 1e-6}


class OptimConfig(Section):
    lr: float = setting(1e-3, "learning rate at the end of the warm-up", gt=0)
    warmup: int = setting(100, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(
        0.1, "weight decay of matrices; norms, biases, gains and scalars have none", ge=0
    )
    options: Annotated[dict[str, Any], AfterValidator(lambda options: ADAMW | options)] = setting(
        ADAMW, "further arguments of torch.optim.AdamW"
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
    templates: list[str] = setting(
        ["a photo of {}"], "phrases around a label in zero-shot classification", min_length=1
    )

    @model_validator(mode="after")
    def _one_name(self) -> EvalConfig:
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
        None, "passes over data.train in place of steps, see data.samples", gt=0
    )
    seed: int = setting(
        0, "seed of weights, data order, drawn captions and augmentation", ge=0, lt=2**62
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = setting(
        "auto", "of autocast; auto: bf16 if in hardware"
    )
    device: str = setting(
        "auto", "cpu, cuda, cuda:1 ...; auto: a GPU if there is one", pattern=DEVICES
    )
    compile: bool | Literal["auto"] = setting(
        "auto",
        "compile the towers by torch.compile: minutes at the start, then faster steps; auto: on a "
        "GPU, after ten steps, if more than ten minutes are left",
    )
    channels_last: bool | Literal["auto"] = setting(
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
        500, "steps between writes of last.pt, which the last step and ten minutes write too", ge=1
    )
    timeout_minutes: float = setting(
        10.0,
        "of several ranks: the time after which one that does not answer ends all",
        gt=0,
        le=10_080,
    )

    @model_validator(mode="before")
    @classmethod
    def _no_default(cls, values: Any) -> Any:
        """Leaves steps without a default if epochs are given."""
        return (
            {"steps": None} | values
            if isinstance(values, dict) and values.get("epochs") is not None
            else values
        )

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"expected one of steps and epochs, got steps = {self.steps} and epochs = "
                f"{self.epochs}"
            )
        return self


class Config(Section):
    model: ModelConfig = setting(ModelConfig(), "the model to train")
    inherit: InheritConfig = setting(InheritConfig(), "weights that are copied and frozen")
    data: DataConfig = setting(..., "the training data")
    loss: LossConfig = setting(
        LossConfig(), "the base, pair matching, and terms that need a teacher's features"
    )
    optim: OptimConfig = setting(OptimConfig(), "AdamW, linear warm-up, a cosine down to 0")
    eval: EvalConfig = setting(EvalConfig(), "held-out data")
    run: RunConfig = setting(..., "the run itself")

    @model_validator(mode="after")
    def _whole(self) -> Config:
        size, micro = self.data.batch_size, self.data.micro_batch
        if micro != "auto" and size % self.data.images_at_a_time:
            raise ValueError(
                f"data.micro_batch: expected a divisor of data.batch_size = {size}, got {micro}"
            )
        if self.run.steps is None:
            return self  # the config is checked again when run.steps is known
        schedules = self.loss.weights.values()
        turns = {
            turn for s in schedules for turn in (s.start, s.end, s.until) if turn is not None
        } | {0, self.run.steps}
        turns |= {turn - 1 for turn in turns}  # where a weight may end at 0
        for step in sorted(turn for turn in turns if 0 <= turn < self.run.steps):
            if not any(schedule.at(step, self.run.steps) for schedule in schedules):
                raise ValueError(
                    "loss: expected at least one weight above 0 at every step, got none at step "
                    f"{step}"
                )
        return self

    @property
    def held_out(self) -> dict[str, Any]:
        """The split of eval.hold_out by its name, as `data.held_out` takes it; none if nothing is
        held out.
        """
        share, sidecars = self.eval.hold_out, self.data.sidecars
        return (
            {"held_out": {"shards": self.data.train, "hold_out": share, "sidecars": sidecars}}
            if share
            else {}
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns a plain dict with all defaults."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def replaced(self, **sections: dict[str, Any]) -> Config:
        """Returns the config with some values of some sections replaced, checked as a whole."""
        values = self.to_dict()
        return from_dict(
            values | {name: values[name] | changes for name, changes in sections.items()}
        )


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-3`, a string in YAML 1.1, as a number, and refuses aliases,
    which can repeat for ever.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected no aliases (*name)")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str | bytes, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # e.g. of !!bool, or a date
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def builtin() -> dict[str, Path]:
    """Returns the files of the built-in configs by name."""
    return {file.stem: file for file in Path(__file__).with_name("configs").glob("*.yaml")}


def load(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a config.

    source: path of a YAML file, or the name of a built-in config.
    overrides: "key=value" with dotted keys; values are parsed as YAML. Raises ConfigError, which
    names the key.
    """
    return from_dict(overridden(read(source), overrides))


def read(source: str | Path) -> dict[str, Any]:
    """Returns the values of a YAML file or a built-in config, unchecked."""
    names = builtin()
    file = Path(source) if Path(source).is_file() else names.get(str(source))
    if file is None:
        near = difflib.get_close_matches(
            str(source), [*names, *map(str, Path(source).parent.glob("*.yaml"))], 1
        )
        got = f"got {str(source)!r}" + (f"; did you mean {near[0]}?" if near else "")
        raise ConfigError(
            f"config: expected a YAML file or one of the built-in {', '.join(sorted(names))}, {got}"
        )
    values = parse_yaml(file.read_bytes(), str(source)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, got {_shown(values)}")
    return values


def overridden(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Changes `values` by "key=value" items, and returns them."""
    for item in overrides:
        _override(values, item)
    return values


def from_dict(values: dict[str, Any]) -> Config:
    """Makes a config of plain values and checks it."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_line(e) for e in error.errors()))) from None


def _override(values: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set: expected key=value (e.g. optim.lr=1e-3), got {item!r}")
    node = values
    for part in parts[:-1]:
        node[part] = node.get(part) or {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: expected a section {part}, got {_shown(node)}")
    node[parts[-1]] = parse_yaml(text, f"--set {key}")
    # it replaces the other one
    if parts in (["run", "steps"], ["run", "epochs"]) and node[parts[-1]] is not None:
        node.pop("epochs" if parts[-1] == "steps" else "steps", None)


def check_out(out: Path, resume: bool) -> None:
    """Raises ConfigError for a folder with a run that is not to be continued."""
    if not resume and any(
        (out / name).exists() for name in ("last.pt", "best.pt", "config.yaml", "metrics.csv")
    ):
        advice = "continue that run by --resume, or --set run.out=FOLDER"
        raise ConfigError(f"run.out: expected a folder without a run, got {out}; {advice}")


def keys() -> dict[str, Any]:
    """Returns every dotted key, sections included, with its pydantic field."""
    fields: dict[str, Any] = {}
    for section, field in Config.model_fields.items():
        inside = field.annotation.model_fields  # type: ignore[union-attr]
        fields |= {section: field} | {f"{section}.{name}": inner for name, inner in inside.items()}
    return fields


def describe() -> str:
    """Returns all fields as a YAML file with defaults; descriptions are in comments."""
    lines = []
    for key, field in keys().items():
        section, _, name = key.rpartition(".")
        if not section:
            lines.append(f"\n{key}:  # {field.description}")
            continue
        default, about = "", f"required: {field.description}"
        if not field.is_required():
            default = (
                " "
                + yaml.safe_dump(field.default, default_flow_style=True)
                .removesuffix("...\n")
                .strip()
            )
            about = field.description
        if get_origin(field.annotation) is Literal:
            about = f"{', '.join(get_args(field.annotation))}: {about}"
        lines.append(f"  {name + ':' + default:<28} # {about}")
    return "\n".join(lines).lstrip() + "\n"


WORDS = {  # of pydantic -> of our errors
    "Input should be ": "expected ",
    f"String should match pattern '{DEVICES}'": "expected auto, cpu, cuda or cuda:N",
    "a valid dictionary": "a mapping, as {NAME: VALUE}",
    "a valid list": "a list, as [VALUE]",
}


def _line(error: Any) -> str:
    """Returns an error of pydantic as one line; for an unknown key, with the nearest key."""
    parts = [str(part) for part in error["loc"] if part not in ("plain", "section", "[key]", "str")]
    key = ".".join(part for part in parts if not part.startswith(("dict[", "list[")))
    if error["type"] == "value_error":  # raised by a validator above
        return f"{key}: {error['ctx']['error']}".removeprefix(": ")
    if error["type"] == "extra_forbidden":
        names = {name.rpartition(".")[2]: name for name in keys()}
        near = difflib.get_close_matches(key, keys(), 1, 0.8) or difflib.get_close_matches(
            key.rpartition(".")[2], names, 1
        )
        return f"{key}: unknown key" + (
            f"; did you mean {names.get(near[0], near[0])}?" if near else ""
        )
    if error["type"] == "missing":
        return (
            f"{key}: missing; expected {keys()[key].description}"
            if key in keys()
            else f"{key}: missing"
        )
    expected = error["msg"]
    for words, replacement in WORDS.items():
        expected = expected.replace(words, replacement)
    return f"{key}: {expected}, got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
