"""The typed configuration of a run: a YAML file, changed by `--set key=value`, and checked.

Every field has a type, a description and, if possible, a default; `describe()` prints them as a YAML file with comments.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from simplclip.common import plugins
from simplclip.common.errors import InputError
from simplclip.train.config_data import DataConfig, MicroBatch, Section, Source


class ConfigError(InputError):
    """A configuration is not valid; the message names the key."""


# Keys that earlier versions had: the default, and other values with which a config means today what it meant then. A stored
# config names every key, and loads if those that are gone have these values.
GONE: dict[str, tuple[Any, ...]] = {
    "data.decode": ("cpu",),
    "loss.block_weight": (0.0,),
    "loss.negatives": ("all",),
    "loss.feature_distance": ("mse",),
    "loss.learn_interactive_scale": (False,),
    "loss.scratch_mib": (64,),
    "run.threads": (None,),
    "run.keep": (1,),
    "run.tensorboard": (True, False),
}
# Those of them that never changed the result: a checkpoint may have any value.
_GONE_FREE = ("loss.scratch_mib", "run.")


class ModelConfig(Section):
    name: str = Field("siclip-tiny", description="name of the model, see `simplclip.models.create`")
    options: dict[str, Any] = Field({}, description="keyword arguments for `simplclip.models.create`")
    freeze_norms: bool = Field(
        False, description="keep batch norms in eval mode; gradient caching needs this unless they are inherited"
    )
    recompute: bool = Field(
        False, description="blocks keep only their input and are computed again in backward: less memory, a quarter more time"
    )

    @property
    def image_size(self) -> int | None:
        """The image size in `options`, or None for the model's default."""
        return self.options.get("vision_cfg", {}).get("image_size")


class InheritConfig(Section):
    source: str | list[str] | None = Field(
        None, description="weights to inherit: a checkpoint, an open_clip tag NAME/TAG, efficientnet-lite0, minilm, or a list"
    )
    train: list[str] = Field([], description="patterns of inherited tensors that are trained; the others are frozen")
    blocks: Literal["average", "first"] | None = Field(
        None,
        description="start simplified blocks from the source's blocks in their places; a matrix that they share is the "
        "average of theirs, or the first one's. null: simplified blocks start from random weights",
    )

    @model_validator(mode="after")
    def _has_source(self) -> InheritConfig:
        if self.blocks and self.source is None:
            raise ValueError(f"expected `source` beside blocks = {self.blocks}, got none")
        return self


class Schedule(Section):
    """A weight by step: linear from `value` at `start` to `to` at `end`; 0 before `start` and from `until` on."""

    value: float = Field(ge=0)
    to: float | None = Field(None, ge=0)
    start: int = Field(0, ge=0)
    end: int | None = Field(None, ge=1)
    until: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        for name in ("end", "until"):
            last = getattr(self, name)
            if last is not None and last <= self.start:
                raise ValueError(f"expected {name} after start = {self.start}, got {last}")
        if self.end is not None and self.to is None:
            raise ValueError("expected `to`, the weight reached at `end`, got none")
        return self

    def at(self, step: int, steps: int) -> float:
        """The weight at `step` (from 0) of a run of `steps` steps; without `end`, `to` is reached at the last step."""
        if step < self.start or (self.until is not None and step >= self.until):
            return 0.0
        if self.to is None:
            return self.value
        end = self.end or min(self.until or steps, steps) - 1
        done = min(1.0, (step - self.start) / max(1, end - self.start))
        return self.value + (self.to - self.value) * done


Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | Annotated[Schedule, Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, dict | Schedule) else "number"),
]
# a loss's name of its term -> the weight's name, here and in WIKDLoss and ClipPMLoss
TERMS = {
    "contrastive_loss": "contrastive_weight",
    "distill_loss": "relational_weight",
    "interactive_loss": "interactive_weight",
    "feature_loss": "feature_weight",
    "pair_matching_loss": "pm_weight",
}
_SCHEDULE = "a number, or a schedule {value, to, start, end, until}"


