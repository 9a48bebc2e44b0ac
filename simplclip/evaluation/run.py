"""`simplclip evaluate`: evaluates models on named splits; writes a table, evaluation.json and
pictures. With --blend, weights between a run's start and its own.

Training on own data forgets some of what a model knew; a blend with the start may keep both
(WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

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
    first_right,
    in_words,
    percent,
    table,
    write_json,
)
from simplclip.evaluation.sheets import write_sheet
from simplclip.models.registry import cut_in_words
from simplclip.models.weights import about_best
from simplclip.version import __version__

Models = str | os.PathLike | Sequence[str | os.PathLike]
TEMPLATES = ("a photo of {}",)
BLEND = "blend.json"
ALPHAS = tuple(tenths / 10 for tenths in range(11))
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
    data = _open(splits, settings)
    results: Any = {}
    for source in sources:
        encoder = settings.load(source)
        if encoder.source != source and encoder.step is not None and not settings.last:
            say(about_best(encoder.source, encoder.step))
        model, ending = _about(encoder) | {"splits": {}}, ""
        if results:
            ending = f"-{file_name(source)}"
            results.setdefault("baselines", {})[source] = model
        else:
            folder, config, results = _folder(out, source), encoder.config, model
        for name, held in data.items():
            label = f"{name}, {source}" if sources[1:] else name
            picture = folder / f"evaluation-{file_name(name)}{ending}.png"
            model["splits"][name] = _evaluate(encoder, held, settings, config, label, say, picture)
            ranks.on_first(write_json, folder / "evaluation.json", results)

    console.print(table(results))
    say(f"wrote {folder / 'evaluation.json'}")
    return results


def blend(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Returns the weights (1 - alpha) start + alpha end, computed in float32.

    start, end: state dicts of one architecture. alpha: 0 gives the numbers of `start`, 1 those of
    `end`, to the bit; numbers that are equal in both stay. Tensors of integers are those of `end`.
    Dtypes are those of `end`. Tensors of the result may be those of the arguments.
    Raises InputError for another alpha, or if names or shapes differ.
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise InputError(f"alpha: expected a number from 0 to 1, got {alpha!r}")
    shapes, others = ({name: t.shape for name, t in state.items()} for state in (start, end))
    if unlike := sorted(name for name, _ in shapes.items() ^ others.items()):
        raise InputError(f"start: expected the names and shapes of end, got others of {unlike[0]}")
    weights = {}
    for name, last in end.items():
        first = start[name].to(last.dtype)
        weights[name] = last
        if last.is_floating_point() and alpha < 1:
            sums = (1 - alpha) * first.float() + alpha * last.float()
            weights[name] = first if alpha == 0 else first.where(first == last, sums.to(last.dtype))
    return weights


def evaluate_blend(
    encoder: Encoder,
    start: tuple[str, Mapping[str, Tensor]],
    splits: Mapping[str, Any],
    settings: Settings | None = None,
    *,
    out: str | os.PathLike | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates the weights between a run's start and the run, for each of ALPHAS, on splits.

    Writes OUT/blend.json and prints a line for each; returns the content of the JSON: its "rows"
    have "alpha", "mean" (of the splits' `first_right`) and "splits", and "best" is the alpha of the
    highest mean, of equal ones the lowest. The data are read for each alpha.

    encoder: of the run; its weights change, and are the run's again at the end. start: the name and
    state dict of the weights with which the run began, by `simplclip.train.setup`. Other arguments
    and errors are those of `evaluate`; device and precision are the encoder's.
    """
    console = console or Console(quiet=not ranks.first())
    say, settings = partial(print_lines, console=console), settings or Settings()
    data, folder = _open(splits, settings), _folder(out, encoder.source)
    say(f"start: {start[0]}; run: {encoder.source}, step {encoder.step}")
    end = {name: tensor.to("cpu", copy=True) for name, tensor in encoder.model.state_dict().items()}
    rows: list[dict[str, Any]] = []
    for alpha in ALPHAS:
        encoder.model.load_state_dict(blend(start[1], end, alpha))
        told = str if rows else say  # what is read and left out, once
        found, shares = {}, []
        for name, held in data.items():
            label = f"{name}, alpha {alpha}"
            found[name] = _evaluate(encoder, held, settings, encoder.config, label, told)
            shares.append(first_right(found[name])["value"])
        rows.append({"alpha": alpha, "mean": fmean(shares), "splits": found})
        named = [*zip(data, shares), ("mean", fmean(shares))]
        line = ", ".join(f"{name} {percent(share)}" for name, share in named)
        say(f"alpha {alpha}: first answers right: {line}")
    best = max(rows, key=lambda row: row["mean"])
    results = _about(encoder) | {"start": start[0], "best": best["alpha"], "rows": rows}
    ranks.on_first(write_json, folder / BLEND, results)
    say(f"best for the mean: alpha {best['alpha']}, {percent(best['mean'])}")
    say(f"wrote {folder / BLEND}")
    return results


def _about(encoder: Encoder) -> dict[str, Any]:
    """Returns what the files of results say of a model."""
    return {
        "checkpoint": encoder.source,
        "model": encoder.name,
        "step": encoder.step,
        "precision": encoder.precision,
        "versions": VERSIONS,
    }


def _open(splits: Mapping[str, Any], settings: Settings) -> dict[str, HeldOut]:
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


def _folder(out: str | os.PathLike | None, model: str) -> Path:
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


def _evaluate(
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
    if picture and "image_to_text" in result:
        say(f"wrote {picture}")
    return result


def _figures(
    encoder: Encoder, index: Index, label: str, templates: Sequence[str], picture: Path | None
) -> SplitResult:
    """Returns the figures of a split, and writes a `picture` if it has captions."""
    retrieval: Any = index.retrieval(encoder.device)
    images, captioned = len(index), int(index.captioned().sum())
    left_out, classes = [], None
    if not captioned:
        left_out.append("no retrieval: no image has a caption")
    elif captioned < images:
        without = f"without a caption: {images - captioned} of {images}"
        left_out.append(f"no image-to-text retrieval of images {without}")
    if cut := cut_in_words(encoder.tokenizer, index.captions):
        left_out.append(cut)
    try:
        classes = zero_shot(encoder, index, templates)
    except InputError as error:  # of the labels
        if not retrieval:
            raise
        left_out.append(f"no classification: {error}")
    if classes and classes["images"] < images:
        without = f"without a label: {images - classes['images']} of {images}"
        left_out.append(f"no classification of images {without}")
    if not retrieval and not classes:
        raise InputError(
            f"data: expected captions or labels of at least two classes in {label}, got neither"
        )
    if retrieval and picture:
        step = "" if encoder.step is None else f", step {encoder.step}"
        to_image = in_words(retrieval["text_to_image"], images)
        to_text = in_words(retrieval["image_to_text"], len(index.captions))
        subtitles = [f"caption → pictures: {to_image}", f"picture → captions: {to_text}"]
        write_sheet(picture, index, f"{encoder.name}{step}: {label}", subtitles)
    return {
        "images": images,
        "texts": len(index.captions),
        **retrieval,
        "zero_shot": classes,
        "left_out": left_out,
    }
