"""The model card of an export: README.md with what its run and its evaluations recorded.

Nothing in it is guessed: what was not recorded is said to be unknown, and the licences are the
user's to write.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import yaml
from torch import nn

from simplclip.common.errors import visible
from simplclip.common.files import differences, read_csv
from simplclip.data.errors import ShardError
from simplclip.data.read_meta import teacher_stamp
from simplclip.evaluation.figures import percent
from simplclip.evaluation.results import BLEND, Figure, Results, SplitResult
from simplclip.evaluation.retrieval import KS
from simplclip.models.naming import Form
from simplclip.train.config import Config, ConfigError, from_dict
from simplclip.train.setup import sources_of
from simplclip.version import __version__

RANKS = tuple(f"R@{k}" for k in KS)
SHOWN_SOURCES = 10  # names of a card; the others are counted
# settings that name files: the card says their last parts in its sentences
_PATHS = re.compile(
    r"data\.train|data\.sidecars|eval\.splits|run\.out|model\.checkpoint|inherit\.source"
)
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError)  # of files of figures

BLENDED = "These weights are {alpha} of the training's and 1 - {alpha} of its start, {start}."
TEMPLATE = """---
library_name: {library}
pipeline_tag: zero-shot-image-classification
# license: to be filled in by you, such as apache-2.0; see Licence below
---
# {name}

A CLIP model of {parameters:,} parameters, trained by simplclip.
It knows what its captions say, and may repeat what prejudice they hold.
{blend}
## Figures

{figures}

## Training data

{data}

## How it was made

{making}

## Licence

To be filled in by you:

- Model: (licence). {weights}
- Data: (licence of the images and of the captions). {sources}

## Use

