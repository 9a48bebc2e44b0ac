"""`simplclip evaluate`: evaluates models on named splits; writes a table, evaluation.json and pictures."""

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

import simplclip
from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.files import locked, write_atomically
from simplclip.data import HeldOut, held_out
from simplclip.data.pool import cores
from simplclip.data.text import json_of
from simplclip.evaluation.encoder import Encoder, load
from simplclip.evaluation.figures import in_words, table
from simplclip.evaluation.sheets import confusion_sheet, contact_sheet
from simplclip.evaluation.zero_shot import NamelessError, class_names, named, phrases, zero_shot
from simplclip.retrieval import BATCH_SIZE, Split, encode, recall_of
from simplclip.train.config import from_dict
from simplclip.train.settings import EvalConfig
from simplclip.train.trust import check_splits

Models = str | os.PathLike | Sequence[str | os.PathLike]


def evaluate(
    models: Models,
    splits: Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike | None = None,
    templates: Sequence[str] | None = None,
    classnames: str | os.PathLike | None = None,
    captions: int | None = None,
    images: str | os.PathLike | None = None,
    features: str | os.PathLike | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    skip_missing: bool = False,
    trust: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates models on splits, by retrieval where there are captions and by classification where there are labels.

    Writes OUT/evaluation.json, and for each split OUT/evaluation-SPLIT.png and OUT/confusion-SPLIT.png; prints a table and
    returns the content of the JSON. The figures of the first model are under "splits", figures of other models under
    "baselines" by model. Each split is written as soon as it is done, with the checkpoint, model, step and precision of its
    evaluation; earlier results stay. Ranks divide the images and captions; the first rank compares, writes and prints.

    Args:
        models: one or several sources of `encoder.load`. Names of pictures end with the model's name for all but the first.
        splits: name -> first argument of `data.held_out`; by default eval.splits of the first model's config.
        out: by default the folder of the first model.
        templates: see `evaluation.phrases`; by default those in the split's folder, in the config, or "a photo of {}".
        classnames: see `evaluation.class_names`; by default the names in the data.
        captions, images: see `data.held_out`.
        features: folder that keeps the features, see `retrieval.encode`; by default a temporary file in OUT holds them.
        batch_size: images or captions encoded at a time.
        workers: processes that decode images; by default one for each core, at most 8.
        trust: accept commands and URLs in the eval.splits of the first model's config, and all model options in checkpoints.
        skip_missing: skip splits whose files do not exist, with a note; if no split is left, the JSON is not written.

    Raises: FileNotFoundError, CheckpointError (not a checkpoint, or of another architecture), ValueError (also if
    evaluation.json is another file).
    """
    console = (console or Console()) if ranks.first() else Console(quiet=True)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    sources = [os.fspath(model) for model in ([models] if isinstance(models, (str, os.PathLike)) else models)]
    if not sources or len({*sources}) < len(sources):
        raise InputError(f"model: expected one or several different models, got {', '.join(sources) or 'none'}")
    workers = min(8, cores()) if workers is None else workers
    names, given = class_names(classnames), phrases(templates or ())
    found: dict[str, HeldOut] = {}
    answer: dict[str, Any] = {}
    for number, name in enumerate(sources):
        encoder = load(name, device=ranks.device(device), precision=precision)
        about: dict[str, Any] = {"checkpoint": name, "model": encoder.name, "step": encoder.step}
        about["precision"] = encoder.precision
        if number == 0:
            defaults = from_dict(encoder.config, stored=True).eval if encoder.config else EvalConfig()
            if not (splits or trust):
                check_splits(defaults.splits, name)
            found = _sources(splits or defaults.splits, skip_missing, say, captions=captions, images=images)
            found = {split: named(what, *names) for split, what in found.items()}
            file = _folder(out, name) / "evaluation.json"
            _earlier(file)  # raises an error before the work starts
            versions = {"simplclip": simplclip.__version__, "torch": torch.__version__}
            answer = mine = about | {"versions": versions, "splits": {}}
            for folder in (file.parent, *([Path(features)] if features else ())) if found else ():
                folder.mkdir(parents=True, exist_ok=True)
        else:
            mine = answer.setdefault("baselines", {})[name] = about | {"splits": {}}
        for title, what in found.items():
            split = Split(what, encoder.tokenizer, encoder.preprocess)
            ending = file_name(title) + (f"-{file_name(name)}" if number else "")
            how: dict[str, Any] = {"workers": workers, "folder": file.parent}
            how["keep"] = Path(features) / ending if features else None
            shown = f"{title}, {name}" if sources[1:] else title
            encode(encoder.model, split, batch_size, encoder.device, encoder.precision, **how, progress=shown, who=name)
            say(f"{shown}: {split.report()}")
            wording = given or phrases(what.classes.templates or defaults.templates)
            figures = _figures(encoder, split, wording, title, file.parent, ending)
            mine["splits"][title] = figures | about
            for line in figures["left_out"]:
                say(f"{shown}: {line}")
            ranks.on_first(partial(_add, file, answer))
    if not found:
        say(f"nothing was evaluated; {file} is not written")
        return answer
    console.print(table(answer))
    results = [result for part in (answer, *answer.get("baselines", {}).values()) for result in part["splits"].values()]
    for path in [file, *(r[kind] for r in results for kind in ("contact_sheet", "confusion_sheet") if r[kind])]:
        say(f"wrote {path}")
    return answer


def _sources(splits: Mapping[str, Any], skip_missing: bool, say: Any, **options: Any) -> dict[str, HeldOut]:
    if not splits:
        raise InputError(
            "data: expected at least one split (--data name=shards), got none, and the model has no config with eval.splits"
        )
    found = {}
    for name, what in splits.items():
        try:
            found[name] = held_out(what, **options)
        except InputError as error:
            if not skip_missing:
                raise
            say(f"skipped {name}: {error}")
    return found


def _folder(out: str | os.PathLike | None, model: str) -> Path:
    if out:
        return Path(out)
    if not Path(model).exists():
        raise InputError(f"out: expected a folder for the results (--out), got none, and {model} is not a file or a folder")
    return Path(model) if Path(model).is_dir() else Path(model).parent


def file_name(name: str) -> str:
    """Replaces characters of `name` that file systems do not allow in names."""
    return re.sub(r'[\x00-\x1f<>:"/\\|?*]+', "_", name).strip(" ._") or "_"


def _figures(encoder: Encoder, split: Split, templates: list[str], name: str, folder: Path, ending: str) -> dict[str, Any]:
    """Returns the figures of an encoded split, and writes its pictures."""
    found, classes, nameless = ranks.on_first(partial(recall_of, split, encoder.device)), None, None
    try:
        classes = zero_shot(encoder.model, split, templates, encoder.device, encoder.precision)
    except NamelessError as error:
        if not found:
            raise
        nameless = f"no classification: {error}"
    return ranks.on_first(partial(_result, encoder, split, found, classes, nameless, (name, folder, ending)))


def _result(encoder: Encoder, split: Split, found: Any, classes: Any, nameless: str, files: tuple) -> dict[str, Any]:
    """The result of `_figures`. nameless: why there are no classes. files: split's name; folder and ending of pictures."""
    name, folder, ending = files
    left_out = [] if found else ["no retrieval: no image has a caption"]
    if nameless:
        left_out.append(nameless)
    elif not found and not classes:
        raise InputError(f"data: expected captions or labels of at least two classes in {name}, got neither")
    elif classes and classes["images"] < len(split):
        left_out.append(f"no classification of images without a label: {len(split) - classes['images']:,} of {len(split):,}")
    elif not classes and any(label is not None for label in split.labels):
        left_out.append("no classification: all labels are of one class")
    title = encoder.name if encoder.step is None else f"{encoder.name}, step {encoder.step}"
    result: dict[str, Any] = {"images": len(split), "texts": len(split.captions), **(found or {})}
    result |= {"zero_shot": classes, "left_out": left_out, "contact_sheet": None, "confusion_sheet": None}
    if found:
        among = {"text_to_image": len(split), "image_to_text": len(split.captions)}
        first, second = (in_words(found[direction], number) for direction, number in among.items())
        sheet = contact_sheet(folder / f"evaluation-{ending}.png", split, f"{title}: {name}", (first, second))
        result["contact_sheet"] = str(sheet)
    if classes:
        shown = {"top 1": classes["top1"], "top 5": classes["top5"]}
        subtitle = in_words(shown, len(classes["classes"]))
        sheet = confusion_sheet(folder / f"confusion-{ending}.png", split, classes, f"{title}: {name}", subtitle)
        result["confusion_sheet"] = sheet and str(sheet)
        for pair in classes["confused"]:
            pair["examples"] = [split.keys[row] for row in pair.pop("rows")]
    return result


def _add(file: Path, answer: dict[str, Any]) -> None:
    with locked(file.parent):
        text = json.dumps(_merged(_earlier(file), answer), indent=2, ensure_ascii=False) + "\n"
        write_atomically(file, text.encode("utf-8", "backslashreplace"))


def _merged(earlier: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns `new` with those splits and baselines of `earlier` that `new` does not replace."""
    whole = new | {"splits": earlier.get("splits", {}) | new["splits"]}
    beside, mine = earlier.get("baselines", {}), new.get("baselines", {})
    merged = {name: part | {"splits": beside.get(name, {}).get("splits", {}) | part["splits"]} for name, part in mine.items()}
    return whole | ({"baselines": beside | merged} if beside or merged else {})


def _earlier(file: Path) -> dict[str, Any]:
    """Reads the "splits" and the "baselines" of an evaluation.json, if it exists. Raises InputError for another file."""
    if not file.exists():
        return {}
    try:
        found = json_of(file.read_text("utf-8"))
        for part in (found, *found.get("baselines", {}).values()):
            part["splits"].items()
        return {name: found[name] for name in ("splits", "baselines") if name in found}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(
            f"out: expected no evaluation.json, or one to add splits to, got {file}, which is another file: move it"
        ) from None
