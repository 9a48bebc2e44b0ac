"""The model card of an export: README.md with what its run and its evaluation recorded.

Nothing in it is guessed, and the licences are the user's to write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from simplclip.common.errors import visible
from simplclip.common.files import differences
from simplclip.evaluation.figures import percent
from simplclip.evaluation.results import BLEND, Figure, Results
from simplclip.models.naming import Form
from simplclip.train.config import ConfigError, from_dict
from simplclip.train.setup import sources_of
from simplclip.version import __version__

TASK = "zero-shot-image-classification"
SHOWN_SOURCES = 10  # names of a card; the others are counted
# settings that name files: the card says their last parts in its sentences
_PATHS = re.compile(
    r"data\.train|data\.sidecars|eval\.splits|run\.out|model\.checkpoint|inherit\.source"
)
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError)  # of files of figures

BLENDED = "These weights are {alpha} of the training's and 1 - {alpha} of its start, {start}."
TEMPLATE = """---
{{ card_data }}
# license: to be filled in by you, such as apache-2.0
---
# {{ name }}

A CLIP model of {{ parameters }} parameters, trained to step {{ step }} by simplclip {{ version }}.
{{ blend }}

## Figures

{% for figure in figures -%}
- {{ figure }}
{% else -%}
The weights had not been evaluated before the export: there are no held-out figures.
`simplclip evaluate` measures them; then remove this file, and export again with `--force`.
{% endfor %}
## Training

- Sources: {{ sources }}
- Started from: {{ starts }}
- Images in an epoch: {{ images }}

Settings that differ from the defaults, without those of files:

{{ settings }}

## Licence

To be filled in by you, of the model and of the data.

## Use

{{ lines }}
"""


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
    name = state["config"]["model"]["name"]
    sources = starts = settings = "unknown"
    with suppress(ConfigError):  # of another version
        config = from_dict(state["config"])
        sources = _listed(names_of(config.data.train))
        starts = _listed(map(_name, sources_of(config))) or "random weights"
        required = {"data": {"train": config.data.train}, "run": {"out": config.run.out}}
        changes = differences(from_dict(required).to_dict(), config.to_dict())
        chosen = {key: new for key, (_, new) in changes.items() if not _PATHS.match(key)}
        text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True) if chosen else "none"
        settings = "\n".join(f"    {line}" for line in text.splitlines())
    figures: list[tuple[str, str, Figure]] = []
    with suppress(*_BROKEN):
        figures = list(_figures(file, state["step"], blend))
    results = [
        EvalResult(TASK, split, split, metric, figure.value, metric_name=metric)
        for split, metric, figure in figures
    ]
    about = ModelCardData(
        library_name=library, pipeline_tag=TASK, model_name=name, eval_results=results or None
    )
    content = ModelCard.from_template(
        about,
        template_str=TEMPLATE,
        name=name,
        parameters=f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        step=f"{state['step']:,}",
        version=__version__,
        blend=BLENDED.format(**blend) if blend else "",
        figures=[
            f"{split}, {metric}: {percent(figure.value)} (chance {percent(figure.chance)})"
            for split, metric, figure in figures
        ],
        sources=sources,
        starts=starts,
        images=f"{state['images']:,}" if state.get("images") else "unknown",
        settings=settings,
        lines=lines,
    )
    return str(content)


def _figures(
    file: Path, step: int, blend: dict[str, Any] | None
) -> Iterator[tuple[str, str, Figure]]:
    """Yields split, metric and figure of what `simplclip evaluate` found of these weights."""
    folder = file if file.is_dir() else file.parent
    content = json.loads((folder / (BLEND if blend else "evaluation.json")).read_text("utf-8"))
    if blend:
        content |= {row["alpha"]: row for row in content["rows"]}[blend["alpha"]]
    result = Results.model_validate(content)
    is_other = result.step != step or not result.checkpoint.endswith((file.name, folder.name))
    if is_other or (blend and content["start"] != blend["start"]):
        return
    for split, found in result.splits.items():
        for direction, recall in found.retrieval.directions.items() if found.retrieval else ():
            for name, figure in recall.items():
                yield split, f"{direction.replace('_', ' ')} {name}", figure
        if of := found.zero_shot:
            yield split, "top 1", of.top1
            yield split, "top 5", of.top5
            yield split, "mean per class", of.mean_per_class


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
