"""examples/export_onnx.py: onnxruntime computes torch's features, of every form of a simplified
block.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import simplclip
from simplclip.models.simplify import MapBlock
from support.models.weights import randomise
from support.programs import load_example
from support.train.runs import save_run

pytestmark = pytest.mark.long


exporting = load_example("export_onnx")


@pytest.mark.slow
def test_a_checkpoint_is_exported_for_any_number_of_inputs_and_padding_is_masked(tmp_path, capsys):
    name = "open_clip:ViT-B-32"
    options = {
        "custom_text": True,
        "text_cfg": {"no_causal_mask": True, "width": 32, "heads": 2, "layers": 1},
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 112},
        "simplify_options": {"mask_padding": True},
    }
    save_run(tmp_path, name, **options)
    exporting.main([str(tmp_path), "--out", str(tmp_path / "onnx")])
    assert "largest error" in capsys.readouterr().out
    about = json.loads((tmp_path / "onnx/preprocessing.json").read_text())
    assert (about["image"]["size"], about["text"]["context_length"]) == ([224, 224], 77)
    encoder = simplclip.load(tmp_path, device="cpu")
    words = ["a", "two dogs on a beach", "", "red " * 90, "café", "x y z", "!"]
    inputs = {"image": torch.rand(7, 3, 224, 224), "text": encoder.tokenizer(words)}
    for tower, every in inputs.items():
        graph = onnx.load(tmp_path / "onnx" / f"{tower}.onnx")
        onnx.checker.check_model(graph)
        assert {node.domain for node in graph.graph.node} == {""}  # standard operators alone
        session = onnxruntime.InferenceSession(tmp_path / "onnx" / f"{tower}.onnx")
        for batch in (1, 2, 7):
            rows = every[-batch:]
            (features,) = session.run(None, {tower: rows.numpy()})
            assert np.abs(features - encoder.features(tower, rows).numpy()).max() < 1e-5
        assert np.abs(features[0] - features[1]).max() > 1e-3  # features differ between inputs
    padded = torch.where(every == 0, 99, every)
    (other,) = session.run([f"{tower}_features"], {tower: padded.numpy()})
    assert np.array_equal(other, features)


class Maps(nn.Module):
    """siclip2-s0's block on maps, with projections, RMSNorm and another activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, 4)
        self.first = MapBlock(32, 2, value=True, output=True, norm="rmsnorm", act="quickgelu")
        self.second = MapBlock(32, 4, mlp_ratio=3.0, act="gelu_tanh")

    def encode_image(self, images, normalize):
        return nn.functional.normalize(
            self.second(self.first(self.stem(images))).mean((2, 3)), dim=-1
        )


@pytest.mark.prove
def test_every_form_of_a_simplified_block_and_an_error_that_is_seen(tmp_path, monkeypatch):
    model, images = randomise(Maps()), torch.randn(3, 3, 20, 28)

    def error():
        return exporting.export(model, "image", images, tmp_path / "image.onnx")

    assert error() < 1e-5
    mlp = exporting.mlp
    monkeypatch.setattr(exporting, "mlp", lambda *args: 1.01 * mlp(*args))
    assert error() > 1e-4


def test_a_size_that_is_one_number_and_a_wrong_file_ends_the_script(tmp_path, monkeypatch):
    """open_clip's ResNets have one number; an assertion would not hold under python -O."""
    model = nn.Module()
    model.visual = SimpleNamespace(image_size=224)
    encoder = SimpleNamespace(model=model, tokenizer=lambda texts: torch.zeros(2, 77))
    shapes = []

    def export(model, name, inputs, file):
        shapes.append(list(inputs.shape))
        file.touch()
        return math.nan

    monkeypatch.setattr(simplclip, "load", lambda source, device: encoder)
    monkeypatch.setattr(exporting, "export", export)
    with pytest.raises(SystemExit, match=r"image.onnx: expected torch's features"):
        exporting.main(["run", "--out", str(tmp_path)])
    assert shapes == [[2, 3, 224, 224]]
