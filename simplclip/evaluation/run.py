"""`simplclip evaluate`: evaluates models on named splits; writes a table, evaluation.json and
pictures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from simplclip.common import ranks
from simplclip.common.errors import InputError, UserError
from simplclip.common.files import check_writable
from simplclip.common.progress import print_lines
from simplclip.data import HeldOut, held_out
from simplclip.data.errors import Skipped
from simplclip.data.transforms import Transform
from simplclip.evaluation.classification import named, phrases, zero_shot
from simplclip.evaluation.encoder import Encoder, load
from simplclip.evaluation.index import BATCH_SIZE, Index, encode
from simplclip.evaluation.results import (
    Results,
    SplitResult,
    in_words,
    table,
    write_json,
)
from simplclip.evaluation.sheets import write_sheet
from simplclip.models.registry import cut_in_words
from simplclip.models.weights import about_best
from simplclip.version import __version__

Models = str | os.PathLike | Sequence[str | os.PathLike]
TEMPLATES = ("a photo of {}",)
VERSIONS = {"simplclip": __version__, "torch": torch.__version__}
LEAST_SAMPLES = 2  # of a run's held-out data: of one, R@1 is 100 % with any weights


@dataclass(frozen=True)
class Settings:
    """How `evaluate` reads the data and computes.

    Args:
        templates: see `evaluation.phrases`; by default those in the split's folder, in the config,
            or "a photo of {}".
        classnames: see `evaluation.named`; by default the names in the data.
        captions: see `data.held_out`.
        batch_size: images or captions encoded at a time.
        workers: processes that decode images; by default one for each core, at most 8.
        last, device, precision: see `evaluation.load`.
    """

    templates: Sequence[str] | None = None
    classnames: str | os.PathLike | None = None
    captions: int | None = None
    batch_size: int = BATCH_SIZE
    workers: int | None = None
    last: bool = False
    device: str = "auto"
    precision: str = "fp32"

    def load(self, source: str) -> Encoder:
        """Returns the encoder of a source, on this rank's device."""
        device = ranks.set_device(self.device)
        return load(source, last=self.last, device=device, precision=self.precision)


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
    content of the JSON. There the figures of the first model are under "splits", those of other
    models under "baselines" by model. The JSON replaces an earlier one, and is written after each
    split. Ranks divide the images and captions; the first rank compares, writes and prints.

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
    console = console or Console(quiet=not ranks.first())
    say, settings = partial(print_lines, console=console), settings or Settings()
    listed = [models] if isinstance(models, (str, os.PathLike)) else models
    sources = [os.fspath(model) for model in listed]
    if not sources or len({*sources}) < len(sources):
        got = ", ".join(sources) or "none"
        raise InputError(f"model: expected one or several different models, got {got}")
    data = open_splits(splits, settings)
    results: Any = {}
    for source in sources:
        encoder = settings.load(source)
        if encoder.source != source and encoder.step is not None and not settings.last:
            say(about_best(encoder.source, encoder.step))
        model, ending = about_model(encoder), ""
        if not results:
            folder, config = results_folder(out, source), encoder.config
            results = model | {"versions": VERSIONS}
            model = results
        else:
            ending = f"-{file_name(source)}"
            results.setdefault("baselines", {})[source] = model
        model["splits"] = {}
        for name, held in data.items():
            label = f"{name}, {source}" if sources[1:] else name
            picture = folder / f"evaluation-{file_name(name)}{ending}.png"
            model["splits"][name] = evaluate_split(
                encoder, held, settings, config, label, say, picture
            )
            ranks.on_first(write_json, folder / "evaluation.json", results)

    console.print(table(results))
    say(f"wrote {folder / 'evaluation.json'}")
    for model in (results, *results.get("baselines", {}).values()):
        for result in model["splits"].values():
            if result["contact_sheet"]:
                say(f"wrote {result['contact_sheet']}")
    return results


def about_model(encoder: Encoder) -> dict[str, Any]:
    """Returns what the files of results say of a model."""
    return {
        "checkpoint": encoder.source,
        "model": encoder.name,
        "step": encoder.step,
        "precision": encoder.precision,
    }


def open_splits(splits: Mapping[str, Any], settings: Settings) -> dict[str, HeldOut]:
    """Opens the data of splits, with names of classes; raises what `evaluate` does of arguments."""
    if not splits:
        raise InputError("data: expected at least one split (--data NAME=DATA), got none")
    phrases(settings.templates or ())
    return {
        name: named(held_out(source, captions=settings.captions), settings.classnames)
        for name, source in splits.items()
    }


