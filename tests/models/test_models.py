"""Models by name: their parts, and that they behave as open_clip models."""

import open_clip
import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image

from simplclip import gradient_cache, models
from simplclip.models.simplify import MapBlock, TimmBlock, TransformerBlock, count_parameters
from simplclip.nn import SimplifiedBlock


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return models.create("siclip-tiny").eval()


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_s0_is_mobileclip2_s0_with_simplified_blocks():
    s0 = models.create("siclip2-s0", device="meta")
    assert type(s0) is CustomTextCLIP
    maps = [n for n, m in s0.named_modules() if isinstance(m, MapBlock)]
    assert maps == ["visual.trunk.stages.3.blocks.0", "visual.trunk.stages.3.blocks.1"]
    blocks = s0.text.transformer.resblocks
    assert len(blocks) == 12
    assert all(isinstance(b, TransformerBlock) and not b.causal for b in blocks)
    assert all(blocks[i].fc1 is blocks[i + 1].fc1 for i in range(0, 12, 2))
    assert len({b.fc1 for b in blocks}) == 6
    original = open_clip.create_model("MobileCLIP2-S0", device="meta")
    assert s0.simplify_report.before["total"] == count(original)
    assert "weights shared in groups [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]\n" in f"{s0.simplify_report}\n"
    assert count(s0) < 0.7 * count(original)


def test_tiny_is_small_and_simplified_in_both_towers(tiny):
    assert 3e6 < count(tiny) < 6e6
    gradient_cache.check(tiny.train())  # no batch statistics
    tiny.eval()
    assert sum(isinstance(m, TimmBlock) for m in tiny.visual.modules()) == 1
    assert sum(isinstance(m, TransformerBlock) for m in tiny.text.modules()) == 2
    assert tiny.visual.trunk.patch_embed.num_patches == 36
    convolutions = [m for m in tiny.visual.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)


def test_tiny_behaves_as_an_open_clip_model(tiny):
    tokenizer, transform = models.tokenizer("siclip-tiny"), models.transforms("siclip-tiny", train=False)
    image = torch.stack([transform(Image.new("RGB", (72, 72), c)) for c in ("red", "blue", "white")])
    text = tokenizer(["a red heart", "waving hand", "flag: Bosnia & Herzegovina"])
    with torch.no_grad():
        features = tiny.encode_image(image, normalize=True), tiny.encode_text(text, normalize=True)
        logits, _ = tiny.get_logits(image, text)
        outputs = tiny(image, text)
    assert features[0].shape == features[1].shape == (3, 256)
    torch.testing.assert_close(logits, tiny.logit_scale.exp() * features[0] @ features[1].T)
    torch.testing.assert_close(outputs[0], features[0])


def test_create_repeats_from_the_seed_and_loads_its_own_checkpoint(tmp_path, tiny):
    torch.save({"state_dict": {f"module.{k}": v for k, v in tiny.state_dict().items()}}, tmp_path / "a.pt")
    torch.manual_seed(0)
    for options in ({}, {"checkpoint": tmp_path / "a.pt"}):
        torch.testing.assert_close(models.create("siclip-tiny", **options).state_dict(), tiny.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="checkpoint: expected weights that fit the model, got .*size mismatch"):
        models.create("siclip-tiny", checkpoint=tmp_path / "a.pt", embed_dim=64)
    former = tiny.state_dict() | {"visual.trunk.patch_embed.backbone.stem.bn.running_mean": torch.zeros(32)}
    with pytest.raises(ValueError, match="siclip-tiny: expected weights with group norms, got those of a former version"):
        tiny.load_state_dict(former)


def test_overrides():
    model = models.create(
        "siclip-tiny", simplify_options={"towers": ["text"], "mlp_ratio": 2.0}, embed_dim=32, output_dict=True,
        text_cfg={"layers": 1}, vision_cfg={"image_size": 48},
    )  # fmt: skip
    (replaced,) = model.simplify_report.replaced
    assert (replaced.tower, replaced.index, replaced.hidden) == ("text", 0, 512)
    assert model.text.transformer.resblocks[0].width == 256  # options are merged into the configuration and do not replace it
    out = model(torch.randn(2, 3, 48, 48), torch.randint(0, 99, (2, 16)))
    assert out["image_features"].shape == (2, 32)
    assert len(models.create("siclip-tiny").text.transformer.resblocks) == 2


