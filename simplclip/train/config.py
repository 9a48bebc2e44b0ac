"""The configuration of a run: read from YAML, changed by `--set`, checked.

sections.py has its keys; `describe()` prints them as a YAML file with comments.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError, model_validator
from pydantic.fields import FieldInfo

from simplclip.common.errors import InputError
from simplclip.models.naming import BASE, BEST, LAST, NAMES, configs
from simplclip.train.sections import (
    DataConfig,
    EvalConfig,
    InheritConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Section,
    corners_of,
    setting,
)


class ConfigError(InputError):
    """Error for a configuration that is not valid; the message names the key."""


class Config(Section):
    model: ModelConfig = setting(ModelConfig(), "the model to train")
    inherit: InheritConfig = setting(InheritConfig(), "weights that are copied and frozen")
    data: DataConfig = setting({}, "the training data")
    loss: LossConfig = setting(
        LossConfig(), "the base, pair matching, and terms that need a teacher's features"
    )
    optim: OptimConfig = setting(OptimConfig(), "the optimizer, linear warm-up, a cosine down to 0")
    eval: EvalConfig = setting(EvalConfig(), "held-out data")
    run: RunConfig = setting({}, "the run itself")

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
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def replaced(self, **sections: Mapping[str, Any]) -> Config:
        """Returns a new config, checked as a whole, with some values of sections replaced."""
        values = self.to_dict()
        for name, replacements in sections.items():
            values[name] |= replacements
        return from_dict(values)


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Returns the value of a YAML text; `source` names it in a ConfigError."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # e.g. of a date
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
        raise ConfigError(f"{source}: expected a mapping of sections, got {values!r:.60}")
    return values


def _no_config(source: str) -> ConfigError:
    """Returns the error for a source that is neither a file nor a built-in config."""
    names = configs()
    files = [str(file) for file in Path(source).parent.glob("*.yaml")]
    advice = ""
    if source in NAMES:
        advice = f", a model; a file with model: {{name: {source}}} and its data can train it"
    elif near := get_close_matches(source, [*names, *files], 1):
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
            raise ConfigError(f"--set {key}: expected a section {section}, got {mapping!r:.60}")
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
        raise ConfigError("\n".join(_lines(error, values))) from None


def _lines(error: ValidationError, values: dict[str, Any]) -> Iterator[str]:
    """Yields a line "section.key: WHAT IS EXPECTED, got VALUE" for each wrong key of `values`."""
    reasons: dict[str, dict[str, None]] = {}  # several for a value of which no form fits
    for detail in error.errors():
        key = _key(detail["loc"], values)
        if detail["type"] == "value_error":  # raised by a validator of a section
            reason = str(detail["ctx"]["error"])
        elif detail["type"] == "missing":
            key = ".".join(map(str, detail["loc"]))
            field = keys().get(key)
            reason = f"missing; expected {field.description}" if field else "missing"
        elif detail["type"] == "extra_forbidden":
            reason = f"unknown key; {_nearest_key(key)}"
        else:
            reason = f"{detail['msg']}, got {detail['input']!r:.60}"
        reasons.setdefault(key, {})[reason] = None
    for key, found in reasons.items():
        yield f"{key}: {'; or: '.join(found)}".removeprefix(": ")


def _key(location: tuple[int | str, ...], values: Any) -> str:
    """Returns the dotted key of an error, without pydantic's names of the forms of a value."""
    parts = []
    for part in location:
        if isinstance(values, list):
            values = dict(enumerate(values))
        if isinstance(values, dict) and part in values:
            parts.append(str(part))
            values = values[part]
    return ".".join(parts)


def _nearest_key(key: str) -> str:
    """Returns the end of an error about an unknown key: the nearest key, or what lists all."""
    section, _, asked = key.rpartition(".")
    for among in (section, ""):
        names = {known.rpartition(".")[2]: known for known in keys() if known.startswith(among)}
        if near := get_close_matches(asked, names, 1):
            return f"did you mean {names[near[0]]}?"
    return "simplclip train --help-config lists all"


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
            assignment = f"{name}: {default_of(field)}".strip()
            lines.append(TERMINAL.fill(f"  {assignment:<28} # {meaning_of(field)}"))
        else:
            lines += ["", TERMINAL.fill(f"{key}:  # {field.description}")]
    return "\n".join(lines).lstrip() + "\n"


def default_of(field: FieldInfo) -> str:
    """Returns the YAML of a key's default, "" for one that is required."""
    if field.is_required():
        return ""
    text = yaml.safe_dump(field.default, default_flow_style=True)
    return text.removesuffix("...\n").strip()  # which yaml writes after a scalar


def meaning_of(field: FieldInfo) -> str:
    """Returns a key's description, after the words that it may have."""
    if field.is_required():
        return f"required: {field.description}"
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if words and all(isinstance(word, str) for word in words):
        return f"{', '.join(words)}: {field.description}"
    return field.description or ""
