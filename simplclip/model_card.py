"""The model card of an export: README.md with what its run and its evaluation recorded.

Nothing in it is guessed: the data and the licences are the user's to write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from simplclip.evaluation.blending import BLEND
from simplclip.evaluation.results import Figure, percent
from simplclip.models.naming import Form
from simplclip.version import __version__

TASK = "zero-shot-image-classification"
BLENDED = "These weights are {alpha} of the training's and 1 - {alpha} of its start, {start}."
TEMPLATE = """---
{{ card_data }}
# license: to be filled in by you, such as apache-2.0
---
# {{ card_data.model_name }}

A CLIP model of {{ "{:,}".format(parameters) }} parameters, trained to step {{ step }} by simplclip
{{ version }}.
{{ blend }}

## Figures

{% for split, name, figure in figures -%}
- {{ split }}, {{ name }}: {{ percent(figure.value) }} (chance {{ percent(figure.chance) }})
{% else -%}
The weights had not been evaluated before the export: there are no held-out figures.
`simplclip evaluate` measures them; then remove this file, and export again with `--force`.
{% endfor %}
## Training

- Data: to be filled in by you
- Started from: {{ starts }}
- Images in an epoch: {{ images or "unknown" }}

```yaml
{{ settings }}```

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
    config = state["config"]
    sources = config.get("inherit", {}).get("source") or []
    sources = [sources] if isinstance(sources, str) else sources
    starts = filter(None, [config["model"].get("checkpoint"), *sources])
    names = ["/".join(Path(start).parts[-2:]) for start in starts]
    settings = {name: config.get(name) for name in ("loss", "optim")}  # which name no files
    figures: list[tuple[str, str, Figure]] = []
    # without a file of figures, or with one that is damaged
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        figures = list(_figures(file, state["step"], blend))
    results = [EvalResult(TASK, split, split, name, f["value"]) for split, name, f in figures]
    about = ModelCardData(
        library_name=library,
        pipeline_tag=TASK,
        model_name=config["model"]["name"],
        eval_results=results or None,
    )
    content = ModelCard.from_template(
        about,
        template_str=TEMPLATE,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        step=state["step"],
        version=__version__,
        blend=BLENDED.format(**blend) if blend else "",
        figures=figures,
        percent=percent,
        starts=", ".join(names) or "random weights",
        images=state.get("images"),
        settings=yaml.safe_dump(settings, sort_keys=False),
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
        for group in ("image_to_text", "text_to_image", "zero_shot"):
            for name, figure in (found.get(group) or {}).items():
                if isinstance(figure, dict):  # zero_shot has words too
                    label = f"{group} {name}".replace("_", " ")
                    yield split, label, Figure(value=figure["value"], chance=figure["chance"])
