"""Each recipe is a model that is complete, and is in the docs."""

import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image

from simplclip import models
from simplclip.models.naming import NAMES, configs
from simplclip.models.presets import SPECS
from simplclip.models.simplify import MapBlock, TransformerBlock
from simplclip.train import config

TRAINING = Path(__file__).parents[2] / "docs" / "training.md"


@cache
def made(name):
    """Returns the model on the meta device, the same in each test."""
    return models.create(name, device="meta").eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_preset_makes_a_model_with_its_tokenizer_and_transform(name):
    model = made(name)
    tokens = models.tokenizer(name)(["a red heart"])
    image = models.transforms(name, train=True)(Image.new("RGB", (40, 30)))[None]
    assert tokens.max() < model.vocab_size
    assert tokens.shape == (1, model.context_length)
    assert models.spec_of(name).simplify is None or model.simplify_report.replaced
    width = models.spec_of(name).config["embed_dim"]
    assert model.encode_image(image.to("meta")).shape == (1, width)
    assert model.encode_text(tokens.to("meta")).shape == (1, width)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_names_its_own_trunk_everywhere(name):
    """In SPECS and _vit_over; timm takes another name without an error."""
    trunk = models.spec_of(name).config["vision_cfg"]["timm_model_name"]
    assert made(name).visual.trunk.pretrained_cfg["architecture"] == trunk
    assert trunk in (f"{name.replace('-', '_')}_trunk", "fastvit_mci0")


def test_s0_is_mobileclip2_s0_with_simplified_blocks():
    s0 = made("siclip2-s0")
    assert type(s0) is CustomTextCLIP
    assert sum(isinstance(m, MapBlock) for m in s0.modules()) == 2
    blocks = s0.text.transformer.resblocks
    assert all(isinstance(block, TransformerBlock) and not block.causal for block in blocks)
    for part in ("qk", "fc1"):
        shared = [getattr(a, part) is getattr(b, part) for a, b in pairwise(blocks)]
        assert shared == [True, False] * 5 + [True]
    report = s0.simplify_report
    assert report.before["total"] == 74_835_073
    assert report.after["total"] < 0.7 * report.before["total"]


@pytest.mark.parametrize("name", ["siclip-s0", "siclip2-s0"])
def test_the_config_of_a_preset_trains_it(name):
    loaded = config.load(name, ["data.train=x.tar"])
    assert loaded.model.name == name
    assert loaded.run.out == f"runs/{name}"


def test_names_and_configs_need_no_torch():
    check = "from simplclip.models import naming; import sys; "
    check += "assert naming.configs().keys() < {*naming.NAMES} and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_preset_has_a_name_and_is_in_the_docs():
    assert sorted(SPECS) == sorted(NAMES)
    assert configs().keys() == {"siclip-s0", "siclip2-s0"}
    assert [name for name in NAMES if f"| `{name}` |" not in TRAINING.read_text()] == []
