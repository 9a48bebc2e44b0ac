"""register_models: open_clip's factory makes this library's models."""

import json

import open_clip
import pytest
import torch
from open_clip import create_model as imported_before
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image

from simplclip import models
from simplclip.common.errors import InputError
from simplclip.integrations.open_clip import register_models
from simplclip.models.mobileclip import TextTower
from simplclip.models.simplify import TransformerBlock
from support.models.mobileclip_s0 import SMALL, SMALL_FEATURES, small_state

pytestmark = pytest.mark.long


TINY = {"width": 16, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def registered():
    """The names of the models, which open_clip knows from here on."""
    return register_models()


@pytest.mark.slow
def test_open_clip_gives_the_models_tokenizers(registered):
    assert registered == models.names()
    assert {*registered} <= {*open_clip.list_models()}
    texts = ["a cat", "two dogs " * 60]
    for name in registered:
        assert torch.equal(open_clip.get_tokenizer(name)(texts), models.tokenizer(name)(texts))
        assert open_clip.get_tokenizer(name, context_length=9)(texts).shape == (2, 9)
    assert open_clip.get_tokenizer("ViT-B-32")(texts).shape == (2, 77)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["published", "ours"])
def test_it_makes_mobileclip_s0_from_a_file(registered, tmp_path, of):
    options, file = {"text_cfg": SMALL, "embed_dim": SMALL_FEATURES}, str(tmp_path / "weights.pt")
    if of == "published":
        state = small_state()
    else:
        state = models.create("mobileclip-s0", **options).state_dict()
    torch.save({"state_dict": state}, file)
    model, train, transform = open_clip.create_model_and_transforms(
        "mobileclip-s0", pretrained=file, **options
    )
    assert type(model) is CustomTextCLIP
    wanted = models.create("mobileclip-s0", checkpoint=file, **options)
    torch.testing.assert_close(model.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    picture = Image.effect_noise((300, 270), 80).convert("RGB")
    ours = models.transforms("mobileclip-s0", train=False)(picture)
    torch.testing.assert_close(transform(picture), ours, rtol=0, atol=1.01 / 255)
    assert train(picture).shape == (3, 256, 256)
    with pytest.raises(RuntimeError, match="Pretrained value 'gone.pt' is not a known tag"):
        open_clip.create_model("mobileclip-s0", "gone.pt")


@pytest.mark.slow
def test_open_clips_arguments_work(registered):
    sizes = {"force_image_size": 128, "force_context_length": 20}
    model = imported_before("mobileclip-s0", **sizes, precision="bf16", output_dict=True)
    assert model.visual.image_size == (128, 128)
    assert model.text.positional_embedding.shape == (20, 512)
    out = model(torch.randn(2, 3, 128, 128).bfloat16(), torch.randint(1, 99, (2, 20)))
    assert out["text_features"].dtype == torch.bfloat16
    forced = {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    options = {"force_quick_gelu": True, "nonscalar_logit_scale": True, "device": "meta"}
    model = open_clip.create_model("mobileclip-s0", force_preprocess_cfg=forced, **options)
    assert model.logit_scale.shape == (1,)
    assert model.visual.preprocess_cfg.items() >= {**forced, "std": (1.0, 1.0, 1.0)}.items()
    assert model.logit_scale.is_meta


@pytest.mark.slow
def test_it_makes_siclips(registered):
    for name in ("siclip-s0", "siclip-tiny"):
        model = open_clip.create_model(name, device="meta")
        own = models.create(name, device="meta")
        shapes, expected = (
            {key: value.shape for key, value in made.state_dict().items()} for made in (model, own)
        )
        assert shapes == expected
        assert any(isinstance(module, TransformerBlock) for module in model.modules())


@pytest.mark.slow
def test_other_models_are_open_clips_own(registered):
    theirs = open_clip.factory.create_model.__wrapped__
    tiny = {"vision_cfg": {"layers": 1, "width": 64, "patch_size": 112}, "text_cfg": {"layers": 1}}
    torch.manual_seed(0)
    expected = theirs("ViT-B-32", **tiny)
    torch.manual_seed(0)
    found = open_clip.create_model("ViT-B-32", **tiny)
    assert type(found) is CLIP
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
    assert (open_clip.factory.CLIP, open_clip.factory.CustomTextCLIP) == (CLIP, CustomTextCLIP)
    assert open_clip.factory.convert_state_dict is open_clip.convert.convert_state_dict
    made = open_clip.create_model
    assert register_models() == registered  # a second call changes nothing
    assert open_clip.create_model is open_clip.factory.create_model is made


def test_an_error_leaves_open_clip_as_it_was(registered, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match=r"Missing key.*logit_scale"):
        open_clip.create_model("mobileclip-s0", str(tmp_path / "other.pt"))
    assert open_clip.factory.CustomTextCLIP is CustomTextCLIP


def test_its_text_tower_is_one_of_open_clips(registered):
    model = open_clip.create_model("mobileclip-s0", text_cfg=TINY)
    assert isinstance(model.text, TextTower)
    sizes = {"context_length": 77, "vocab_size": 49408}
    assert open_clip.model.get_model_tokenize_cfg(model) == sizes
    assert "text.positional_embedding" in model.no_weight_decay()


CFG = {
    "embed_dim": 8,
    "vision_cfg": {"layers": 1, "width": 64, "patch_size": 112},
    "text_cfg": TINY | {"hf_tokenizer_name": "x"},
}
OURS = {"simplify_options": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_cfg": {"hf_model_name": "a/b"}, "simplclip": OURS},
            "got model.options.text_cfg.hf_model_name = 'a/b', which",
        ),
        (
            {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}, "simplclip": OURS},
            "text_cfg.tokenizer_kwargs = ",
        ),
        (
            {"simplclip": {"model": ["x"]}},
            "x/open_clip_config.json: expected a part 'simplclip' as .* writes it",
        ),
    ],
)
def test_a_folder_fetches_and_unpickles_nothing(
    registered, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "open_clip_config.json"
    for make in (open_clip.create_model, open_clip.get_tokenizer):
        file.write_text(json.dumps({"model_cfg": CFG | changes}))
        with pytest.raises(InputError, match=message):
            make("local-dir:x")
    file.write_text(json.dumps({"model_cfg": CFG | {"simplclip": OURS | {"checkpoint": "w.pt"}}}))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'checkpoint'"):
        open_clip.create_model("local-dir:x")
    file.write_text(json.dumps({"model_cfg": CFG | {"simplclip": OURS}}))
    model = open_clip.create_model("local-dir:x")
    assert any(isinstance(module, TransformerBlock) for module in model.modules())
