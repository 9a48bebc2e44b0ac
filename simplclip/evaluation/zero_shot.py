"""Zero-shot classification: names of classes, phrases around them, accuracies and the pairs that are confused most."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.data import HeldOut
from simplclip.data.text import clean, json_of, not_empty
from simplclip.retrieval.metrics import nearest
from simplclip.retrieval.split import Split

AT_ONCE = 10  # classes whose texts are encoded together, as by open_clip
PAIRS, EXAMPLES = 20, 6  # pairs of classes that are listed, and images of each
Names = list[str] | dict[str, str]  # names of classes, by class number or by name of a folder
TEMPLATES = {
    "openai": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
}


class NamelessError(InputError):
    """The error for labels that are numbers without class names."""


def class_names(what: str | os.PathLike | None) -> tuple[Names | None, list[str] | None]:
    """Returns names of classes and, for ImageNet's classes, their synsets (n01440764, ...) in the same order.

    what: "imagenet" for open_clip's list; or a file: a name a line, a JSON list, or a JSON object of names by folder.
    Raises InputError, FileNotFoundError.
    """
    if what is None:
        return None, None
    if str(what) == "imagenet":
        return list(open_clip.IMAGENET_CLASSNAMES), ImageNetInfo("imagenet1k").label_names()
    names = _read(Path(what), "classnames: expected imagenet or a file of names")
    if len(names) < 2:
        raise InputError(f"classnames: expected at least two names, got {len(names)} in {what}")
    return names, None


def named(data: HeldOut, names: Names | None, synsets: list[str] | None) -> HeldOut:
    """Returns the data with `names` in place of its class names, matched by class number or by name of the folder.

    synsets: the synsets of ImageNet's `names`, in order. Folders that are named by them, all or some, are matched by synset.
    """
    folders = data.classes.folders
    if names is None:
        return data
    if not folders:
        return _renamed(data, list(names.values()) if isinstance(names, dict) else list(names))
    if synsets and set(folders) <= set(synsets):
        names = dict(zip(synsets, names))
    where = f"of {data.sources[0].url}"
    if not isinstance(names, dict):
        if len(names) != len(folders):
            raise InputError(f"classnames: expected a name for each of the {len(folders)} folders {where}, got {len(names)}")
        names = dict(zip(folders, names))
    if missing := [name for name in folders if name not in names]:
        raise InputError(f"classnames: expected a name for each folder {where}, got none for {missing[0]!r}")
    return _renamed(data, [names[name] for name in folders])


def _renamed(data: HeldOut, names: list[str]) -> HeldOut:
    return replace(data, classes=replace(data.classes, names=names))


def phrases(templates: str | Sequence[str]) -> list[str]:
    """Returns phrases, each with one {} for the name of a class.

    templates: phrases with {} or {c}, names of open_clip's lists ("openai", "simple"), or files of phrases.
    Raises InputError, FileNotFoundError.
    """
    found: list[str] = []
    for template in [templates] if isinstance(templates, str) else templates:
        if "{" in template:
            found.append(template)
        elif template in TEMPLATES:
            found += TEMPLATES[template]
        elif Path(template).suffix in (".txt", ".json"):
            found += _read(Path(template), "templates: expected openai, simple, or a file of phrases")
        else:
            found.append(template)
    found = [template.replace("{c}", "{}") for template in found]
    for template in found:
        rest = template.replace("{}", "", 1)
        if rest == template or set("{}") & set(rest):
            known = ", ".join(TEMPLATES)
            raise InputError(f"template: expected a phrase with one {{}} for the label, {known}, or a file, got {template!r}")
    return found


def _read(file: Path, expected: str) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{expected}, got {str(file)!r}, which does not exist")
    try:
        text = file.read_text("utf-8-sig")
        found = json_of(text) if file.suffix == ".json" else not_empty(text.splitlines())
    except ValueError as error:
        raise InputError(f"{expected}, got {file}: {error}") from None
    values = found.values() if isinstance(found, dict) else found
    if not isinstance(found, (dict, list)) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{expected}, got {file}: expected a list of strings, or an object of strings")
    return {name: clean(value) for name, value in found.items()} if isinstance(found, dict) else list(map(clean, found))


@torch.no_grad()
def zero_shot(
    model: nn.Module, split: Split, templates: Sequence[str], device: torch.device, precision: str
) -> dict[str, Any] | None:
    """Returns accuracies over the labels of an encoded split, or None if it has fewer than two classes or no label.

    Each class's weight is the mean of its features over `templates`, see `phrases` (open_clip's build_zero_shot_classifier).
    Images without a label are skipped; "images" is the number of images with a label. top1, top5, and mean_per_class (the
    mean over the classes of the share of their images that are right) are {"value", "chance"}. "confused" lists the pairs of
    classes that are confused most, with the number of their images and the rows of up to EXAMPLES images.

    Ranks divide the texts. All ranks have to call this function; only the first rank gets the result.
    Raises: NamelessError for labels that are numbers if there are no names; InputError for a label that is not a known class.
    """
    templates = phrases(templates)
    read = ranks.on_first(partial(_classes, split))
    if isinstance(read, InputError):
        raise read
    classes, truth = read
    rows = [i for i, number in enumerate(truth) if number >= 0]
    if len(classes) < 2 or not rows:
        return None

    def of_classes(start: int) -> Tensor:  # [D, c]
        some = classes[start : start + AT_ONCE]
        return open_clip.build_zero_shot_classifier(model, split.tokenizer, some, templates, AT_ONCE, device).cpu()

    with hardware.autocast(precision, device):
        parts = list(ranks.mapped(of_classes, range(0, len(classes), AT_ONCE)))
    if not ranks.first():
        return None
    weights = torch.cat(parts, 1).to(device).float().T
    labels = torch.tensor(truth)
    right = {1: 0, 5: 0}
    hits, wrong = torch.zeros(len(classes)), Counter[tuple[int, int]]()
    examples: dict[tuple[int, int], list[int]] = {}
    for start, _, places in nearest(split.image_features, weights, 5, device):
        places = places.cpu()
        expected = labels[start : start + len(places)]
        known = expected >= 0
        matches = (places == expected[:, None]) & known[:, None]
        for k in right:
            right[k] += int(matches[:, :k].any(1).sum())
        hits += torch.bincount(expected[matches[:, 0]], minlength=len(classes))
        for row in (known & ~matches[:, 0]).nonzero()[:, 0].tolist():
            pair = int(expected[row]), int(places[row, 0])
            wrong[pair] += 1
            if wrong[pair] <= EXAMPLES:
                examples.setdefault(pair, []).append(start + row)
    counts = torch.bincount(labels[rows], minlength=len(classes))
    figures = {f"top{k}": {"value": right[k] / len(rows), "chance": min(1.0, k / len(classes))} for k in right}
    per_class = (hits / counts)[counts > 0].double().mean().item()
    figures["mean_per_class"] = {"value": per_class, "chance": 1 / len(classes)}
    confused = [
        {"class": classes[a], "taken_for": classes[b], "images": number, "of": int(counts[a]), "rows": examples[a, b]}
        for (a, b), number in sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:PAIRS]
    ]
    return {"classes": classes, "images": len(rows), "templates": templates, **figures, "confused": confused}


def _classes(split: Split) -> tuple[list[str], list[int]] | InputError:
    """Returns the class names and each sample's class number (-1: no label), or the error for a label without a name."""
    names, labels = split.data.classes.names, split.labels
    if names is None:
        names = sorted({label for label in labels if isinstance(label, str)})
    number = {name: i for i, name in enumerate(names)}
    numbers = []
    for label in labels:
        if isinstance(label, str):
            found = number.get(label, int(label) if label.isdecimal() and len(label) < 10 else -1)
        else:
            found = -1 if label is None else label
        if label is not None and not 0 <= found < len(names):
            what = f"{label} of {len(names)} classes" if names else f"the number {label}, and no names"
            error = InputError if names else NamelessError
            return error(f"classnames: expected a name for each label of {split.data}, got {what}")
        numbers.append(found)
    return names, numbers
