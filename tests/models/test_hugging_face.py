"""`simplify` on small models of transformers: replaced parts, accepted masks, and saving."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import simplclip
from simplclip.models.hugging_face import CLIPBlock, EncoderBlock, Siglip2Block, SiglipBlock
from simplclip.models.simplify import count_parameters
from simplclip.nn import neighbour_groups
from support.models.hugging_face import batch, model, step

BLOCKS = {"CLIPModel": CLIPBlock, "SiglipModel": SiglipBlock, "Siglip2Model": Siglip2Block}


def simplified(name="CLIPModel", seed=0, mixes=True, gamma=0.5, **options):
    """Returns a simplified model. mixes: make attention non-uniform, as after training."""
    clip, _ = simplclip.simplify(model(name, seed, **options), gamma=gamma)
    torch.manual_seed(seed)
    for module in clip.modules():
        if mixes and isinstance(module, EncoderBlock):
            nn.init.normal_(module.qk.weight, std=0.3)
    return clip


def layers(clip, tower="text"):
    return getattr(clip, {"text": "text_model", "image": "vision_model"}[tower]).encoder.layers


@pytest.mark.parametrize("name", BLOCKS)
def test_both_towers(name):
    clip, inputs = model(name), batch(name)
    before = count_parameters(clip)
    same, report = simplclip.simplify(clip)
    assert same is clip
    assert {type(block) for tower in ("text", "image") for block in layers(clip, tower)} == {
        BLOCKS[name]
    }
    assert list(report.replaced)[3:5] == [
        "text_model.encoder.layers.3",
        "vision_model.encoder.layers.0",
    ]
    blocks = [clip.get_submodule(path) for path in report.replaced]
    assert [(block.width, block.heads, block.hidden) for block in blocks[3:5]] == [
        (24, 2, 48),
        (32, 2, 64),
    ]
    assert [block.causal for block in blocks] == [name == "CLIPModel"] * 4 + [False] * 3
    assert {block.act for block in layers(clip)} == {
        "quickgelu" if name == "CLIPModel" else "gelu_tanh"
    }
    assert report.before == before
    assert report.after == count_parameters(clip)
    assert (
        sum(report.after[part] for part in ("image", "text", "other"))
        == report.after["total"]
        < before["total"]
    )
    assert report.after["other"] == (1 if name == "CLIPModel" else 2)
    _, gradients = step(clip, inputs)
    assert gradients.keys() == dict(clip.named_parameters()).keys()


def test_attention_implementation_and_the_mask_of_valid_tokens_do_not_matter():
    """Each way of attention gets its own mask.

    Eager attention gets an additive mask, SDPA a boolean mask or None, flash attention the
    tokenizer's mask.
    """
    eager, sdpa = (simplified(attn_implementation=name) for name in ("eager", "sdpa"))
    inputs = batch()
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs = [clip.text_model(**texts).last_hidden_state for clip in (eager, sdpa)]
    torch.testing.assert_close(*outputs)
    alone = sdpa.text_model(texts["input_ids"][:1, :9]).last_hidden_state
    torch.testing.assert_close(outputs[1][:1, :9], alone)
    full = sdpa.text_model(texts["input_ids"]).last_hidden_state
    assert not torch.allclose(outputs[1][:1, 9:], full[:1, 9:])  # the blocks got the lengths
    block, x = layers(sdpa)[0], torch.randn(6, 12, 24)
    causal = texts["attention_mask"].bool()[:, None, None] & torch.ones(12, 12).tril().bool()
    torch.testing.assert_close(block(x, texts["attention_mask"]), block(x, causal))


def test_padded_patches_do_not_change_an_image():
    clip, inputs = simplified("Siglip2Model"), batch("Siglip2Model")
    images = {
        name: inputs[name] for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    }
    features = clip.get_image_features(**images).pooler_output
    hidden = images["pixel_attention_mask"] == 0
    images["pixel_values"][hidden] += 1
    torch.testing.assert_close(clip.get_image_features(**images).pooler_output, features)
    images["pixel_values"][:, 0] += 1
    assert not torch.allclose(clip.get_image_features(**images).pooler_output, features)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_that_cannot_be_honoured(implementation):
    clip, inputs = simplified(attn_implementation=implementation), batch()
    left = inputs["attention_mask"].flip(1)
    holes = inputs["attention_mask"].clone()
    holes[2, 3] = 0
    siglip = simplified("SiglipModel", attn_implementation=implementation)
    of_siglip = batch("SiglipModel")
    siglip2 = simplified("Siglip2Model", attn_implementation=implementation)
    of_siglip2 = batch("Siglip2Model")
    patches = of_siglip2["pixel_attention_mask"].flip(1)
    ones = torch.ones_like(of_siglip["input_ids"])
    siglip(**of_siglip, attention_mask=ones)
    for call, message in (
        (
            lambda: clip(**inputs | {"attention_mask": left}),
            r"^attention_mask: expected rows of ones followed by zeros",
        ),
        (
            lambda: clip(**inputs | {"attention_mask": holes}),
            r"^attention_mask: expected rows of ones followed by zeros",
        ),
        (
            lambda: siglip(**of_siglip, attention_mask=inputs["attention_mask"]),
            "^attention_mask: expected None or ones",
        ),
        (
            lambda: siglip2(**of_siglip2 | {"pixel_attention_mask": patches}),
            "^pixel_attention_mask: expected rows of ones",
        ),
        (
            lambda: layers(clip)[0](torch.randn(1, 3, 24), "causal"),
            "^attention_mask: expected a mask .*, got str",
        ),
        (
            lambda: layers(clip)[0](torch.randn(1, 3, 24), torch.ones(3)),
            "^attention_mask: expected .*, got Tensor",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_hidden_states_are_returned_and_attention_weights_are_an_error():
    clip, inputs = simplified(), batch()
    out = clip(**inputs, output_hidden_states=True)
    assert len(out.text_model_output.hidden_states) == 5
    assert len(out.vision_model_output.hidden_states) == 4
    torch.testing.assert_close(
        out.text_model_output.hidden_states[0], clip.text_model.embeddings(inputs["input_ids"])
    )
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        clip(**inputs, output_attentions=True)
    eager = simplified(attn_implementation="eager")
    eager.text_model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        eager(**inputs)


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_in_bfloat16():
    for name in BLOCKS:
        clip, inputs = simplified(name), batch(name)
        expected = clip(**inputs).logits_per_image
        if name == "CLIPModel":
            compiled = torch.compile(clip, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(**inputs).logits_per_image, expected)
        clip = clip.to(torch.bfloat16)
        torch.testing.assert_close(
            clip(**inputs).logits_per_image.float(), expected, rtol=0.1, atol=0.1
        )
    assert {p.dtype for p in layers(simplified(dtype=torch.bfloat16)).parameters()} == {
        torch.bfloat16
    }


class Small(transformers.CLIPModel):
    """The class of docs/block.md works with from_pretrained: it simplifies as it makes a model."""

    def __init__(self, config):
        super().__init__(config)
        share = {"attention": [[0, 1, 2, 3]], "mlp": neighbour_groups(4)}
        simplclip.simplify(self, share={"text": share})


class Unshared(transformers.CLIPModel):
    def __init__(self, config):
        super().__init__(config)
        simplclip.simplify(self)


def test_saved_and_loaded(tmp_path):
    clip, twin = (model(cls=Small, seed=seed) for seed in (5, 6))
    inputs = batch()
    expected = clip(**inputs).logits_per_image
    assert not torch.allclose(twin(**inputs).logits_per_image, expected)
    twin.load_state_dict(clip.state_dict(), strict=True)
    torch.testing.assert_close(twin(**inputs).logits_per_image, expected)
    torch.testing.assert_close(copy.deepcopy(clip)(**inputs).logits_per_image, expected)
    clip.save_pretrained(tmp_path)
    loaded, info = Small.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    first, second = (f"text_model.encoder.layers.{index}.fc1.weight" for index in (0, 1))
    # transformers 5.0 needs this entry for loading
    assert loaded.all_tied_weights_keys[second] == first
    blocks = layers(loaded)
    assert blocks[0].fc1.weight is blocks[1].fc1.weight is not blocks[2].fc1.weight
    assert len({id(block.qk.weight) for block in blocks}) == 1
    torch.testing.assert_close(loaded.train()(**inputs).logits_per_image, expected)


def test_blocks_that_a_checkpoint_lacks_begin_as_new_ones(tmp_path):
    """transformers would leave gains uninitialised.

    One checkpoint is of the original blocks, one lacks some parameters.
    """
    model().save_pretrained(tmp_path / "original")
    small = model(cls=Unshared)
    torch.nn.init.constant_(layers(small)[0].alpha, 3.0)
    state = {
        name: value
        for name, value in small.state_dict().items()
        if ".mlp_gain" not in name and ".fc1." not in name
    }
    small.save_pretrained(tmp_path / "half", state_dict=state)
    for name, alpha in (("original", 1.0), ("half", 3.0)):
        loaded = Unshared.from_pretrained(tmp_path / name)
        first = layers(pickle.loads(pickle.dumps(copy.deepcopy(loaded))))[0]
        assert first.alpha.unique().tolist() == [alpha]
        assert [first.beta.unique().tolist(), first.mlp_gain.item()] == [[1.0], pytest.approx(0.1)]
        assert not first.qk.weight[: first.width].any()
        assert first.fc1.weight.std().item() == pytest.approx(first.width**-0.5, rel=0.1)


def test_what_is_refused_leaves_the_model_as_it_was():
    clip = model()
    names = clip.state_dict().keys()
    for made, options, message in (
        (
            clip,
            {"blocks": {"image": [7]}},
            "blocks: expected indices of the 3 blocks of the image tower, got .7.",
        ),
        (
            model("MetaClip2Model"),
            {},
            "text: expected a transformers encoder with CLIPEncoderLayer, .*, got MetaClip2Enc",
        ),
        (
            model("ChineseCLIPModel"),
            {},
            "text: expected a transformers encoder with .*, got ChineseCLIPTextModel",
        ),
        (clip.text_model, {}, "text: expected a transformers encoder with .*, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            simplclip.simplify(made, **options)
    assert clip.state_dict().keys() == names
