"""The model card of an export: README.md with what its run and its evaluation recorded.

Nothing in it is guessed: the data and the licences are the user's to write.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from simplclip.common.files import differences
from simplclip.evaluation.blending import BLEND
from simplclip.evaluation.results import Figure, percent
from simplclip.models.naming import Form
from simplclip.train.config import ConfigError, from_dict
from simplclip.train.setup import sources_of
from simplclip.version import __version__

TASK = "zero-shot-image-classification"
# settings that name files, whose folders are not told
_PATHS = re.compile(
    r"data\.train|data\.sidecars|eval\.splits|run\.out|model\.checkpoint|inherit\.source"
)
METRICS = {"top1": "top 1", "top5": "top 5", "mean_per_class": "mean per class"}

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

- Data: to be filled in by you
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
    starts = settings = "unknown"
    with suppress(ConfigError):  # of another version
        config = from_dict(state["config"])
        names = (f"`{'/'.join(Path(source).parts[-2:])}`" for source in sources_of(config))
        starts = ", ".join(names) or "random weights"
        required = {"data": {"train": config.data.train}, "run": {"out": config.run.out}}
        changes = differences(from_dict(required).to_dict(), config.to_dict())
        chosen = {key: new for key, (_, new) in changes.items() if not _PATHS.match(key)}
        text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True) if chosen else "none"
        settings = textwrap.indent(text, "    ").rstrip()
    figures: list[tuple[str, str, Figure]] = []
    # without a file of figures, or with one that is damaged
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        figures = list(_figures(file, state["step"], blend))
    results = [
        EvalResult(TASK, split, split, metric, figure["value"], metric_name=metric)
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
            f"{split}, {metric}: {percent(figure['value'])} (chance {percent(figure['chance'])})"
            for split, metric, figure in figures
        ],
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
    result = json.loads((folder / (BLEND if blend else "evaluation.json")).read_text("utf-8"))
    if blend:
        result |= {row["alpha"]: row for row in result["rows"]}[blend["alpha"]]
    is_other = result["step"] != step or not result["checkpoint"].endswith((file.name, folder.name))
    if is_other or (blend and result["start"] != blend["start"]):
        return
    for split, found in result["splits"].items():
        for direction in ("image_to_text", "text_to_image"):
            for name, figure in found.get(direction, {}).items():
                yield split, f"{direction.replace('_', ' ')} {name}", figure
        for name in ("top1", "top5", "mean_per_class") if found["zero_shot"] else ():
            yield split, METRICS[name], found["zero_shot"][name]
