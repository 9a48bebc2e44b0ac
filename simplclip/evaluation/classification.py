"""Zero-shot classification: names of classes, phrases around them, and accuracies."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import open_clip
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from simplclip.common.errors import InputError, first_line
from simplclip.data import HeldOut
from simplclip.data.samples import clean
from simplclip.evaluation.encoder import Encoder
from simplclip.evaluation.index import Index, nearest
from simplclip.evaluation.results import Classification, Figure

CLASSES_AT_A_TIME = 10  # whose texts are encoded together, as by open_clip
TEMPLATES = {
    "openai": [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES],
    "simple": [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES],
}


def named(data: HeldOut, classnames: str | os.PathLike | None) -> HeldOut:
    """Returns the data with other names of classes, in the order of class numbers.

    classnames: "imagenet" for open_clip's list; a file with a name a line; None: those of the data.
    If all folders are named by synsets of ImageNet (n01440764, ...), each gets its name in the
    list.
    Raises InputError for another number of names than of folders with images, and for a file that
    is missing or no UTF-8.
    """
    if classnames is None:
        return data
    folders = data.classes.folders
    if str(classnames) == "imagenet":
        names = list(open_clip.IMAGENET_CLASSNAMES)
        by_synset = dict(zip(ImageNetInfo("imagenet1k").label_names(), names))
        if folders and by_synset.keys() >= set(folders):
            names = [by_synset[folder] for folder in folders]
    else:
        names = _lines(classnames, "classnames: expected imagenet or a file of names")
    if folders and len(names) != len(folders):
        raise InputError(
            f"classnames: expected a name for each of the {len(folders)} folders of {data}, got "
            f"{len(names)}"
        )
    return replace(data, classes=replace(data.classes, names=names))


def phrases(templates: str | Sequence[str]) -> list[str]:
    """Returns phrases, each with one {} for the name of a class.

    templates: one or several of: a phrase with {} or {c}; "openai" or "simple", a list of
    open_clip; a .txt file with a phrase a line.
    Raises InputError for a phrase without exactly one {}, and for a file that cannot be read.
    """
    texts: list[str] = []
    for template in [templates] if isinstance(templates, str) else templates:
        if template.endswith(".txt") and "{" not in template:
            texts += _lines(template, "templates: expected openai, simple, or a file of phrases")
        else:
            texts += TEMPLATES.get(template, [template])
    texts = [text.replace("{c}", "{}") for text in texts]
    for text in texts:
        if not re.fullmatch(r"[^{}]*\{\}[^{}]*", text):
            raise InputError(
                "template: expected a phrase with one {} for the label, openai, simple, or a file, "
                f"got {text!r}"
            )
    return texts


def _lines(path: str | os.PathLike, expected: str) -> list[str]:
    """Returns the lines of a UTF-8 text file, stripped, without empty lines."""
    try:
        lines = map(clean, Path(path).read_text("utf-8-sig").splitlines())
    except (OSError, ValueError) as error:
        raise InputError(f"{expected}, got {os.fspath(path)}: {first_line(error)}") from None
    return [line for line in lines if line]


@torch.no_grad()
def zero_shot(encoder: Encoder, index: Index, templates: Sequence[str]) -> Classification | None:
    """Returns zero-shot accuracies of encoded images, by their labels.

    None with fewer than two classes or no label. Images without a label are skipped.
    Each class's weight is the mean of its features over `templates`, see `phrases` (open_clip's
    build_zero_shot_classifier). mean_per_class is the mean over the classes of the share of their
    images that are right.
    encoder: the one of the images; here it encodes the names of the classes.

    Raises InputError for a label that is not a known class, and if a feature of a name is not
    finite.
    """
    templates = phrases(templates)
    classes, numbers = _classes(index)
    labels = torch.tensor(numbers)
    labelled = labels >= 0
    if len(classes) < 2 or not labelled.any():
        return None
    features = index.image_features[labelled]
    labels = labels[labelled]
    weights = class_weights(encoder, classes, templates)
    parts = nearest(features, weights.T, 5, encoder.device)
    hits = torch.cat([rows.cpu() for _, _, rows in parts]) == labels[:, None]
    counts = labels.bincount(minlength=len(classes))
    right_counts = labels[hits[:, 0]].bincount(minlength=len(classes))
    per_class = (right_counts / counts)[counts > 0].double().mean().item()

    def top(k: int) -> Figure:
        right = int(hits[:, :k].any(1).sum())
        return {"value": right / len(labels), "chance": min(1.0, k / len(classes))}

    return {
        "classes": classes,
        "images": len(labels),
        "templates": templates,
        "top1": top(1),
        "top5": top(5),
        "mean_per_class": {"value": per_class, "chance": 1 / len(classes)},
    }


def class_weights(encoder: Encoder, classes: list[str], templates: list[str]) -> Tensor:
    """Returns a feature [D] of each class, float32 [D, classes], the mean over `templates`."""
    weights = []
    for start in range(0, len(classes), CLASSES_AT_A_TIME):
        names = classes[start : start + CLASSES_AT_A_TIME]
        texts = [template.format(name) for name in names for template in templates]
        features = encoder.features("text", encoder.tokenizer(texts))
        weights.append(features.unflatten(0, (len(names), len(templates))).mean(1))
    return nn.functional.normalize(torch.cat(weights), dim=-1).T


def _classes(index: Index) -> tuple[list[str], list[int]]:
    """Returns the class names, of the data or else the sorted labels, and numbers (-1: no label).

    Equal names are one class if labels are names, and a class for each number else.
    """
    labels = [row.label for row in index.rows]
    words = {label for label in labels if isinstance(label, str)}
    names = index.data.classes.names
    if names is None:
        names = sorted(words)
    if not words.isdisjoint(names):
        names = list(dict.fromkeys(names))
    numbers: dict[str | int | None, int] = {None: -1}
    for number in range(len(names)):
        numbers |= {number: number, str(number): number}
    numbers |= {name: number for number, name in enumerate(names)}
    for label in labels:
        if label not in numbers:
            raise InputError(
                f"classnames: expected a name for each label of {index.data}, got the label "
                f"{label!r} and {len(names)} names"
            )
    return names, [numbers[label] for label in labels]