class LossConfig(Section):
    base: Literal["contrastive", "sigmoid"] = Field(
        "contrastive",
        description="contrastive: softmax over the batch (CLIP); sigmoid: logistic loss of every pair (SigLIP), whose scale "
        "starts at 10 and whose bias at -10 unless model.options has init_logit_scale and init_logit_bias",
    )
    contrastive_weight: Weight = Field(1.0, description=f"weight of the base; each weight is {_SCHEDULE}")
    pm_weight: Weight = Field(0.0, description="weight of the pair matching loss")
    plane: Literal["scalar", "hadamard"] = Field("scalar", description="hyperplane of the pair matching loss")
    feature_weight: Weight = Field(0.0, description="weight of feature distillation: distance to the teacher's features")
    relational_weight: Weight = Field(0.0, description="weight of relational distillation: KL to the teacher's softmax")
    interactive_weight: Weight = Field(
        0.0, description="weight of interactive distillation: student against teacher across modalities"
    )
    interactive: Literal["infonce", "kl"] = Field("infonce", description="form of interactive distillation")
    projection: bool = Field(False, description="learn projections to the teacher's width if it differs")

    @property
    def weights(self) -> dict[str, Schedule]:
        """The schedules by the loss's names of its terms, without those that are always 0."""
        fields = {f"{self.base}_loss" if t == "contrastive_loss" else t: getattr(self, f) for t, f in TERMS.items()}
        schedules = {term: w if isinstance(w, Schedule) else Schedule(value=w) for term, w in fields.items()}
        return {term: schedule for term, schedule in schedules.items() if schedule.value or schedule.to}

    @property
    def needs_teacher(self) -> bool:
        return bool({"distill_loss", "interactive_loss", "feature_loss"} & self.weights.keys())


ADAMW: dict[str, Any] = {"betas": [0.9, 0.98], "eps": 1e-6}


