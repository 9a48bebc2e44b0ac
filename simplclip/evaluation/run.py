"""`simplclip evaluate`: evaluates models on named splits; writes a table, evaluation.json and
pictures.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.files import check_writable, write_atomically
from simplclip.common.plotting import write
from simplclip.common.progress import print_lines
from simplclip.data import HeldOut, held_out
from simplclip.evaluation.classification import (
    NamelessError,
    class_names,
    named,
    phrases,
    zero_shot,
)
from simplclip.evaluation.encoder import Encoder, load
from simplclip.evaluation.figures import in_words, table
from simplclip.evaluation.index import BATCH_SIZE, Index, encode
from simplclip.evaluation.results import (
    Classification,
    ModelResult,
    Results,
    Retrieval,
    SplitResult,
)
from simplclip.evaluation.sheets import contact_sheet
from simplclip.evaluation.split import Split
from simplclip.models.registry import cut_in_words
from simplclip.models.weights import about_best
from simplclip.version import __version__

Models = str | os.PathLike | Sequence[str | os.PathLike]
TEMPLATES = ("a photo of {}",)
VERSIONS = {"simplclip": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class Settings:
    """How `evaluate` reads the data and computes.

    Args:
        templates: see `evaluation.phrases`; by default those in the split's folder, in the config,
            or "a photo of {}".
        classnames: see `evaluation.class_names`; by default the names in the data.
        captions: see `data.held_out`.
        batch_size: images or captions encoded at a time.
        workers: processes that decode images; by default one for each core, at most 8.
        device, precision: see `evaluation.load`.
    """

    templates: Sequence[str] | None = None
    classnames: str | os.PathLike | None = None
    captions: int | None = None
    batch_size: int = BATCH_SIZE
    workers: int | None = None
    device: str = "auto"
    precision: str = "fp32"


def evaluate(
    models: Models,
    splits: Mapping[str, Any],
    settings: Settings | None = None,
    *,
    out: str | os.PathLike | None = None,
    console: Console | None = None,
) -> Results:
    """Evaluates models on splits; writes evaluation.json and pictures, and prints a table.

    Retrieval is evaluated where there are captions, classification where there are labels. Writes
    OUT/evaluation.json, and for each split with captions OUT/evaluation-SPLIT.png; returns the
    results, whose `model_dump` is the content of the JSON. There the figures of the first model are
    under "splits", those of other models under "baselines" by model. The JSON replaces an earlier
    one, and is written after each split. Ranks divide the images and captions; the first rank
    compares, writes and prints.

    Args:
        models: one or several sources of `evaluation.load`. Names of pictures end with the model's
        name for all but the first.
        splits: name -> first argument of `data.held_out`.
        settings: by default those of `Settings`.
        out: by default the folder of the first model.
        console: where lines and the table are printed; by default the standard output.

    Raises: FileNotFoundError, CheckpointError (not a checkpoint, or of another architecture),
    InputError.
    """
    if not ranks.first():
        console = Console(quiet=True)
    console = console or Console()
    say = partial(print_lines, console=console)
    settings = settings or Settings()
    sources = _sources(models)
    data = open_splits(splits, settings)
    results: Results

    for source in sources:
        encoder = load(
            source, device=ranks.set_device(settings.device), precision=settings.precision
        )
        if encoder.source != source and encoder.step is not None:
            say(about_best(encoder.source, encoder.step))
        about = {
            "checkpoint": encoder.source,
            "model": encoder.name,
            "step": encoder.step,
            "precision": encoder.precision,
        }
        ending = ""
        model: Results | ModelResult
        if source == sources[0]:
            folder = make_folder(out, source)
            config = encoder.config
            model = results = Results(**about, versions=VERSIONS)
        else:
            ending = f"-{file_name(source)}"
            model = results.baselines[source] = ModelResult(**about)
        for name, held in data.items():
            label = f"{name}, {source}" if sources[1:] else name
            picture = folder / f"evaluation-{file_name(name)}{ending}.png"
            model.splits[name] = evaluate_split(
                encoder, name, held, settings, config, label, say, picture
            )
            ranks.on_first(partial(write_json, folder / "evaluation.json", results))

    console.print(table(results))
    say(f"wrote {folder / 'evaluation.json'}")
    for model in results.models:
        for result in model.splits.values():
            if result.contact_sheet:
                say(f"wrote {result.contact_sheet}")
    return results


def open_splits(splits: Mapping[str, Any], settings: Settings) -> dict[str, HeldOut]:
    """Opens the data of splits, with names of classes; raises what `evaluate` does of arguments."""
    if not splits:
        raise InputError("data: expected at least one split (--data NAME=DATA), got none")
    names, synsets = class_names(settings.classnames)
    phrases(settings.templates or ())
    return {
        name: named(held_out(source, captions=settings.captions), names, synsets)
        for name, source in splits.items()
    }


def evaluate_split(
    encoder: Encoder,
    name: str,
    held: HeldOut,
    settings: Settings,
    config: Mapping[str, Any] | None,
    label: str,
    say: Callable[[str], object] | None,
    picture: Path | None = None,
) -> SplitResult:
    """Returns the figures of a model on a split; all ranks have to call it.

    config: of the run that has eval.templates. label: of lines and of the progress. say: prints
    what was read and left out. picture: where the contact sheet is written.
    """
    workers = settings.workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    split = Split(held, encoder.tokenizer, encoder.preprocess)
    index = encode(encoder.towers, split, settings.batch_size, workers=workers, progress=label)
    if say:
        say(f"{label}: {index.report()}")
    texts = phrases(settings.templates or held.classes.templates or _templates_of(config))
    result = ranks.on_first(partial(_figures, encoder, index, name, texts, picture))
    for line in result.left_out:
        if say:
            say(f"warning: {label}: {line}")
    return result


def _sources(models: Models) -> list[str]:
    """Returns one or several models as a list of texts; InputError for none, or one twice."""
    if isinstance(models, (str, os.PathLike)):
        models = [models]
    sources = [os.fspath(model) for model in models]
    if not sources or len({*sources}) < len(sources):
        raise InputError(
            f"model: expected one or several different models, got {', '.join(sources) or 'none'}"
        )
    return sources


def make_folder(out: str | os.PathLike | None, model: str) -> Path:
    """Makes and returns the folder of the results: `out`, by default that of the model."""
    if not out and not Path(model).exists():
        raise InputError(
            f"out: expected a folder for the results (--out), got none, and {model} is not a file "
            "or a folder"
        )
    folder = Path(out or (model if Path(model).is_dir() else Path(model).parent))
    ranks.on_first(check_writable, folder, "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _templates_of(config: Mapping[str, Any] | None) -> Sequence[str]:
    """Returns eval.templates of a checkpoint's config, phrases with {}."""
    section = (config or {}).get("eval")
    templates = section.get("templates") if isinstance(section, Mapping) else None
    if not isinstance(templates, list) or not templates:
        return TEMPLATES
    if not all(isinstance(text, str) and "{" in text for text in templates):
        return TEMPLATES
    return templates


