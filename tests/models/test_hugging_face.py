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


def simplified(name="CLIPModel", **options):
    """Returns a simplified model with attention that is not uniform, as after training."""
    clip, _ = simplclip.simplify(model(name, **options), gamma=0.5)
    torch.manual_seed(0)
    for module in clip.modules():
        if isinstance(module, EncoderBlock):
            nn.init.normal_(module.qk.weight, std=0.3)
    return clip


def layers(clip):
    return clip.text_model.encoder.layers


@pytest.mark.parametrize("name", BLOCKS)
def test_both_towers(name):
    clip, inputs = model(name), batch(name)
    before = count_parameters(clip)
    same, report = simplclip.simplify(clip)
    assert same is clip
    paths = [f"text_model.encoder.layers.{index}" for index in range(4)]
    paths += [f"vision_model.encoder.layers.{index}" for index in range(3)]
    assert list(report.replaced) == paths
    blocks = [clip.get_submodule(path) for path in paths]
    assert {type(block) for block in blocks} == {BLOCKS[name]}
    sizes = [(block.width, block.heads, block.hidden) for block in blocks]
    assert sizes == 4 * [(24, 2, 48)] + 3 * [(32, 2, 64)]
    assert [block.causal for block in blocks] == [name == "CLIPModel"] * 4 + [False] * 3
    act = "quickgelu" if name == "CLIPModel" else "gelu_tanh"
    assert {block.act for block in layers(clip)} == {act}
    assert report.before == before
    assert report.after == count_parameters(clip)
    assert sum(report.after.values()) == 2 * report.after["total"] < 2 * before["total"]
    assert report.after["other"] == (1 if name == "CLIPModel" else 2)
    _, gradients = step(clip, inputs)
    assert gradients.keys() == dict(clip.named_parameters()).keys()


def test_attention_implementation_and_the_mask_of_valid_tokens_do_not_matter():
    """Eager attention gets an additive mask, SDPA a boolean or None, flash the tokenizer's."""
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
    features = clip(**inputs).image_embeds
    inputs["pixel_values"][inputs["pixel_attention_mask"] == 0] += 1
    torch.testing.assert_close(clip(**inputs).image_embeds, features)
    inputs["pixel_values"][:, 0] += 1
    assert not torch.allclose(clip(**inputs).image_embeds, features)


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
    siglip(**of_siglip, attention_mask=torch.ones_like(of_siglip["input_ids"]))
    hidden = {"hidden_states": torch.randn(1, 3, 24)}
    for called, given, mask, message in (
        (clip, inputs, left, "attention_mask: expected rows of ones followed by zeros"),
        (clip, inputs, holes, "attention_mask: expected rows of ones followed by zeros"),
        (siglip, of_siglip, inputs["attention_mask"], "attention_mask: expected None or ones"),
        (siglip2, of_siglip2, patches, "pixel_attention_mask: expected rows of ones"),
        (layers(clip)[0], hidden, "causal", "attention_mask: expected a mask .*, got str"),
        (layers(clip)[0], hidden, torch.ones(3), "attention_mask: expected .*, got Tensor"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            called(**given | {message.partition(":")[0]: mask})


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
        found = clip.to(torch.bfloat16)(**inputs).logits_per_image.float()
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    blocks = layers(simplified(dtype=torch.bfloat16))
    assert {p.dtype for p in blocks.parameters()} == {torch.bfloat16}


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
    """transformers would leave their gains uninitialised."""
    model().save_pretrained(tmp_path / "original")
    small = model(cls=Unshared)
    torch.nn.init.constant_(layers(small)[0].alpha, 3.0)
    state = small.state_dict()
    kept = {name: state[name] for name in state if ".mlp_gain" not in name and ".fc1." not in name}
    small.save_pretrained(tmp_path / "half", state_dict=kept)
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
    with pytest.raises(ValueError, match="of the 3 blocks of the image tower, got .7."):
        simplclip.simplify(clip, blocks={"image": [7]})
    assert clip.state_dict().keys() == names
    for other, got in (
        (model("MetaClip2Model"), "MetaClip2Enc"),
        (model("ChineseCLIPModel"), "ChineseCLIPTextModel"),
        (clip.text_model, "NoneType"),
    ):
        message = f"text: expected a transformers encoder with CLIPEncoderLayer, .*, got {got}"
        with pytest.raises(ValueError, match=message):
            simplclip.simplify(other)
