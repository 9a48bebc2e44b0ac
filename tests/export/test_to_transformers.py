"""Exports for transformers: it loads them, and computes the same features."""

import pytest
import torch
import transformers
from PIL import Image

import simplclip
from simplclip import export
from simplclip.common.errors import InputError
from support.models.exported_models import HF, SIGLIP, TIMM, VIT
from support.programs import call, one_line
from support.train.runs import save_run

pytestmark = pytest.mark.slow

TEXTS = ["a red heart", "", "Two dogs!  on a beach ", "it's 7 o'clock", 90 * "words "]
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
FILES |= {"tokenizer.json", "tokenizer_config.json"}
SMALL = {"vision_cfg": {"image_size": 48}, "text_cfg": {"context_length": 20}}
MODELS = {
    "CLIP": (VIT, {}, "CLIPModel"),
    "CLIP, other sizes and QuickGELU": (VIT, SMALL | {"quick_gelu": True}, "CLIPModel"),
    "CLIP with a text tower of its own": (VIT, {"custom_text": True}, "CLIPModel"),
    "SigLIP": (SIGLIP, {}, "SiglipModel"),
}


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_features_are_those_of_the_model(case, tmp_path, capsys):
    name, options, kind = MODELS[case]
    save_run(tmp_path / "run", f"open_clip:{name}", **options)
    encoder = simplclip.load(tmp_path / "run", device="cpu")
    export.run(tmp_path / "run", tmp_path / "out", to="transformers")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line[:4] == "    "]
    names = {}
    exec("\n".join(lines), names)
    model, processor = names["model"].eval(), names["processor"]
    assert type(model).__name__ == kind

    pictures = [Image.effect_noise((60, 40), 90).convert("RGB").rotate(9 * i) for i in range(3)]
    pixels = torch.stack([encoder.preprocess(picture) for picture in pictures])
    inputs = processor(
        text=TEXTS, images=pictures, padding="max_length", truncation=True, return_tensors="pt"
    )
    results = model(**inputs | {"pixel_values": pixels})
    expected = encoder.features("image", pixels), encoder.encode_text(TEXTS)
    torch.testing.assert_close(results.image_embeds, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(results.text_embeds, expected[1], rtol=0, atol=1e-5)
    logits = encoder.logit_scale * expected[0] @ expected[1].T
    if kind == "SiglipModel":
        logits += encoder.model.logit_bias
    torch.testing.assert_close(results.logits_per_image, logits, rtol=0, atol=1e-4)
    # torchvision and PIL round resized pixels differently
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=2.01 / 255 / 0.26)

    classify = transformers.pipeline("zero-shot-image-classification", str(tmp_path / "out"))
    labels = ["cat", "dog", "heart"]
    scores = classify(pictures[0], candidate_labels=labels, hypothesis_template="a {}")
    texts = encoder.encode_text([f"a {label}" for label in labels])
    shares = encoder.logit_scale * expected[0][:1] @ texts.T
    if kind == "SiglipModel":
        shares = (shares + encoder.model.logit_bias).sigmoid()
    else:
        shares = shares.softmax(-1)
    found = {row["label"]: row["score"] for row in scores}
    assert found == pytest.approx(dict(zip(labels, shares[0].tolist())), abs=0.02)


REFUSED = {
    "timm's ViT without pooling by attention": (f"open_clip:{TIMM}", {}, "image tower: expected"),
    "simplified blocks": (f"open_clip:{VIT}", {"simplify_options": {}}, "blocks: expected"),
    "another tokenizer": (f"open_clip:{HF}", {}, "tokenizer: expected"),
    "other pooling": (
        f"open_clip:{VIT}",
        {"vision_cfg": {"pool_type": "avg"}},
        "image tower: expected the features of transformers' CLIPModel, got others",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_lacks_is_refused_by_name(case, tmp_path):
    name, options, message = REFUSED[case]
    save_run(tmp_path / "run", name, **options)
    with pytest.raises(InputError, match=message):
        export.run(tmp_path / "run", tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


def test_an_export_of_another_form_is_not_replaced(tmp_path):
    save_run(tmp_path / "run", f"open_clip:{VIT}")
    command = ("export", tmp_path / "run", "--out", tmp_path / "out", "--force", "--to")
    for _ in range(2):
        assert not call(*command, "transformers").exit_code
    error = one_line(*command, "open_clip")
    assert "out: expected an empty folder, or with --force one with an export" in error
    with pytest.raises(FileNotFoundError, match="expected a file of weights, or the folder of a"):
        simplclip.load(tmp_path / "out")
