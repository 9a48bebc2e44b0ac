"""The results of an evaluation and evaluation.json, whose form readers of other programs know."""

import json
from dataclasses import FrozenInstanceError

import pytest

from simplclip.evaluation import (
    Classification,
    Figure,
    ModelResult,
    Results,
    Retrieval,
    SplitResult,
)
from simplclip.evaluation import run as running

# written by the first version, which had no dataclasses
STORED = """\
{
  "checkpoint": "runs/a/best.pt",
  "model": "siclip-tiny",
  "step": 30,
  "precision": "fp32",
  "versions": {
    "simplclip": "0.1.0",
    "torch": "2.15.0"
  },
  "splits": {
    "部 2": {
      "images": 5,
      "texts": 6,
      "image_to_text": {
        "R@1": {
          "value": 0.2,
          "chance": 0.19999999999999996
        }
      },
      "text_to_image": {
        "R@1": {
          "value": 0.4,
          "chance": 0.25
        }
      },
      "zero_shot": {
        "classes": [
          "red",
          "green"
        ],
        "images": 4,
        "templates": [
          "{}"
        ],
        "top1": {
          "value": 0.5,
          "chance": 0.5
        },
        "top5": {
          "value": 1.0,
          "chance": 1.0
        },
        "mean_per_class": {
          "value": 0.25,
          "chance": 0.5
        }
      },
      "left_out": [
        "no classification of images without a label: 1 of 5"
      ],
      "contact_sheet": "runs/a/evaluation-部 2.png"
    },
    "bare": {
      "images": 3,
      "texts": 0,
      "zero_shot": null,
      "left_out": [],
      "contact_sheet": null
    }
  },
  "baselines": {
    "open_clip:tiny/tiny.bin": {
      "checkpoint": "open_clip:tiny/tiny.bin",
      "model": "open_clip:tiny",
      "step": null,
      "precision": "fp32",
      "splits": {}
    }
  }
}
"""


def stored_results():
    retrieval = Retrieval({"R@1": Figure(0.2, 0.19999999999999996)}, {"R@1": Figure(0.4, 0.25)})
    classification = Classification(
        ["red", "green"], 4, ["{}"], Figure(0.5, 0.5), Figure(1.0, 1.0), Figure(0.25, 0.5)
    )
    left_out = ["no classification of images without a label: 1 of 5"]
    sheet = "runs/a/evaluation-部 2.png"
    splits = {
        "部 2": SplitResult(5, 6, retrieval, classification, left_out, sheet),
        "bare": SplitResult(3, 0),
    }
    tiny = "open_clip:tiny/tiny.bin"
    return Results(
        ModelResult("runs/a/best.pt", "siclip-tiny", 30, "fp32", splits),
        {"simplclip": "0.1.0", "torch": "2.15.0"},
        {tiny: ModelResult(tiny, "open_clip:tiny", None, "fp32")},
    )


def test_the_file_is_that_of_the_first_version(tmp_path):
    file = tmp_path / "evaluation.json"
    running._write(file, stored_results())
    assert file.read_text(encoding="utf-8") == STORED


def test_a_file_gives_the_results_that_were_written():
    results = Results.from_json(json.loads(STORED) | {"hardware": "a key of another program"})
    assert results == stored_results()
    assert [model.model for model in results.models] == ["siclip-tiny", "open_clip:tiny"]
    without_baselines = {k: v for k, v in json.loads(STORED).items() if k != "baselines"}
    assert Results.from_json(without_baselines).to_json() == without_baselines
    with pytest.raises(KeyError, match="precision"):
        Results.from_json({"checkpoint": "a", "model": "b", "step": 1})


def test_results_do_not_change():
    with pytest.raises(FrozenInstanceError):
        stored_results().first.step = 31
