"""Each file of models/presets is a model that is complete, and is in the docs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from simplclip import models
from simplclip.models import presets
from simplclip.train import config

TRAINING = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.mark.parametrize("name", presets.NAMES)
@torch.no_grad()
def test_a_preset_makes_a_model_with_its_tokenizer_and_transform(name):
    model = models.create(name, device="meta").eval()
    tokens = models.tokenizer(name)(["a red heart"])
    image = models.transforms(name, train=True)(Image.new("RGB", (40, 30)))[None]
    assert tokens.max() < model.vocab_size
    assert models.spec_of(name).simplify is None or model.simplify_report.replaced
    width = models.spec_of(name).config["embed_dim"]
    assert model.encode_image(image.to("meta")).shape == (1, width)
    assert model.encode_text(tokens.to("meta")).shape == (1, width)


@pytest.mark.parametrize("name", presets.configs())
def test_the_config_of_a_preset_trains_it(name):
    loaded = config.load(name, ["data.train=x.tar"])
    assert loaded.model.name == name
    assert loaded.run.out == f"runs/{name}"


def test_names_and_configs_need_no_torch():
    check = "from simplclip.models import presets; import sys; "
    check += "assert presets.configs().keys() <= {*presets.NAMES} and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_preset_is_in_the_docs():
    assert [name for name in presets.NAMES if f"| `{name}` |" not in TRAINING.read_text()] == []
