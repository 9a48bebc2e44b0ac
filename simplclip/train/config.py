"""The configuration of a run: a YAML file, changed by `--set key=value`, and checked against `settings`.

`describe()` prints every key with its default and meaning as a YAML file with comments.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ValidationError

from simplclip.common.errors import InputError
from simplclip.train.settings import Config, Section, shown


class ConfigError(InputError):
    """Error for a configuration that is not valid; the message names the key."""


NODES = 100_000  # the most values that a YAML document may have
ANY = object()  # any value: the setting changes no result
# Settings of earlier versions that a checkpoint or a run's config.yaml may still have, with the value that is now built in.
REMOVED = {
    "model.sync_norms": ANY,
    "data.on_error": "skip",
    "data.max_pixels": None,
    "data.max_bytes": 256 << 20,
    "loss.projection": ANY,
    "eval.batch_size": ANY,
    "optim.min_lr": 0.0,
    "optim.options.amsgrad": False,
    "run.print_every": ANY,
    "run.save_minutes": ANY,
}


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-3`, a string in YAML 1.1, as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def builtin() -> dict[str, Any]:
    """Returns the built-in configs by name, from configs/ of this package."""
    files = (resources.files("simplclip.train") / "configs").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}


def load(source: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Reads a config.

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
        raise ConfigError(f"{source}: expected a mapping of sections, got {shown(values)}")
    values = values or {}
    if file.name == "config.yaml":
        _drop_gone(values)
    for item in overrides:
        _override(values, item)
    return from_dict(values)


def from_dict(values: dict[str, Any], *, stored: bool = False) -> Config:
    """Makes a config of plain values and checks it. stored: the values are from a checkpoint, maybe of an earlier version."""
    if stored:
        _drop_gone(values)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        told = "\n".join(dict.fromkeys(_explain(e) for e in error.errors()))
        older = " (a checkpoint of a version with this setting goes on with that version alone)"
        raise ConfigError(told + older * (stored and "unknown key" in told)) from None


def _drop_gone(values: Any) -> None:
    """Removes settings of earlier versions, except those whose value differs from the value that is now built in."""
    for key, value in REMOVED.items():
        section, (*outer, name) = values, key.split(".")
        for part in outer:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and (value is ANY or section.get(name) == value):
            section.pop(name, None)


def keys(model: Any = Config, prefix: str = "") -> dict[str, Any]:
    """Returns every dotted key, sections included, with its pydantic field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if _is_section(field.annotation):
            found |= keys(field.annotation, f"{prefix}{name}.")
    return found


def describe() -> str:
    """Returns all fields as a YAML file with defaults; types and descriptions are in comments."""
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
    try:
        node = yaml.compose(text, _Loader)
        if _size(node, {}) <= NODES:
            return None if node is None else _Loader("").construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. a number of 5,000 digits, a date without a month
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    raise ConfigError(f"{where}: expected at most {NODES:,} values, got more, by aliases that repeat others")


def _size(node: Any, known: dict[int, int]) -> int:
    """Counts the values of a document with aliases written out; a document that contains itself has more than NODES."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = NODES + 1  # while the node is counted, since it may contain itself
        parts = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


_LENGTHS = {"run.steps": "epochs", "run.epochs": "steps"}  # key of --set -> the other key, which it removes from the config


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
            raise ConfigError(f"--set {key}: {'.'.join(parts[: depth + 1])} is not a section, it is {shown(node)}")
    node[parts[-1]] = parse_yaml(text, f"--set {key}")
    if (other := _LENGTHS.get(key.strip())) and node[parts[-1]] is not None:
        node.pop(other, None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


_TAGS = ("number", "schedule", "towers")
# kinds of errors for which pydantic's message is clearer than the type
_LIMITS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short", "too_long", "finite_number"}


def _explain(error: Any) -> str:
    known, kind = keys(), error["type"]
    path = [str(part) for part in error["loc"] if part not in _TAGS]
    key = ".".join(path)
    if kind == "value_error":  # raised by a validator of the settings
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key, known)}"
    if kind == "invalid_key":
        return f"{key}: expected a string for a key, got {shown(error['input'])}"
    # pydantic appends the tried member of a union; the key is the longest known prefix, or a path inside a free dict
    field_key = next(k for n in range(len(path), 0, -1) if (k := ".".join(path[:n])) in known)
    field = known[field_key]
    if kind == "missing":
        hint = f"; expected {_type_name(field.annotation)} ({field.description})" if key == field_key else ""
        return f"{key}: missing{hint}"
    where = key if isinstance(field.annotation, types.GenericAlias) else field_key
    limit = error["msg"].lower().replace("input should be ", "").replace("list should have", "a list of")
    expected = limit if kind in _LIMITS else _type_name(field.annotation)
    return f"{where}: expected {expected}, got {shown(error['input'])}"


def _nearest(key: str, known: dict[str, Any]) -> str:
    section, _, name = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    # if several keys have this name, the key in the named section wins
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
