"""The configuration of a run: read from YAML, changed by `--set`, checked.

sections.py has its keys; `describe()` prints them as a YAML file with comments.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from simplclip.common.errors import InputError
from simplclip.common.nearest import nearest
from simplclip.models.naming import BASE, BEST, LAST, NAMES, configs
from simplclip.train.sections import (
    DEVICES,
    DataConfig,
    EvalConfig,
    InheritConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Schedule,
    Section,
    setting,
    shown,
)


class ConfigError(InputError):
    """Error for a configuration that is not valid; the message names the key."""


class Config(Section):
    model: ModelConfig = setting(ModelConfig(), "the model to train")
    inherit: InheritConfig = setting(InheritConfig(), "weights that are copied and frozen")
    data: DataConfig = setting(..., "the training data")
    loss: LossConfig = setting(
        LossConfig(), "the base, pair matching, and terms that need a teacher's features"
    )
    optim: OptimConfig = setting(OptimConfig(), "the optimizer, linear warm-up, a cosine down to 0")
    eval: EvalConfig = setting(EvalConfig(), "held-out data")
    run: RunConfig = setting(..., "the run itself")

    @model_validator(mode="after")
    def _check_micro_batch(self) -> Config:
        """Raises ValueError if data.micro_batch is a number that does not divide batch_size."""
        size, micro = self.data.batch_size, self.data.micro_batch
        if micro != "auto" and size % self.data.images_at_a_time:
            raise ValueError(
                f"data.micro_batch: expected a divisor of data.batch_size = {size}, got {micro}"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Config:
        """Raises ValueError if no term of the loss has a weight above 0 at some step of the run."""
        steps = self.run.steps
        if steps is None:
            return self  # the config is checked again when run.steps is known
        schedules = self.loss.weights.values()
        for step in corners_of(schedules, steps):
            if not any(schedule.at(step, steps) for schedule in schedules):
                raise ValueError(
                    "loss: expected at least one weight above 0 at every step, got none at step "
                    f"{step}"
                )
        return self

    @property
    def held_out(self) -> dict[str, Any]:
        """The split of eval.hold_out by its name, as `data.held_out` takes it; {} without one."""
        if not self.eval.hold_out:
            return {}
        divided = {
            "shards": self.data.train,
            "hold_out": self.eval.hold_out,
            "sidecars": self.data.sidecars,
        }
        return {"held_out": divided}

    def to_dict(self) -> dict[str, Any]:
        """Returns the values of all sections, with all defaults, as plain JSON values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Returns the text of a YAML file with all values, defaults included."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def replaced(self, **sections: Mapping[str, Any]) -> Config:
        """Returns a new config, checked as a whole, with some values of sections replaced."""
        values = self.to_dict()
        for name, replacements in sections.items():
            values[name] |= replacements
        return from_dict(values)