{lines}
"""
UNMEASURED = """The weights had not been evaluated before the export: there are no held-out figures.
This command measures them; then remove this file, and export again with `--force`:

    {command}"""


def card(
    model: nn.Module,
    state: dict[str, Any],
    file: Path,
    lines: str,
    library: Form = "open_clip",
    blend: dict[str, Any] | None = None,
) -> str:
    """Returns a model card in Markdown, with figures found beside the checkpoint `file`.

    state: the checkpoint's content, as `load_model` returns it. lines: that load the export.
    library: which loads it. blend: as in export.json.
    """
    config: Config | None = None
    with suppress(ConfigError):  # of another version
        config = from_dict(state["config"])
    sources = names_of(config.data.train) if config else []
    starts = [_name(source) for source in sources_of(config)] if config else []
    weights = "It started from random weights."
    if starts or not config:
        weights = f"It started from {_listed(starts) if starts else 'weights that are unknown'}."
    return TEMPLATE.format(
        library=library,
        name=state["config"]["model"]["name"],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blend=BLENDED.format(**blend) + "\n" if blend else "",
        figures=_figures(state, file, config, blend),
        data="\n".join(f"- {line}" for line in _data(state, config, sources)),
        making="\n".join(_making(state, config)),
        weights=weights,
        sources=f"Sources: {_listed(sources) if sources else 'unknown'}.",
        lines=lines,
    )


def _figures(
    state: Mapping[str, Any], file: Path, config: Config | None, blend: dict[str, Any] | None
) -> str:
    """Returns the tables of held-out figures, or the sentence and command for a card without."""
    for found in (_evaluated, _in_training):
        with suppress(*_BROKEN):
            if parts := found(file, state["step"], blend):
                return "\n\n".join(parts)
    command = f"simplclip evaluate {shlex.quote(str(file))}"
    if blend:
        command += " --blend"
    if not config or not (config.eval.splits or config.eval.hold_out):
        command += " --data NAME=DATA"
    return UNMEASURED.format(command=visible(command))


def _evaluated(file: Path, step: int, blend: dict[str, Any] | None) -> list[str]:
    """Returns what `simplclip evaluate` found; [] if of another checkpoint."""
    folder = _folder(file)
    content = json.loads((folder / (BLEND if blend else "evaluation.json")).read_text("utf-8"))
    if blend:
        content |= {row["alpha"]: row for row in content["rows"]}[blend["alpha"]]
        if content["start"] != blend["start"]:
            return []
    result = Results.model_validate(content)
    if result.step != step or not result.checkpoint.endswith((file.name, folder.name)):
        return []
    recalls, accuracies = [], []
    for name, split in result.splits.items():
        if split.retrieval:
            for direction, figures in split.retrieval.directions.items():
                cells = name, direction.replace("_", " ")
                recalls.append(_row(*cells, *figures.values()))
        if of := split.zero_shot:
            cells = name, f"{len(of.classes):,}"
            accuracies.append(_row(*cells, of.top1, of.top5, of.mean_per_class))
    tables = _table(("data", "direction"), RANKS, recalls)
    tables += _table(("data", "classes"), ("top 1", "top 5", "mean per class"), accuracies)
    if not tables:
        return []
    by = f"by simplclip {result.versions['simplclip']} " if "simplclip" in result.versions else ""
    counts = "; ".join(f"{name}: {_counts(split)}" for name, split in result.splits.items())
    return [f"Measured {by}in {result.precision}. Held-out data: {counts}.", *tables]


def _in_training(file: Path, step: int, blend: dict[str, Any] | None) -> list[str]:
    """Returns what the run found at a step; it has evaluated no blend."""
    if blend:
        return []
    recalls = []
    for row in read_csv(_folder(file) / "evaluation.csv"):
        if int(row["step"]) == step:
            figures = [
                Figure(value=float(row[name]), chance=float(row[f"chance {name}"]))
                for name in RANKS
            ]
            recalls.append(_row(row["split"], row["direction"].replace("_", " "), *figures))
    tables = _table(("data", "direction"), RANKS, recalls)
    return ["Measured by the run itself, on held-out data.", *tables] if tables else []


def _folder(file: Path) -> Path:
    """Returns the folder of a run that is named by itself or by a file in it."""
    return file if file.is_dir() else file.parent


def _counts(split: SplitResult) -> str:
    """Returns how many images and captions a split has, in words."""
    return f"{split.images:,} images" + (f", {split.texts:,} captions" if split.texts else "")


def _table(names: tuple[str, ...], figures: tuple[str, ...], rows: list[str]) -> list[str]:
    """Returns a table in Markdown, as a list of one; [] without rows."""
    if not rows:
        return []
    head = " | ".join([*names, *(f"{name} (chance)" for name in figures)])
    line = "---|" * len(names) + "--:|" * len(figures)
    return ["\n".join([f"| {head} |", f"|{line}", *rows])]


def _row(*cells: str | Figure) -> str:
    """Returns a row in Markdown; of a figure the value, and its chance in brackets."""
    texts = [
        f"{percent(cell.value)} ({percent(cell.chance)})" if isinstance(cell, Figure) else cell
        for cell in cells
    ]
    return f"| {' | '.join(texts)} |"


def _data(state: Mapping[str, Any], config: Config | None, sources: list[str]) -> Iterator[str]:
    """Yields what a checkpoint says of the pairs that the model has seen."""
    images, step = state.get("images"), state["step"]
    if images:
        yield f"{images:,} images in an epoch"
    else:
        yield "The number of images was not recorded."
    if not config:
        return
    captions = config.data.captions_per_image
    of_each = "a caption" if captions == 1 else f"{captions} captions"
    pairs = step * config.data.batch_size * captions
    yield (
        f"{step:,} steps of {config.data.batch_size:,} images with {of_each} each: "
        f"{pairs:,} pairs were seen"
    )
    yield f"Sources: {_listed(sources)}"
    if config.data.sidecars:
        yield f"Stored beside them: {_listed(map(_name, config.data.sidecars))}"
    if config.loss.needs_teacher:
        with suppress(ShardError):
            name = teacher_stamp(config.data.sidecars)["name"]
            yield f"Teacher of a distillation: `{visible(name)}`"
    if config.eval.hold_out:
        yield f"Held out of them, not trained on: {percent(config.eval.hold_out)}"


def _making(state: Mapping[str, Any], config: Config | None) -> Iterator[str]:
    """Yields lines on versions and settings."""
    yield (
        f"Exported from step {state['step']:,} by simplclip {__version__} with torch "
        f"{torch.__version__}."
    )
    if not config:
        yield "Its settings are those of another version of simplclip."
        return
    required = {"data": {"train": config.data.train}, "run": {"out": config.run.out}}
    changes = differences(from_dict(required).to_dict(), config.to_dict())
    chosen = {key: new for key, (_, new) in changes.items() if not _PATHS.match(key)}
    if not chosen:
        yield "The settings of its training are the defaults."
        return
    yield "Settings of its training that differ from the defaults, without those of files:\n"
    text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
    yield from (f"    {line}" for line in text.splitlines())


def names_of(data: Any) -> list[str]:
    """Returns what a card calls the sources of a config's data.train, each once.

    Of shards that a run packed it is the folder's name, which is the source's.
    """
    if isinstance(data, Mapping):
        return names_of(data["shards"])
    if isinstance(data, str):
        return [_name(data)]
    return list(dict.fromkeys(name for part in data for name in names_of(part)))


def _name(source: str) -> str:
    """Returns the last two parts of a path or URL, so that no home, key or command is told."""
    if source.startswith("pipe:"):
        tars = re.findall(r"\S+\.tar\b", source)
        return _name(tars[-1]) if tars else "the output of a command"
    if source.startswith(("http://", "https://")):
        address = urlsplit(source)
        return visible(f"{address.hostname}{address.path}")
    parts = Path(source).parts
    if "shards" in parts[-3:-2]:
        return visible(parts[-2])
    return visible("/".join(part for part in parts[-2:] if part != "/"))


def _listed(names: Iterable[str]) -> str:
    """Returns names as code, in one line; of many the first ones and a count."""
    every = [f"`{name}`" for name in names]
    more = len(every) - SHOWN_SOURCES
    return ", ".join(every[:SHOWN_SOURCES]) + (f" and {more:,} more" if more > 0 else "")
