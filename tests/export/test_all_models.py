"""Every model that is exported loads in open_clip, in another process and another folder."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import simplclip
from simplclip import export, models
from support.models.exported_models import HF, VIT
from support.train.runs import save_run


def sizes(image_size, **text):
    return {"vision_cfg": {"image_size": image_size}, "text_cfg": text}


SHORT = {"context_length": 20, "layers": 1}
# this library's models, and open_clip's, plain and simplified; most have other sizes, as after a
# warm start
MODELS = {
    "siclip-tiny": {
        **sizes(64, context_length=12),
        "simplify_options": {"share": {"text": [[0, 1]]}},
    },
    "siclip-lite0": sizes(64, context_length=20),
    "mobileclip-s0": sizes(128, **SHORT),
    "siclip-s0": {**sizes(128, **SHORT), "init_logit_bias": -3.0},
    "siclip2-s0": {
        **sizes(128, **SHORT),
        "simplify_options": {"share": {}, "mask_padding": True},
    },
    f"open_clip:{VIT}": {**sizes(48, context_length=20), "quick_gelu": True},
    f"open_clip:{HF}": {
        **sizes(48, no_causal_mask=True),
        "simplify_options": {"share": {"text": {"mlp": [[0, 1]]}}, "mask_padding": True},
        "custom_text": True,
    },
}
ELSEWHERE = """
import open_clip, os, torch
from PIL import Image
from simplclip.integrations.open_clip import register_models
register_models()
torch.set_num_threads(1)
texts, pictures = torch.load("../inputs.pt")
loaded = {}
for folder in os.listdir():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    pixels = torch.stack([preprocess(Image.fromarray(picture.numpy())) for picture in pictures])
    with torch.no_grad():
        image = model.eval().encode_image(pixels, normalize=True)
        text = model.encode_text(tokens, normalize=True)
    loaded[folder] = pixels, tokens, image, text, model.logit_scale.item()
torch.save(loaded, "../loaded.pt")
"""


QUICK = ("siclip-tiny", f"open_clip:{VIT}", f"open_clip:{HF}")
REST = sorted({*MODELS, *models.names()} - {*QUICK})


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(REST, marks=pytest.mark.prove)], ids=["some", "rest"]
)
@torch.no_grad()
def test_every_model_loads_in_open_clip_in_another_process_and_folder(names, tmp_path, monkeypatch):
    texts = ["a red heart", "", "Two dogs!  on a <b>beach</b> ", "naïve café №7", 30 * "words "]
    pictures = torch.randint(0, 256, (4, 20, 50, 3), dtype=torch.uint8).repeat_interleave(3, 1)
    monkeypatch.chdir(tmp_path)
    encoders = {}
    for name in names:
        save_run(Path("run"), name, **MODELS.get(name, {}))
        encoders[name] = simplclip.load("run", device="cpu")
        export.run("run", "export")
        exported = simplclip.load("export", device="cpu")
        assert exported.fingerprint() == encoders[name].fingerprint()
        assert torch.equal(exported.tokenizer(texts), encoders[name].tokenizer(texts))
        Path("elsewhere").mkdir(exist_ok=True)
        Path("export").rename(Path("elsewhere", name))
        shutil.rmtree("run")
    torch.save((texts, pictures), "inputs.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd="elsewhere", check=True)
    loaded = torch.load("loaded.pt")
    assert loaded.keys() == {*names}
    for name, (pixels, tokens, image, text, scale) in loaded.items():
        encoder, opened = encoders[name], [Image.fromarray(picture.numpy()) for picture in pictures]
        ours = torch.stack([*map(encoder.preprocess, opened)])
        torch.testing.assert_close(pixels, ours, rtol=0, atol=2e-6)
        assert torch.equal(tokens, encoder.tokenizer(texts)), name
        torch.testing.assert_close(image, encoder.encode_image(opened), rtol=0, atol=1e-6)
        torch.testing.assert_close(text, encoder.encode_text(texts), rtol=0, atol=1e-6)
        assert math.exp(scale) == pytest.approx(encoder.logit_scale)
