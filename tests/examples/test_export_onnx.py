"""examples/export_onnx.py: onnxruntime computes torch's features."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import simplclip
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
