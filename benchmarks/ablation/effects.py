"""Effects files: the settings that an ablation compares, and the training runs that this needs.

    steps: 150                                  # run.steps of every run
    set: [data.batch_size=128]                  # settings of every run
    data: {data/noisy: python examples/emoji/build.py --swap 0.3 --out data/noisy}   # folders, and commands that make them
    prepare:                                    # runs whose last checkpoint settings name by {pretrained}
      pretrained: ["model.options={simplified: false}", run.steps=400]   # run.seed=0: one run for all seeds
    effects:
      - name: pair matching beside contrastive
        group: pair matching
        base: [loss.pm_weight=0]                # without `base`, the variant is only reported
        variant: [loss.pm_weight=1]
        set: ["data.train=data/noisy/train-*.tar"]    # settings of both; optional, as all keys below
        steps: 400
        seeds: 5
        needs: [data/noisy]

Settings are those of `--set`; lists may be nested, so that YAML's anchors can name parts of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from simplclip.train import config
from simplclip.train.config import ConfigError, Section

SIDES = ("base", "variant")
RESULT = "result.json"  # in the folder of a finished run
_PREPARED = re.compile(r"\{(\w+)\}")


def _flat(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [one for part in value for one in (_flat(part) if isinstance(part, list) else [part])]


Settings = Annotated[list[str], BeforeValidator(_flat)]


class Effect(Section):
    name: str = Field(min_length=1)
    group: str = Field(min_length=1)
    variant: Settings
    base: Settings | None = None
    set: Settings = []
    steps: int | None = Field(None, ge=1)
    seeds: int | None = Field(None, ge=1)
    needs: list[str] = []

    def sides(self) -> list[str]:
        return [side for side in SIDES if getattr(self, side) is not None]


class Effects(Section):
    effects: list[Effect] = Field(min_length=1)
    set: Settings = []
    steps: int | None = Field(None, ge=1)
    seeds: int | None = Field(None, ge=1)
    data: dict[str, str] = {}
    prepare: dict[str, Settings] = {}


@dataclass(frozen=True)
class Trial:
    """One training run. Runs of equal settings have equal digests, by which their folder is found."""

    title: str  # of the effect that first asked for it
    settings: tuple[str, ...]  # with the names of prepared runs in braces
    seed: int
    digest: str
    prepared: Mapping[str, Trial]  # by name: the runs whose checkpoints this run needs
    keep: bool = False  # whether another run needs this run's checkpoint

    def folder(self, out: Path) -> Path:
        """Returns the existing folder with this digest, whatever its title; else OUT/NAME."""
        return next((path for path in sorted(out.glob(f"*-{self.digest}")) if path.is_dir()), out / self.name)

    @property
    def name(self) -> str:
        return f"{self.title}-s{self.seed}-{self.digest}"

    def overrides(self, out: Path) -> list[str]:
        """Returns the settings, with paths in place of names in braces, and the seed and the folder of the run."""
        paths = {name: str(one.folder(out) / "last.pt") for name, one in self.prepared.items()}
        told = [_filled(item, paths) for item in self.settings]
        return [f"run.seed={self.seed}", *told, f"run.out={json.dumps(str(self.folder(out)))}"]


def load(source: str | Path) -> Effects:
    """Reads an effects file by its path, or a file of this folder by its name. Raises ConfigError, which names the place."""
    file = Path(source) if Path(source).is_file() else Path(__file__).parent / f"{source}.yaml"
    if not file.is_file():
        raise ConfigError(f"effects: expected a YAML file, or emoji, got {source!s}")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))  # with aliases, which configs do not have
    except (yaml.YAMLError, ValueError) as error:
        raise config.ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping with `effects`, got {type(values).__name__}")
    values = {key: value for key, value in values.items() if not key.startswith(".")}  # places for anchors
    try:
        found = Effects.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    names = [effect.name for effect in found.effects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{source}: expected different names of effects, got {twice[0]!r} twice")
    if unknown := sorted({need for effect in found.effects for need in effect.needs} - found.data.keys()):
        raise ConfigError(
            f"{source}: data: expected the command that makes each folder of `needs`, got none for {unknown[0]}"
        )
    return found


def trials(effects: Effects, effect: Effect, seed: int, source: str, overrides: Sequence[str] = ()) -> dict[str, Trial]:
    """Returns the runs of an effect for one seed, based on the config `source`: "base", if there is one, and "variant"."""
    made = {}
    for side in effect.sides():
        settings = _settings(effects, [*effect.set, *getattr(effect, side), *overrides], effect.steps)
        made[side] = _trial(effects, source, settings, seed, f"{effect.name}, {side}")
    return made


def missing(effects: Effects, chosen: Sequence[Effect]) -> Iterator[str]:
    """Yields a line for each folder that a chosen effect needs and that does not exist. The line says how to make it."""
    for folder in dict.fromkeys(folder for effect in chosen for folder in effect.needs):
        if not Path(folder).exists():
            yield f"data: expected the folder {folder}, which does not exist; to make it: {effects.data[folder]}"


def _settings(effects: Effects, own: Sequence[str], steps: int | None = None) -> list[str]:
    """Returns the settings of a run: those of the file, the number of steps, and its `own`."""
    steps = steps or effects.steps
    return [*effects.set, *([f"run.steps={steps}"] if steps else []), *own]


def _trial(effects: Effects, source: str, settings: Sequence[str], seed: int, title: str, keep: bool = False) -> Trial:
    names = {name for item in settings for name in _PREPARED.findall(item)} & effects.prepare.keys()
    prepared = {
        name: _trial(effects, source, _settings(effects, effects.prepare[name]), seed, f"prepare {name}", keep=True)
        for name in sorted(names)
    }
    told = [_filled(item, {name: one.digest for name, one in prepared.items()}) for item in settings]
    try:
        values = config.load(source, [f"run.seed={seed}", *told, "run.out=."])
    except ConfigError as error:
        raise ConfigError(f"{title}: {error}") from None
    if not values.eval.splits:
        raise ConfigError("eval.splits: expected held-out data, got none")
    # Without defaults, so that a new key of the config does not change the digests of finished runs.
    text = json.dumps(values.model_dump(mode="json", exclude_defaults=True), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Trial(re.sub(r"[^\w.]+", "-", title), tuple(settings), seed, digest, prepared, keep)


def _filled(item: str, values: Mapping[str, str]) -> str:
    return _PREPARED.sub(lambda match: values.get(match[1], match[0]), item)