def test_plain_open_clip_models(tiny):
    model = models.create("open_clip:ViT-B-32", device="meta", vision_cfg={"layers": 1}, text_cfg={"layers": 1})
    assert len(model.visual.transformer.resblocks) == len(model.transformer.resblocks) == 1
    assert not any(isinstance(m, SimplifiedBlock) for m in model.modules())
    assert models.tokenizer("open_clip:ViT-B-32")(["x"]).shape == (1, 77)
    assert models.transforms("open_clip:ViT-B-32", train=False)(Image.new("L", (9, 9))).shape == (3, 224, 224)
    one = {"device": "meta", "vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}
    simple = models.create("open_clip:ViT-B-32", simplify_options={"towers": ["text"]}, **one)
    assert [r.path for r in simple.simplify_report.replaced] == ["transformer.resblocks.0"]
    with pytest.raises(ValueError, match="simplify_options: expected none"):
        models.create("open_clip:ViT-B-32", simplified=False, simplify_options={"towers": ["text"]})
    whole = models.create("siclip-tiny", simplified=False)
    assert not any(isinstance(module, SimplifiedBlock) for module in whole.modules())
    assert count_parameters(whole) == tiny.simplify_report.before


@pytest.mark.parametrize("function", [models.create, models.tokenizer, lambda n: models.transforms(n, train=False)])
@pytest.mark.parametrize(("name", "near"), [("siclip2-s1", "siclip2-s0"), ("open_clip:ViT-B-23", "open_clip:ViT-B-32")])
def test_unknown_names_list_the_nearest(function, name, near):
    with pytest.raises(ValueError, match=rf"name: expected one of .*got '{name}'; nearest: .*'{near}'"):
        function(name)


def test_short_vocabulary_is_a_prefix_of_clips_and_decodes():
    full, short = open_clip.SimpleTokenizer(), models.tokenizer("siclip-tiny")
    assert short.vocab_size == 8192
    assert (short.sot_token_id, short.eot_token_id) == (8190, 8191)
    for text in ("face with tears of joy", "flag: Côte d’Ivoire", "ok!"):
        ids = short(text)[0]
        assert ids.max() == 8191
        assert ids[0] == 8190
        assert short.decode(short.encode(text)) == full.decode(full.encode(text))
    assert short.encode("cat") == full.encode("cat")  # frequent words keep their ids
    assert short(["word " * 40]).shape == (1, 16)
    assert short(["word " * 40])[0, -1] == 8191
    whole = models.ShortVocabTokenizer(full.vocab_size)
    assert whole.encoder == full.encoder
    assert whole.bpe_ranks == full.bpe_ranks
    with pytest.raises(ValueError, match="vocab_size: expected 514 to 49408, got 100"):
        models.ShortVocabTokenizer(100)


def test_transforms():
    image = Image.new("RGBA", (72, 60), (255, 255, 255, 255))
    white = models.transforms("siclip-tiny", train=False)(image)
    assert white.shape == (3, 48, 48)
    assert white.dtype == torch.float32
    torch.manual_seed(0)
    affine = models.transforms("siclip-tiny", train=True)
    drawn = [affine(image) for _ in range(2)]
    assert drawn[0].shape == (3, 48, 48)
    assert not torch.equal(*drawn)
    plain = models.transforms("siclip-tiny", train=True, augment="none")(image)
    torch.testing.assert_close(plain, white)
    cropped = models.transforms("siclip-tiny", train=True, augment={"scale": (0.3, 0.5)}, image_size=32)
    assert cropped(image).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="augment: expected 'affine', 'none' or fields of AugmentationCfg, got 'flip'"):
        models.transforms("siclip-tiny", train=True, augment="flip")
