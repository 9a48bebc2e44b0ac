"""`simplclip evaluate`: evaluates models on named splits; writes a table, evaluation.json and
pictures.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.files import write_atomically
from simplclip.data import held_out
from simplclip.evaluation.classification import (
    NamelessError,
    class_names,
    named,
    phrases,
    zero_shot,
)
from simplclip.evaluation.encoder import Encoder, load
from simplclip.evaluation.figures import in_words, table
from simplclip.evaluation.retrieval import recall_of
from simplclip.evaluation.sheets import contact_sheet
from simplclip.evaluation.split import BATCH_SIZE, Split, encode
from simplclip.models.sources import about_best
from simplclip.version import __version__

Models = str | os.PathLike | Sequence[str | os.PathLike]
TEMPLATES = ("a photo of {}",)


def evaluate(
    models: Models,
    splits: Mapping[str, Any],
    *,
    out: str | os.PathLike | None = None,
    templates: Sequence[str] | None = None,
    classnames: str | os.PathLike | None = None,
    captions: int | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates models on splits, by retrieval where there are captions and by classification where
    there are labels.

    Writes OUT/evaluation.json, and for each split with captions OUT/evaluation-SPLIT.png; prints a
    table and returns the content of the JSON. The figures of the first model are under "splits",
    those of other models under "baselines" by model. The JSON replaces an earlier one, and is
    written after each split. Ranks divide the images and captions; the first rank compares, writes
    and prints.

    Args:
        models: one or several sources of `encoder.load`. Names of pictures end with the model's
            name for all but the first.
        splits: name -> first argument of `data.held_out`.
        out: by default the folder of the first model.
        templates: see `evaluation.phrases`; by default those in the split's folder, in the config,
            or "a photo of {}".
        classnames: see `evaluation.class_names`; by default the names in the data.
        captions: see `data.held_out`.
        batch_size: images or captions encoded at a time.
        workers: processes that decode images; by default one for each core, at most 8.

    Raises: FileNotFoundError, CheckpointError (not a checkpoint, or of another architecture),
    InputError.
    """
    console = (console or Console()) if ranks.first() else Console(quiet=True)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    sources = [
        os.fspath(model)
        for model in ([models] if isinstance(models, (str, os.PathLike)) else models)
    ]
    if not sources or len({*sources}) < len(sources):
        raise InputError(
            f"model: expected one or several different models, got {', '.join(sources) or 'none'}"
        )
    if not splits:
        raise InputError("data: expected at least one split (--data NAME=DATA), got none")
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    names, synsets = class_names(classnames)
    chosen_templates = phrases(templates or ())
    data = {
        name: named(held_out(what, captions=captions), names, synsets)
        for name, what in splits.items()
    }
    answer: dict[str, Any] = {}

    for number, source in enumerate(sources):
        encoder = load(source, device=ranks.device(device), precision=precision)
        if encoder.source != source:
            say(about_best(encoder.source, encoder.step))
        about: dict[str, Any] = {
            "checkpoint": encoder.source,
            "model": encoder.name,
            "step": encoder.step,
        }
        about["precision"] = encoder.precision
        if number == 0:
            folder = _folder(out, source)
            folder.mkdir(parents=True, exist_ok=True)
            config_templates = _templates_of(encoder.config)
            answer = result = about | {
                "versions": {"simplclip": __version__, "torch": torch.__version__},
                "splits": {},
            }
        else:
            result = answer.setdefault("baselines", {})[source] = about | {"splits": {}}
        for name, held in data.items():
            label = f"{name}, {source}" if sources[1:] else name
            split = Split(held, encoder.tokenizer, encoder.preprocess)
            options: dict[str, Any] = {"workers": workers, "progress": label, "source": source}
            encode(encoder.model, split, batch_size, encoder.device, encoder.precision, **options)
            say(f"{label}: {split.report()}")
            picture = (
                folder
                / f"evaluation-{file_name(name)}{f'-{file_name(source)}' if number else ''}.png"
            )
            texts = chosen_templates or phrases(held.classes.templates or config_templates)
            figures = ranks.on_first(partial(_figures, encoder, split, name, texts, picture))
            for line in figures["left_out"]:
                say(f"{label}: {line}")
            result["splits"][name] = figures
            ranks.on_first(partial(_write, folder / "evaluation.json", answer))

    console.print(table(answer))
    results = [
        figures
        for part in (answer, *answer.get("baselines", {}).values())
        for figures in part["splits"].values()
    ]
    for path in [
        folder / "evaluation.json",
        *(figures["contact_sheet"] for figures in results if figures["contact_sheet"]),
    ]:
        say(f"wrote {path}")
    return answer


def _folder(out: str | os.PathLike | None, model: str) -> Path:
    if out:
        return Path(out)
    if not Path(model).exists():
        raise InputError(
            f"out: expected a folder for the results (--out), got none, and {model} is not a file "
            "or a folder"
        )
    return Path(model) if Path(model).is_dir() else Path(model).parent


def _templates_of(config: Mapping[str, Any] | None) -> Sequence[str]:
    """Returns eval.templates of a checkpoint's config, if it has them."""
    section = (config or {}).get("eval")
    templates = section.get("templates") if isinstance(section, Mapping) else None
    valid = (
        isinstance(templates, list)
        and templates
        and all(isinstance(text, str) and "{" in text for text in templates)
    )
    return templates if valid else TEMPLATES


def file_name(name: str) -> str:
    """Replaces characters of `name` that file systems do not allow in names."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", name).strip(" ._") or "_"


def _figures(
    encoder: Encoder, split: Split, name: str, templates: list[str], picture: Path
) -> dict[str, Any]:
    """Returns the figures of an encoded split, and draws its picture."""
    recalls = recall_of(split, encoder.device)
    classes = None
    left_out = []
    if not recalls:
        left_out.append("no retrieval: no image has a caption")
    try:
        classes = zero_shot(encoder.model, split, templates, encoder.device, encoder.precision)
    except NamelessError as error:
        if not recalls:
            raise
        left_out.append(f"no classification: {error}")
    else:
        if not recalls and not classes:
            raise InputError(
                f"data: expected captions or labels of at least two classes in {name}, got neither"
            )
        if classes and classes["images"] < len(split):
            missing = len(split) - classes["images"]
            left_out.append(
                f"no classification of images without a label: {missing:,} of {len(split):,}"
            )
    if recalls:
        title = encoder.name if encoder.step is None else f"{encoder.name}, step {encoder.step}"
        among = {"text_to_image": len(split), "image_to_text": len(split.captions)}
        contact_sheet(
            picture,
            split,
            f"{title}: {name}",
            [in_words(recalls[way], count) for way, count in among.items()],
        )
    counts = {"images": len(split), "texts": len(split.captions)}
    sheet = str(picture) if recalls else None
    return {
        **counts,
        **(recalls or {}),
        "zero_shot": classes,
        "left_out": left_out,
        "contact_sheet": sheet,
    }


def _write(file: Path, answer: Mapping[str, Any]) -> None:
    text = json.dumps(answer, indent=2, ensure_ascii=False) + "\n"
    write_atomically(file, text.encode("utf-8", "backslashreplace"))