def corners_of(schedules: Iterable[Schedule], steps: int) -> list[int]:
    """Returns the steps, in order, between which the weights of all schedules are linear."""
    corners = {0, steps}
    for schedule in schedules:
        corners |= {schedule.start, schedule.end or 0, schedule.until or 0}
    corners |= {corner - 1 for corner in corners}  # where a weight may end at 0
    return sorted(corner for corner in corners if 0 <= corner < steps)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-3` as a number, and refuses aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Builds the next node as SafeLoader does, but raises YAMLError for an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("expected no aliases (*name)")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a dict as SafeLoader does, but raises YAMLError for a key that comes twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"expected each key once, got {key.value!r} in line {lines[key.value]} and in "
                    f"line {line}"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes a text such as `1e-3`, which `_Loader` would read as a number."""


for yaml_class in (_Loader, _Dumper):
    yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Returns the value of a YAML text; `source` names it in a ConfigError."""
    try:
        return yaml.load(text, _Loader)
    # e.g. of !!bool, or a date
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {reason}") from None


def load(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Returns a config, read as `read` does, changed and checked; ConfigError names the key.

    overrides: "key=value" with dotted keys; values are parsed as YAML.
    """
    return from_dict(override(read(source), overrides))


def read(source: str | Path) -> dict[str, Any]:
    """Returns the values of a YAML file or a built-in config by section, unchecked."""
    path = Path(source)
    text = path.read_bytes() if path.is_file() else configs().get(str(source))
    if text is None:
        raise _no_config(str(source))
    values = parse_yaml(text, str(source)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of sections, got {shown(values)}")
    return values


def _no_config(source: str) -> ConfigError:
    """Returns the error for a source that is neither a file nor a built-in config."""
    names = configs()
    files = [str(file) for file in Path(source).parent.glob("*.yaml")]
    advice = ""
    if source in NAMES:
        advice = f", a model; a file with model: {{name: {source}}} and its data can train it"
    elif near := difflib.get_close_matches(source, [*names, *files], 1):
        advice = f"; did you mean {near[0]}?"
    return ConfigError(
        f"config: expected a YAML file or one of the built-in {', '.join(names)}, got "
        f"{source!r}{advice}"
    )


def override(values: dict[str, Any], overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Changes the sections of a config in place by "key=value" items, as optim.lr=1e-3."""
    for assignment in overrides:
        _set_value(values, assignment)
    return values


def _set_value(values: dict[str, Any], override: str) -> None:
    """Sets one "key=value" in `values`, in place; run.steps and run.epochs replace each other."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set: expected key=value (e.g. optim.lr=1e-3), got {override!r}")
    *sections, name = parts
    mapping = values
    for section in sections:
        mapping[section] = mapping.get(section) or {}
        mapping = mapping[section]
        if not isinstance(mapping, dict):
            raise ConfigError(f"--set {key}: expected a section {section}, got {shown(mapping)}")
    value = mapping[name] = parse_yaml(text, f"--set {key}")
    # one of run.steps and run.epochs replaces the other
    if sections == ["run"] and value is not None:
        if name == "steps":
            mapping.pop("epochs", None)
        elif name == "epochs":
            mapping.pop("steps", None)


def from_dict(values: dict[str, Any]) -> Config:
    """Makes a config of plain values by section; ConfigError has a line for each wrong key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(line for detail in error.errors() for line in _lines(detail, values))
        raise ConfigError("\n".join(lines)) from None


def check_out(out: Path, resume: bool) -> None:
    """Raises ConfigError if the folder `out` has files of a run and `resume` is false."""
    if resume:
        return
    files = (LAST, BEST, BASE, "config.yaml", "metrics.csv")
    if any((out / name).exists() for name in files):
        advice = "continue that run by --resume, or --set run.out=FOLDER"
        raise ConfigError(f"run.out: expected a folder without a run, got {out}; {advice}")


def check_new_run(config: Config) -> None:
    """Raises ConfigError for settings with which a run that begins would learn or do nothing."""
    inherit, held_out = config.inherit, config.eval
    # the other terms compare pairs; without others they are 0, or make all pairs match
    if config.data.batch_size < 2 and config.loss.compares_pairs:
        raise ConfigError(
            "data.batch_size: expected at least 2, since images are compared with each other, got 1"
        )
    if inherit.source is None and (inherit.train or inherit.blocks):
        raise ConfigError(
            "inherit.source: expected weights, for inherit.train and inherit.blocks, got none"
        )
    if config.model.lora and config.model.checkpoint is None and inherit.source is None:
        raise ConfigError(
            "model.checkpoint: expected weights, which model.lora keeps, got none, and no "
            "inherit.source"
        )
    if held_out.every and not held_out.splits and not held_out.hold_out:
        raise ConfigError(
            f"eval.splits: expected held-out data, for eval.every = {held_out.every}, got none; "
            "eval.hold_out=0.1 holds out a tenth of data.train"
        )


def keys() -> dict[str, FieldInfo]:
    """Returns every dotted key, sections included, with its pydantic field."""
    fields: dict[str, FieldInfo] = {}
    for section, field in Config.model_fields.items():
        fields[section] = field
        for name, inner in field.annotation.model_fields.items():  # type: ignore[union-attr]
            fields[f"{section}.{name}"] = inner
    return fields


END_OF_DOCUMENT = "...\n"  # which yaml writes after a scalar
TERMINAL = textwrap.TextWrapper(  # the comment goes on below its beginning
    80, subsequent_indent=f"{'':<31}# ", break_long_words=False, break_on_hyphens=False
)


def describe() -> str:
    """Returns the text of a YAML file of all keys with defaults; descriptions are in comments.

    Its lines have at most 80 columns.
    """
    lines = []
    for key, field in keys().items():
        section, _, name = key.rpartition(".")
        if section:
            lines.append(TERMINAL.fill(_described(name, field)))
        else:
            lines += ["", TERMINAL.fill(f"{key}:  # {field.description}")]
    return "\n".join(lines).lstrip() + "\n"


def _described(name: str, field: FieldInfo) -> str:
    """Returns the line of a key within its section, with its default and description."""
    if field.is_required():
        assignment = f"{name}:"
        meaning = f"required: {field.description}"
    else:
        default = yaml.dump(field.default, Dumper=_Dumper, default_flow_style=True)
        assignment = f"{name}: {default.removesuffix(END_OF_DOCUMENT).strip()}"
        meaning = field.description or ""
    if get_origin(field.annotation) is Literal:
        meaning = f"{', '.join(get_args(field.annotation))}: {meaning}"
    return f"  {assignment:<28} # {meaning}"


WORDS = {  # of pydantic -> of our errors
    "Input should be ": "expected ",
    f"String should match pattern '{DEVICES}'": "expected auto, cpu, cuda or cuda:N",
    "a valid dictionary": "a mapping, as {NAME: VALUE}",
    "a valid list": "a list, as [VALUE]",
}


def _key(error: ErrorDetails, values: dict[str, Any]) -> str:
    """Returns the dotted key of an error in `values`."""
    parts = []
    inside: Any = values
    for part in error["loc"]:
        if isinstance(inside, list):
            inside = dict(enumerate(inside))
        # others are pydantic's names of the forms that a value may have
        if isinstance(inside, dict) and part in inside:
            parts.append(part)
            inside = inside[part]
    if error["type"] == "missing":
        parts.append(error["loc"][-1])
    return ".".join(map(str, parts))


def _lines(error: ErrorDetails, values: dict[str, Any]) -> list[str]:
    """Returns an error as lines "section.key: expected ..., got ...", several for a section.

    values: of the config, where the error is.
    """
    key = _key(error, values)
    if error["type"] == "value_error":  # raised by a validator of a section
        return [f"{key}: {error['ctx']['error']}".removeprefix(": ")]
    if error["type"] == "extra_forbidden":
        unknown = [key]
        if "." not in key and isinstance(error["input"], dict):
            unknown = [f"{key}.{name}" for name in error["input"]] or unknown
        return [f"{name}: unknown key{_suggestion(name)}" for name in unknown]
    if error["type"] == "missing":
        section = Config.model_fields.get(key)
        if section is None:
            description = f"; expected {keys()[key].description}" if key in keys() else ""
            return [f"{key}: missing{description}"]
        fields = section.annotation.model_fields  # type: ignore[union-attr]
        return [
            f"{key}.{name}: missing; expected {field.description}"
            for name, field in fields.items()
            if field.is_required()
        ]
    expected = error["msg"]
    for words, replacement in WORDS.items():
        expected = expected.replace(words, replacement)
    return [f"{key}: {expected}, got {shown(error['input'])}"]


def meanings() -> dict[str, str]:
    """Returns every dotted key, without sections, with its line of `describe`; "" for options."""
    lines = {}
    for key, field in keys().items():
        _, dot, name = key.partition(".")
        if dot:
            lines[key] = _described(name, field)
            inner = getattr(field.annotation, "__annotations__", ())
            lines |= dict.fromkeys((f"{key}.{option}" for option in inner), "")
    return lines


def _suggestion(key: str) -> str:
    """Returns the end of an error about an unknown key: the nearest key, or what lists all."""
    known = meanings()
    if key.count(".") > 1:  # within a value, where other words are meant
        known = dict.fromkeys(known, "")
    near = nearest(key, known)
    return f"; did you mean {near}?" if near else "; simplclip train --help-config lists all"