def file_name(name: str) -> str:
    """Returns `name` with "_" for characters that file names may not have; "_" if none is left."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", name).strip(" ._") or "_"


def _figures(
    encoder: Encoder, index: Index, name: str, templates: list[str], picture: Path | None
) -> SplitResult:
    """Returns the figures of a split, and writes a `picture` if it has captions.

    Raises InputError if it has neither captions nor labels of at least two classes, or a label of
    an unknown class; NamelessError if it has no captions, and numbers without names as labels.
    """
    retrieval = index.retrieval(encoder.device)
    classification = None
    left_out = []
    if not retrieval:
        left_out.append("no retrieval: no image has a caption")
    elif not_captioned := len(index) - int(index.captioned().sum()):
        left_out.append(
            "no image-to-text retrieval of images without a caption: "
            f"{not_captioned:,} of {len(index):,}"
        )
    if cut := cut_in_words(encoder.tokenizer, index.captions):
        left_out.append(cut)
    try:
        classification = zero_shot(encoder.towers, index, templates)
    except NamelessError as error:
        if not retrieval:
            raise
        left_out.append(f"no classification: {error}")
    else:
        if not retrieval and not classification:
            raise InputError(
                f"data: expected captions or labels of at least two classes in {name}, got neither"
            )
        if classification:
            left_out += _left_out_of_classes(classification, len(index))
    sheet = None
    if retrieval and picture:
        sheet = str(picture)
        _draw(encoder, index, name, retrieval, picture)
    return SplitResult(
        images=len(index),
        texts=len(index.captions),
        **(retrieval.directions if retrieval else {}),
        zero_shot=classification,
        left_out=left_out,
        contact_sheet=sheet,
    )


def _left_out_of_classes(classification: Classification, images: int) -> list[str]:
    """Returns lines about images without a label, and about classes with equal names."""
    lines = []
    missing = images - classification.images
    if missing:
        lines.append(f"no classification of images without a label: {missing:,} of {images:,}")
    counts = Counter(classification.classes)
    repeated = [name for name in classification.classes if counts[name] > 1]
    if repeated:
        lines.append(
            "no distinction of classes with equal names, which count as different: "
            f"{len(repeated):,} of {len(classification.classes):,}, such as {repeated[0]!r}"
        )
    return lines


def _draw(encoder: Encoder, index: Index, name: str, retrieval: Retrieval, picture: Path) -> None:
    """Writes the contact sheet of a split to the file `picture`, which is replaced."""
    title = encoder.name
    if encoder.step is not None:
        title += f", step {encoder.step}"
    subtitles = [
        in_words(retrieval.text_to_image, len(index)),
        in_words(retrieval.image_to_text, len(index.captions)),
    ]
    write(contact_sheet(index, f"{title}: {name}", subtitles), picture)


def write_json(file: Path, results: BaseModel) -> None:
    """Replaces `file` by the results as UTF-8 JSON, completely or not at all."""
    text = json.dumps(results.model_dump(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(file, text.encode("utf-8", "backslashreplace"))
