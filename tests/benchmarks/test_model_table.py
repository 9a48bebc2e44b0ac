"""benchmarks.open_clip_models: what works with a model is tried, and what is refused says why."""

import pytest

from benchmarks import open_clip_models


@pytest.mark.slow
def test_a_model_is_tried():
    row = open_clip_models.tried("coca_ViT-B-32")
    assert row["simplify_image"] == row["gradient_cache"] == row["plan"] == "works"
    assert "decoder reads the features" in row["crop_texts"]
    assert row["fold"] == "nothing to fold"


def test_a_fault_is_shown():
    assert open_clip_models.why(lambda: {}["x"]) == "KeyError: 'x'"
    assert open_clip_models.why(lambda: None) == "works"
