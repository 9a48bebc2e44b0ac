"""What works with each model of open_clip is what the committed file says, which docs/open_clip.md
shows: on models without weights, whose own transformers have two layers.
"""

import csv

import open_clip
import pytest
import torch

from simplclip import crop_texts, fold, gradient_cache, models, simplify
from simplclip.common.errors import UserError
from simplclip.models.presets import Spec
from support.paths import ROOT

with open(ROOT / "benchmarks" / "results" / "open-clip-models-2026-12-02.csv") as file:
    ROWS = {(row["model"], row["open_clip"]): row for row in csv.DictReader(file)}
SHORT = {"layers": 2}
NARROW = SHORT | {"width": 32, "heads": 2}
IMAGE = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}


def outcome(function):
    """Returns "works", what `function` returns, or "refused"."""
    try:
        return function() or "works"
    except UserError:
        return "refused"


def narrow(config):
    """Returns a model with values: a narrow text tower beside a small image tower."""
    changes = {"embed_dim": 16, "custom_text": True, "text_cfg": NARROW}
    image = IMAGE | {"output_tokens": "multimodal_cfg" in config}
    if "multimodal_cfg" in config:
        changes["multimodal_cfg"] = config["multimodal_cfg"] | NARROW
    return models.create(Spec(config | {"vision_cfg": image}), **changes).eval()


@torch.no_grad()
def cropped(config):
    """Compares features of cropped texts with those of padded ones."""
    model, text_cfg = narrow(config), config["text_cfg"]
    text = torch.full((4, text_cfg.get("context_length", 77)), text_cfg.get("pad_id", 0))
    for row, count in zip(text, (3, 9, min(17, len(text[0])), min(30, len(text[0])))):
        row[:count] = torch.arange(5, 5 + count)
        row[count - 1] = text_cfg.get("eos_id") or model.text.vocab_size - 1
    padded = model.encode_text(text)
    crop_texts(model, groups=2)
    torch.testing.assert_close(model.encode_text(text), padded, rtol=0, atol=1e-4)


def folded(model):
    kinds = [type(module) for module in model.modules()]
    same = [type(module) for module in fold(model.eval()).modules()] == kinds
    return "nothing to fold" if same else None


@pytest.mark.prove
@pytest.mark.parametrize("name", open_clip.list_models())
def test_what_works_is_what_the_file_says(name):
    config = open_clip.get_model_config(name)
    if "hf_model_name" in config["text_cfg"]:
        pytest.skip(f"{name}: its text tower needs a download from Hugging Face")
    own = {"text_cfg": SHORT}
    if isinstance(config["vision_cfg"].get("layers"), int):
        own["vision_cfg"] = SHORT
    if "multimodal_cfg" in config:
        own["multimodal_cfg"] = config["multimodal_cfg"] | SHORT
    with torch.device("meta"):
        model = models.create(f"open_clip:{name}", device="meta", **own)
        found = {
            "gradient_cache": outcome(lambda: gradient_cache.check(model.train())),
            "fold": outcome(lambda: folded(model)),
            "simplify_text": outcome(lambda: simplify(model, towers=("text",)) and None),
            "simplify_image": outcome(lambda: simplify(model, towers=("image",)) and None),
        }
    found["crop_texts"] = outcome(lambda: cropped(config))
    row = ROWS[name, open_clip.__version__]
    shown = ("works", "nothing to fold")  # else the file has the error
    assert found == {name: row[name] if row[name] in shown else "refused" for name in found}
