"""The results of an evaluation, and their form in evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A share, and what the share would be by chance."""

    value: float
    chance: float


Recall = dict[str, Figure]  # by "R@1", "R@5" and "R@10"


@dataclass(frozen=True)
class Retrieval:
    """R@k of the images of a split, which look for a text, and of its texts."""

    image_to_text: Recall
    text_to_image: Recall

    @property
    def directions(self) -> dict[str, Recall]:
        """R@k by the name of the direction, "image_to_text" and "text_to_image"."""
        return {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}


@dataclass(frozen=True)
class Classification:
    """Zero-shot accuracies over the labels of a split."""

    classes: list[str]
    images: int  # that have a label
    templates: list[str]
    top1: Figure
    top5: Figure
    mean_per_class: Figure


@dataclass(frozen=True)
class SplitResult:
    """The figures of a model on a split."""

    images: int
    texts: int
    retrieval: Retrieval | None = None  # None: no image has a caption
    classification: Classification | None = None  # None: no image has a label
    left_out: list[str] = field(default_factory=list)  # what has no figures, and why
    contact_sheet: str | None = None  # path of the picture

    def to_json(self) -> dict[str, Any]:
        """Returns the value of this split in evaluation.json, which `from_json` reads.

        Without retrieval the keys "image_to_text" and "text_to_image" are missing; without
        classification "zero_shot" is None.
        """
        values: dict[str, Any] = {"images": self.images, "texts": self.texts}
        if self.retrieval is not None:
            values |= asdict(self.retrieval)
        values["zero_shot"] = None
        if self.classification is not None:
            values["zero_shot"] = asdict(self.classification)
        return values | {"left_out": self.left_out, "contact_sheet": self.contact_sheet}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SplitResult:
        """Returns the result of a split from its value in evaluation.json.

        Raises KeyError or TypeError for other content.
        """
        retrieval = classification = None
        if "image_to_text" in values:
            retrieval = Retrieval(
                _recall(values["image_to_text"]), _recall(values["text_to_image"])
            )
        if zero_shot := values["zero_shot"]:
            accuracies = {
                name: Figure(**zero_shot[name]) for name in ("top1", "top5", "mean_per_class")
            }
            classification = Classification(**(zero_shot | accuracies))
        return cls(
            values["images"],
            values["texts"],
            retrieval,
            classification,
            values["left_out"],
            values["contact_sheet"],
        )


def _recall(values: Mapping[str, Any]) -> Recall:
    """Returns R@k from its form in evaluation.json, {"R@1": {"value": ..., "chance": ...}, ...}."""
    return {name: Figure(**figure) for name, figure in values.items()}


@dataclass(frozen=True)
class ModelResult:
    """The figures of a model by split."""

    checkpoint: str
    model: str
    step: int | None  # None: not of a run
    precision: str
    splits: dict[str, SplitResult] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns a model's value in evaluation.json: the fields, with "splits" by name."""
        return {
            "checkpoint": self.checkpoint,
            "model": self.model,
            "step": self.step,
            "precision": self.precision,
            "splits": {name: result.to_json() for name, result in self.splits.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelResult:
        """Returns the result of a model from its value in evaluation.json; other keys are ignored.

        Raises KeyError, TypeError or AttributeError for other content.
        """
        return cls(
            values["checkpoint"],
            values["model"],
            values["step"],
            values["precision"],
            {name: SplitResult.from_json(split) for name, split in values["splits"].items()},
        )


@dataclass(frozen=True)
class Results:
    """The figures of the first model, and those of the other models by the sources that were
    given.
    """

    first: ModelResult
    versions: dict[str, str]  # of this library and of torch
    baselines: dict[str, ModelResult] = field(default_factory=dict)

    @property
    def models(self) -> list[ModelResult]:
        """The results of all models, the first model's at the beginning."""
        return [self.first, *self.baselines.values()]

    def to_json(self) -> dict[str, Any]:
        """Returns the content of evaluation.json.

        The values of the first model and "versions" are at the top; "baselines" has the other
        models by source, and is missing if there are none.
        """
        values = self.first.to_json()
        splits = values.pop("splits")
        values |= {"versions": self.versions, "splits": splits}
        if self.baselines:
            values["baselines"] = {
                source: model.to_json() for source, model in self.baselines.items()
            }
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Results:
        """Returns the results in the content of an evaluation.json; other keys are ignored.

        Raises KeyError, TypeError or AttributeError for other content.
        """
        baselines = values.get("baselines", {})
        return cls(
            ModelResult.from_json(values),
            values["versions"],
            {source: ModelResult.from_json(model) for source, model in baselines.items()},
        )