def load_splits(splits: Mapping[str, Any], transform: Transform) -> dict[str, HeldOut]:
    """Returns the held-out data of a run's model with this image transform.

    splits: name -> data as `data.held_out` takes them.
    Raises InputError, which names the split's key, for data that `data.held_out` rejects or that
    have less than LEAST_SAMPLES usable samples, as far as the first of them tell.
    """
    loaded = {}
    for name, source in splits.items():
        argument = f"eval.splits.{name}"
        loaded[name] = data = held_out(source, name=argument)
        samples, skipped = 0, Skipped()
        try:
            for batch in data.batches(transform, 1):
                skipped.merge(batch.skipped)
                samples += len(batch.rows)
                if samples == LEAST_SAMPLES:
                    break
            else:
                got = f"expected at least {LEAST_SAMPLES} usable samples, got {samples}; {skipped}"
                raise InputError(got)
        except UserError as error:
            raise InputError(f"{argument}: {error}") from None
    return loaded


def results_folder(out: str | os.PathLike | None, model: str) -> Path:
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


def file_name(name: str) -> str:
    """Returns `name` with "_" for characters that file names may not have; "_" if none is left."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", name).strip(" ._") or "_"


def evaluate_split(
    encoder: Encoder,
    held: HeldOut,
    settings: Settings,
    config: Mapping[str, Any] | None,
    label: str,
    say: Callable[[str], object],
    picture: Path | None = None,
) -> SplitResult:
    """Returns the figures of a model on a split; all ranks have to call it.

    config: of the run that has eval.templates. label: of lines and of the progress. say: prints
    what was read and left out. picture: where the contact sheet is written.
    Raises InputError if the split has neither captions nor labels of at least two classes.
    """
    workers = settings.workers
    if workers is None:
        workers = min(8, os.cpu_count() or 1)
    index = encode(encoder, held, settings.batch_size, workers=workers, progress=label)
    say(f"{label}: {index.report()}")
    own = (config or {}).get("eval", {}).get("templates")
    templates = settings.templates or held.classes.templates or own or TEMPLATES
    result = ranks.on_first(_figures, encoder, index, label, templates, picture)
    for line in result["left_out"]:
        say(f"warning: {label}: {line}")
    return result


def _figures(
    encoder: Encoder, index: Index, label: str, templates: Sequence[str], picture: Path | None
) -> SplitResult:
    """Returns the figures of a split, and writes a `picture` if it has captions."""
    retrieval: Any = index.retrieval(encoder.device)
    left_out = [*_left_out(encoder, index)]
    try:
        classes = zero_shot(encoder, index, templates)
    except InputError as error:  # of the labels
        if not retrieval:
            raise
        classes = None
        left_out.append(f"no classification: {error}")
    if classes and classes["images"] < len(index):
        missing = len(index) - classes["images"]
        left_out.append(f"no classification of images without a label: {missing} of {len(index)}")
    if not retrieval and not classes:
        raise InputError(
            f"data: expected captions or labels of at least two classes in {label}, got neither"
        )
    if retrieval and picture:
        step = "" if encoder.step is None else f", step {encoder.step}"
        to_image = in_words(retrieval["text_to_image"], len(index))
        to_text = in_words(retrieval["image_to_text"], len(index.captions))
        subtitles = [f"caption → pictures: {to_image}", f"picture → captions: {to_text}"]
        write_sheet(picture, index, f"{encoder.name}{step}: {label}", subtitles)
    return {
        "images": len(index),
        "texts": len(index.captions),
        **retrieval,
        "zero_shot": classes,
        "left_out": left_out,
        "contact_sheet": str(picture) if retrieval and picture else None,
    }


def _left_out(encoder: Encoder, index: Index) -> Iterator[str]:
    """Yields lines about what has no figures of retrieval, and about captions that are cut."""
    images, captioned = len(index), int(index.captioned().sum())
    if not captioned:
        yield "no retrieval: no image has a caption"
    elif captioned < images:
        yield (
            "no image-to-text retrieval of images without a caption: "
            f"{images - captioned} of {images}"
        )
    if cut := cut_in_words(encoder.tokenizer, index.captions):
        yield cut