class OptimConfig(Section):
    lr: float = Field(1e-3, gt=0, description="learning rate at the end of the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of matrices; norms, biases, gains and scalars have none")
    options: dict[str, Any] = Field(
        ADAMW, description="arguments of AdamW: betas, eps, amsgrad; one left out has its default"
    )
    grad_clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; null disables clipping")

    @field_validator("options")
    @classmethod
    def _of_adamw(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options with the defaults of those that are left out."""
        whole = ADAMW | options

        def number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        betas = whole["betas"] if isinstance(whole["betas"], list) and len(whole["betas"]) == 2 else [None]
        valid = whole.keys() <= {*ADAMW, "amsgrad"} and all(number(beta) and 0 <= beta < 1 for beta in betas)
        valid = valid and number(whole["eps"]) and 0 < whole["eps"] < math.inf
        if not valid or not isinstance(whole.get("amsgrad", False), bool):
            what = "betas (two numbers from 0 to below 1), eps (a number above 0) and amsgrad (true or false)"
            raise ValueError(f"expected {what} alone, got {_shown(options)}")
        return whole


class EvalConfig(Section):
    splits: dict[str, str | list[str]] = Field({}, description="held-out data by name: shards as in data.train")
    every: int = Field(0, ge=0, description="steps between evaluations of the splits during training; 0: never")
    batch_size: int = Field(256, ge=1, description="images or captions encoded at a time")
    templates: list[str] = Field(
        ["a photo of {}"], min_length=1, description="phrases around a label in zero-shot classification"
    )


class RunConfig(Section):
    out: str = Field(description="folder of the run: config.yaml, metrics.csv, curves.png, last.pt")
    steps: int = Field(1000, ge=1, description="number of optimizer steps")
    seed: int = Field(0, ge=0, description="seed of weights, data order, drawn captions and augmentation")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "auto", description="autocast; auto: bf16 if the hardware has it natively, else fp32"
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1 ...; auto: a GPU if there is one")
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.csv")
    print_every: int = Field(50, ge=1, description="steps between printed lines if the output is not a terminal")
    save_every: int = Field(500, ge=1, description="steps between writes of last.pt; the last step is always saved")


class Config(Section):
    model: ModelConfig = Field(ModelConfig(), description="the model to train")
    inherit: InheritConfig = Field(InheritConfig(), description="weights that are copied and frozen")
    data: DataConfig = Field(description="the training data")
    loss: LossConfig = Field(
        LossConfig(),
        description="the base, pair matching, and the terms that need a teacher, whose features are in the shards",
    )
    optim: OptimConfig = Field(OptimConfig(), description="AdamW, linear warm-up, cosine")
    eval: EvalConfig = Field(EvalConfig(), description="held-out data")
    run: RunConfig = Field(description="the run itself")

    @model_validator(mode="after")
    def _whole(self) -> Config:
        size, micro = self.data.batch_size, self.data.micro_batch
        if micro != "auto" and size % self.data.images_at_a_time:
            key = "data.micro_batch.image" if isinstance(micro, MicroBatch) else "data.micro_batch"
            raise ValueError(f"{key}: expected a divisor of data.batch_size = {size}, got {self.data.images_at_a_time}")
        schedules = self.loss.weights.values()
        turns = {0, self.run.steps - 1, *(step for s in schedules for step in (s.start, s.end, s.until) if step is not None)}
        for step in sorted(step for step in turns if step < self.run.steps):
            if not any(schedule.at(step, self.run.steps) for schedule in schedules):
                raise ValueError(f"loss: expected at least one weight above 0 at every step, got none at step {step}")
        return self

    def to_dict(self) -> dict[str, Any]:
        """A plain dict with all defaults."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


NODES = 100_000  # most values of a YAML document


class _Loader(yaml.SafeLoader):
    """Reads `1e-3`, a string in YAML 1.1, as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def builtin() -> dict[str, Any]:
    """The built-in configs by name, from configs/ of this package and of those that are registered as simplclip.configs."""
    packages = ["simplclip.train", *(entry.value for entry in plugins.entries("configs").values())]
    folders = [resources.files(package) / "configs" for package in packages]
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def load(source: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a config.

    source: path of a YAML file, or the name of a built-in config.
    overrides: "key=value" with dotted keys; values are parsed as YAML. Raises ConfigError, which names the key.
    """
    known = builtin()
    file = Path(source) if Path(source).is_file() else known.get(str(source))
    if file is None:
        near = difflib.get_close_matches(str(source), names := sorted(known), 1, 0.5)
        got = f"{str(source)!r}; did you mean {near[0]!r}?" if near else repr(str(source))
        raise ConfigError(f"config: expected a YAML file or one of the built-in {', '.join(names)}, got {got}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: expected a YAML file in UTF-8, got {error}") from None
    values = parse_yaml(text, str(source))
    if not isinstance(values, dict | None):
        raise ConfigError(f"{source}: expected a mapping of sections, got {_shown(values)}")
    values = values or {}
    for item in overrides:
        _override(values, item)
    return from_dict(values)


def from_dict(values: dict[str, Any], *, stored: bool = False) -> Config:
    """Check plain values. stored: those of a checkpoint, in which a gone key that never changed the result is ignored."""
    try:
        return Config.model_validate(_moved(_without_gone(values, stored)))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(e) for e in error.errors()))) from None


def _without_gone(values: dict[str, Any], stored: bool) -> dict[str, Any]:
    """The values without keys of GONE. Raises ConfigError for one that has another value than those there."""
    for key, same in GONE.items():
        section, _, name = key.partition(".")
        settings = values.get(section)
        if isinstance(settings, dict) and name in settings:
            if (value := settings[name]) not in same and not (stored and key.startswith(_GONE_FREE)):
                raise ConfigError(f"{key}: this setting is gone: expected none, or its default {same[0]!r}, got {value!r}")
            values = values | {section: {k: v for k, v in settings.items() if k != name}}
    return values


def _moved(values: dict[str, Any]) -> dict[str, Any]:
    """The values with optim.beta1, beta2 and eps, which earlier versions had, in optim.options."""
    optim = values.get("optim")
    if not isinstance(optim, dict) or "options" in optim or not optim.keys() & {"beta1", "beta2", "eps"}:
        return values
    rest, (beta1, beta2) = dict(optim), ADAMW["betas"]
    betas = [rest.pop("beta1", beta1), rest.pop("beta2", beta2)]
    return values | {"optim": rest | {"options": {"betas": betas, "eps": rest.pop("eps", ADAMW["eps"])}}}


