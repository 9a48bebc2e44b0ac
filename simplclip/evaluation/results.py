"""The results of evaluations; `model_dump` gives the content of evaluation.json or blend.json."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

BLEND = "blend.json"


class _Result(BaseModel, frozen=True):
    """What evaluation.json has of a result; other keys there are ignored."""

    missing: ClassVar[tuple[str, ...]] = ()  # fields that the file lacks if they are empty

    @model_serializer(mode="wrap")
    def _without_missing(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = fields(self)
        return {name: value for name, value in values.items() if value or name not in self.missing}


class Figure(_Result):
    """A share, and what the share would be by chance."""

    value: float
    chance: float


Recall = dict[str, Figure]  # by "R@1", "R@5" and "R@10"


class Retrieval(_Result):
    """R@k of the images of a split, which look for a text, and of its texts."""

    image_to_text: Recall
    text_to_image: Recall

    @property
    def directions(self) -> dict[str, Recall]:
        """R@k by the name of the direction, "image_to_text" and "text_to_image"."""
        return dict(self)


class Classification(_Result):
    """Zero-shot accuracies over the labels of a split."""

    classes: list[str]
    images: int  # that have a label
    templates: list[str]
    top1: Figure
    top5: Figure
    mean_per_class: Figure


class SplitResult(_Result):
    """The figures of a model on a split."""

    missing = ("image_to_text", "text_to_image")

    images: int
    texts: int
    image_to_text: Recall | None = None  # None: no image has a caption
    text_to_image: Recall | None = None
    zero_shot: Classification | None = None  # None: no image has a label
    left_out: list[str] = []  # what has no figures, and why
    contact_sheet: str | None = None  # path of the picture

    @property
    def retrieval(self) -> Retrieval | None:
        """R@k in both directions; None if no image has a caption."""
        if self.image_to_text is None or self.text_to_image is None:
            return None
        return Retrieval(image_to_text=self.image_to_text, text_to_image=self.text_to_image)

    @property
    def first_right(self) -> Figure:
        """The share of queries whose first answer is right: the mean R@1 of both directions, or
        top 1 without captions.
        """
        if self.retrieval is None:
            assert self.zero_shot is not None  # an evaluation has one of them
            return self.zero_shot.top1
        both = [figures["R@1"] for figures in self.retrieval.directions.values()]
        value, chance = (sum(pair) / 2 for pair in zip(*((f.value, f.chance) for f in both)))
        return Figure(value=value, chance=chance)


class _Evaluated(_Result):
    """Which model was evaluated."""

    checkpoint: str
    model: str
    step: int | None  # None: not of a run
    precision: str


class ModelResult(_Evaluated):
    """The figures of a model by split."""

    splits: dict[str, SplitResult] = {}


class Results(_Evaluated):
    """The figures of the first model, and those of the other models by the sources that were
    given.
    """

    missing = ("baselines",)

    versions: dict[str, str]  # of this library and of torch
    splits: dict[str, SplitResult] = {}
    baselines: dict[str, ModelResult] = {}

    @property
    def models(self) -> list[ModelResult | Results]:
        """The results of all models, the first model's at the beginning."""
        return [self, *self.baselines.values()]


class BlendRow(BaseModel, frozen=True):
    """The figures of one blend."""

    alpha: float
    mean: float  # of the splits' `first_right`
    splits: dict[str, SplitResult]


class BlendResults(_Evaluated):
    """The figures of blends between a run and its start, the content of blend.json."""

    versions: dict[str, str]
    start: str  # what named the weights with which the run began
    best: float  # the alpha of the highest mean; of equal ones the lowest
    rows: list[BlendRow]
