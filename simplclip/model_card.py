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

from simplclip.evaluation.results import percent
from simplclip.evaluation.run import BLEND
from simplclip.models.naming import Form
from simplclip.version import __version__

TASK = "zero-shot-image-classification"
BLENDED = "These weights are {alpha} of the training's and 1 - {alpha} of its start, {start}."
TEMPLATE = str(Path(__file__).with_suffix(".md"))


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
    name = config["model"]["name"]
    sources = config.get("inherit", {}).get("source") or []
    sources = [sources] if isinstance(sources, str) else sources
    starts = [config["model"].get("checkpoint"), *sources]
    starts = ["/".join(Path(start).parts[-2:]) for start in starts if start]
    settings = {name: config.get(name) for name in ("loss", "optim")}  # which name no files
    results: list[EvalResult] = []
    # without a file of figures, or with one that is damaged
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        results = list(_results(file, state["step"], blend))
    about = ModelCardData(
        library_name=library, pipeline_tag=TASK, model_name=name, eval_results=results or None
    )
    content = ModelCard.from_template(
        about,
        template_path=TEMPLATE,
        name=name,
        results=results,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        step=state["step"],
        images=state.get("images"),
        version=__version__,
        blend=BLENDED.format(**blend) if blend else "",
        percent=percent,
        starts=", ".join(starts) or "random weights",
        settings=yaml.safe_dump(settings, sort_keys=False),
        lines=lines,
    )
    return str(content)


def _results(file: Path, step: int, blend: dict[str, Any] | None) -> Iterator[EvalResult]:
    """Yields what `simplclip evaluate` found of these weights."""
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
                    chance = {"chance": figure["chance"]}
                    yield EvalResult(TASK, split, split, label, figure["value"], metric_args=chance)
