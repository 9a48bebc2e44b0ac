"""The results of an evaluation and evaluation.json, whose form readers of other programs know."""

import json

import pytest
from pydantic import ValidationError

from simplclip.evaluation import Classification, Figure, ModelResult, Results, SplitResult
from simplclip.evaluation import run as running

# as the first version wrote them, which had no dataclasses
STORED = {
    "checkpoint": "runs/a/best.pt",
    "model": "siclip-tiny",
    "step": 30,
    "precision": "fp32",
    "versions": {"simplclip": "0.1.0", "torch": "2.15.0"},
    "splits": {
        "部 2": {
            "images": 5,
            "texts": 6,
            "image_to_text": {"R@1": {"value": 0.2, "chance": 0.19999999999999996}},
            "text_to_image": {"R@1": {"value": 0.4, "chance": 0.25}},
            "zero_shot": {
                "classes": ["red", "green"],
                "images": 4,
                "templates": ["{}"],
                "top1": {"value": 0.5, "chance": 0.5},
                "top5": {"value": 1.0, "chance": 1.0},
                "mean_per_class": {"value": 0.25, "chance": 0.5},
            },
            "left_out": ["no classification of images without a label: 1 of 5"],
            "contact_sheet": "runs/a/evaluation-部 2.png",
        },
        "bare": {
            "images": 3,
            "texts": 0,
            "zero_shot": None,
            "left_out": [],
            "contact_sheet": None,
        },
    },
    "baselines": {
        "open_clip:tiny/tiny.bin": {
            "checkpoint": "open_clip:tiny/tiny.bin",
            "model": "open_clip:tiny",
            "step": None,
            "precision": "fp32",
            "splits": {},
        }
    },
}


def stored_results():
    split = SplitResult(
        images=5,
        texts=6,
        image_to_text={"R@1": Figure(value=0.2, chance=0.19999999999999996)},
        text_to_image={"R@1": Figure(value=0.4, chance=0.25)},
        zero_shot=Classification(
            classes=["red", "green"],
            images=4,
            templates=["{}"],
            top1=Figure(value=0.5, chance=0.5),
            top5=Figure(value=1.0, chance=1.0),
            mean_per_class=Figure(value=0.25, chance=0.5),
        ),
        left_out=["no classification of images without a label: 1 of 5"],
        contact_sheet="runs/a/evaluation-部 2.png",
    )
    tiny = "open_clip:tiny/tiny.bin"
    other = ModelResult(checkpoint=tiny, model="open_clip:tiny", step=None, precision="fp32")
    return Results(
        checkpoint="runs/a/best.pt",
        model="siclip-tiny",
        step=30,
        precision="fp32",
        versions={"simplclip": "0.1.0", "torch": "2.15.0"},
        splits={"部 2": split, "bare": SplitResult(images=3, texts=0)},
        baselines={tiny: other},
    )


def test_the_file_is_that_of_the_first_version(tmp_path):
    file = tmp_path / "evaluation.json"
    running.write_json(file, stored_results())
    wanted = json.dumps(STORED, indent=2, ensure_ascii=False) + "\n"
    assert file.read_text(encoding="utf-8") == wanted


def test_a_file_gives_the_results_that_were_written():
    results = Results.model_validate(STORED | {"hardware": "a key of another program"})
    assert results == stored_results()
    assert [model.model for model in results.models] == ["siclip-tiny", "open_clip:tiny"]
    without_baselines = {k: v for k, v in STORED.items() if k != "baselines"}
    assert Results.model_validate(without_baselines).model_dump() == without_baselines
    with pytest.raises(ValidationError, match="precision"):
        Results.model_validate({"checkpoint": "a", "model": "b", "step": 1})