def keys(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key, sections included, with its pydantic field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if _is_section(field.annotation):
            found |= keys(field.annotation, f"{prefix}{name}.")
    return found


def describe() -> str:
    """All fields as a YAML file with defaults; types and descriptions are in comments."""
    lines = []
    for key, field in keys().items():
        indent, name = "  " * key.count("."), key.rpartition(".")[2]
        if _is_section(field.annotation):
            lines.append(f"\n{indent}{name}:  # {field.description}")
            continue
        default, need = "", ", required"
        if not field.is_required():
            default, need = " " + yaml.safe_dump(field.default, default_flow_style=True).removesuffix("...\n").strip(), ""
        lines.append(f"{indent}{name + ':' + default:<28} # {_type_name(field.annotation)}{need}: {field.description}")
    return "\n".join(lines).lstrip() + "\n"


def parse_yaml(text: str, where: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if _size(node, {}) > NODES:
            raise ConfigError(f"{where}: expected at most {NODES:,} values, got more, by aliases that repeat others")
        return None if node is None else loader.construct_document(node)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of 5,000 digits, a date without a month
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """The values of a document with aliases written out; infinite for one that contains itself."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = NODES + 1  # while it is counted
        parts = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _override(values: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set: expected key=value (e.g. optim.lr=1e-3), got {item!r}")
    node = values
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {'.'.join(parts[: depth + 1])} is not a section, it is {_shown(node)}")
    node[parts[-1]] = parse_yaml(text, f"--set {key}")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


_TAGS = ("number", "schedule", "towers", "train-pattern", "train-source", "train-list")
# for these pydantic's message is clearer than the type
_LIMITS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short", "finite_number"}


def _explain(error: Any) -> str:
    known, kind = keys(), error["type"]
    path = [str(part) for part in error["loc"] if part not in _TAGS]
    key = ".".join(path)
    if kind == "value_error":  # raised by a validator in this file
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        sources = {f"{key.rpartition('.')[0]}.{name}": None for name in Source.model_fields}
        return f"{key}: unknown key{_nearest(key, sources if key.startswith('data.train.') else known)}"
    if kind == "invalid_key":
        return f"{key}: expected a string for a key, got {_shown(error['input'])}"
    # pydantic appends the tried member of a union; the key is the longest known prefix, or a path inside a free dict
    field_key = next(k for n in range(len(path), 0, -1) if (k := ".".join(path[:n])) in known)
    field = known[field_key]
    if field_key == "data.train" and (inside := [n for n in range(2, len(path)) if path[n] in Source.model_fields]):
        key = field_key = ".".join(path[: inside[0] + 1])
        field = Source.model_fields[path[inside[0]]]
    if kind == "missing":
        about = f" ({field.description})" if field.description else ""
        hint = f"; expected {_type_name(field.annotation)}{about}" if key == field_key else ""
        return f"{key}: missing{hint}"
    where = key if isinstance(field.annotation, types.GenericAlias) else field_key
    expected = error["msg"].lower().replace("input should be ", "") if kind in _LIMITS else _type_name(field.annotation)
    return f"{where}: expected {expected}, got {_shown(error['input'])}"


def _nearest(key: str, known: dict[str, Any]) -> str:
    section, _, name = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    # of several keys of one name, the one in the section that was named
    by_name = {k.rpartition(".")[2]: k for k in reversed([*siblings, *known])}
    near = [name] if name in by_name else difflib.get_close_matches(key, known, 1, 0.75)
    near = near or difflib.get_close_matches(name, by_name, 1, 0.6)
    if near:
        return f"; did you mean {by_name.get(near[0], near[0])}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is list:
        return "a list of " + " or ".join(f"{name.removeprefix('a ')}s" for name in _type_name(arguments[0]).split(" or "))
    if origin is dict or _is_section(annotation):
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
