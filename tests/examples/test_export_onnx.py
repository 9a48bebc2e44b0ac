"""examples/export_onnx.py: masked padding, and every form of a simplified block. A whole export: test_your_photos.py."""

import example
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from weights import randomise

from simplclip import models
from simplclip.models.simplify import MapBlock

exporting = example.load("export_onnx")


@pytest.mark.slow
def test_padding_is_masked(tmp_path):
    options = {"custom_text": True, "text_cfg": {"no_causal_mask": True, "width": 32, "heads": 2, "layers": 2}}
    model = randomise(models.create("open_clip:ViT-B-32", simplify_options={"mask_padding": True}, **options))
    tokens = models.tokenizer("open_clip:ViT-B-32")(["a cat", "two dogs on a beach", "red " * 20])
    assert exporting.export(model, "text", tokens, tmp_path / "text.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "text.onnx")
    other = torch.where(tokens == 0, 99, tokens)
    (features,), (expected,) = (session.run(None, {"text": rows.numpy()}) for rows in (other, tokens))
    assert np.array_equal(features, expected)


class Maps(nn.Module):
    """siclip2-s0's block on maps, with value and output projections, RMSNorm and another activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.first = MapBlock(32, 2, value=True, output=True, norm="rmsnorm", act="quickgelu")
        self.second = MapBlock(32, 4, mlp_ratio=3.0, act="gelu_tanh")

    def encode_image(self, images, normalize):
        return nn.functional.normalize(self.second(self.first(self.stem(images))).mean((2, 3)), dim=-1)


@pytest.mark.slow
def test_every_form_of_a_simplified_block_and_an_error_that_is_seen(tmp_path, monkeypatch):
    model, images = randomise(Maps()), torch.randn(3, 3, 20, 28)

    def error():
        return exporting.export(model, "image", images, tmp_path / "image.onnx")

    assert error() < 1e-5
    mlp = exporting.mlp
    monkeypatch.setattr(exporting, "mlp", lambda *args: 1.01 * mlp(*args))
    assert error() > 1e-4
