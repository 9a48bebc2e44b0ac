"""`simplify` on small open_clip models: replaced parts, calls of blocks, untouched parts."""

import copy
from collections import OrderedDict

import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from timm.models import fastvit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simplclip.common.errors import InputError
from simplclip.models.mobileclip import TextTower
from simplclip.models.simplify import MapBlock, TimmBlock, count_parameters, simplify
from simplclip.nn import SimplifiedBlock
from support.models.open_clip_models import TEXT, batch, clip, restless


def fastvit_clip():
    """Returns a CLIP over a tiny FastViT, which has attention blocks in its last stage."""
    model = clip(cls=CustomTextCLIP)
    trunk = fastvit.FastVit(
        layers=(1, 1, 1, 2),
        embed_dims=(8, 16, 32, 64),
        mlp_ratios=(2, 2, 2, 3),
        drop_path_rate=0.3,
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
        num_classes=16,
    )
    model.visual = nn.Sequential(OrderedDict(trunk=trunk))
    return model


RESNET = {"layers": (1,) * 4, "width": 8, "head_width": 8, "image_size": 32}


def without(name):
    model = clip()
    delattr(model, name)
    return model


def with_text(text):
    model = clip(cls=CustomTextCLIP)
    model.text = text
    return model


def masking(**options):
    return with_text(TextTransformer(**TEXT, output_dim=16, **options))


def kinds(model, cls=SimplifiedBlock):
    return [name for name, module in model.named_modules() if isinstance(module, cls)]


@pytest.mark.parametrize(("cls", "prefix"), [(CLIP, ""), (CustomTextCLIP, "text.")])
@pytest.mark.parametrize("causal", [True, False])
def test_clip_and_custom_text_clip(cls, prefix, causal):
    model = clip(cls=cls, text={"no_causal_mask": not causal})
    before = count_parameters(model)
    same, report = simplify(model)
    assert same is model
    assert kinds(model, ResidualAttentionBlock) == []
    paths = [f"{prefix}transformer.resblocks.{i}" for i in range(4)]
    paths += [f"visual.transformer.resblocks.{i}" for i in range(3)]
    assert report.replaced == dict.fromkeys(paths, "ResidualAttentionBlock")
    blocks = [model.get_submodule(path) for path in paths]
    assert [block.causal for block in blocks] == [causal] * 4 + [False] * 3
    sizes = [(block.width, block.heads, block.hidden) for block in blocks]
    assert sizes == 4 * [(24, 2, 96)] + 3 * [(32, 2, 128)]
    assert report.before == before
    assert report.after == count_parameters(model)
    assert report.after["total"] == sum(p.numel() for p in model.parameters()) < before["total"]
    assert report.after["image"] == sum(p.numel() for p in model.visual.parameters())

    image, text = batch()
    assert model.encode_image(image).shape == model.encode_text(text).shape == (3, 16)
    image_logits, text_logits = model.get_logits(image, text)
    assert torch.equal(image_logits.T, text_logits)
    model(image, text)[0].sum().backward()
    assert all(p.grad is not None for p in model.visual.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_the_causal_mask_is_kept(causal):
    """Tokens behind a text's end change only the features of a full tower, not a causal one's."""
    _, text = batch()
    changed = text.clone()
    changed[:, 9:] = 7
    model, _ = simplify(clip(text={"no_causal_mask": not causal}))
    for block in model.transformer.resblocks:
        nn.init.normal_(block.qk.weight)
    assert torch.allclose(model.encode_text(text), model.encode_text(changed)) == causal


def test_blocks_by_their_indices():
    model = clip()
    _, report = simplify(model, towers=("image",), blocks={"image": [2, 0]})
    paths = ["visual.transformer.resblocks.0", "visual.transformer.resblocks.2"]
    assert kinds(model) == list(report.replaced) == paths
    assert str(report).startswith(f"2 blocks replaced: {', '.join(paths)}\nimage: ")
    model(*batch())
    _, rest = simplify(model, towers=("image",))
    assert list(rest.replaced) == ["visual.transformer.resblocks.1"]
    with pytest.raises(InputError, match="image: expected .*, got Transformer without any"):
        simplify(model, towers=("image",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": {"image": [7]}}, "blocks: .* of the 3 blocks of the image tower, got .7."),
        (
            {"blocks": {"image": [0]}, "share": {"image": [[0, 1]]}},
            r"share: .* \[0\], got .*\[0, 1",
        ),
        ({"towers": ("text", "audio")}, "towers: expected names .*audio"),
        ({"towers": ["text"], "share": {"image": []}}, r"share: .* of \['text'\], got \['image'\]"),
        ({"gamma": {"texts": 0.3}}, "gamma: expected names out of .'text', 'image'., got .'texts'"),
        ({"init": "mean"}, "init: expected random, average or first, got 'mean'"),
        ({"blocks": [0]}, "blocks: expected a mapping of towers to indices, got list"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(options, message):
    model = clip()
    names = model.state_dict().keys()
    with pytest.raises((TypeError, ValueError), match=message):
        simplify(model, **options)
    assert model.state_dict().keys() == names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: masking(no_causal_mask=True, use_pad_mask=True),
            "text: .*another mask or a class",
        ),
        (lambda: clip(RESNET), "got ModifiedResNet without any"),
        (
            lambda: without("visual"),
            "image: expected a tower with blocks of .*, got Identity without any",
        ),
    ],
)
def test_models_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        simplify(make())


def test_one_tower_is_replaced_whatever_the_other_is():
    padded = masking(no_causal_mask=True, use_pad_mask=True)
    for model in (without("transformer"), masking(embed_cls=True), padded):
        assert len(simplify(model, towers=("image",))[1].replaced) == 3
    _, report = simplify(without("visual"), towers=("text",))
    assert len(report.replaced) == 4
    assert report.before["image"] == report.after["image"] == 0


def test_parts_are_shared_by_groups_and_the_whole_by_others():
    share = {"all": [[0, 1]], "attention": [[2, 3]]}
    one, two = (simplify(clip(seed=seed), share={"text": share})[0] for seed in (0, 9))
    blocks = one.transformer.resblocks
    assert [blocks[i].qk is blocks[i + 1].qk for i in range(3)] == [True, False, True]
    assert [blocks[i].fc1 is blocks[i + 1].fc1 for i in range(3)] == [True, False, False]
    two.load_state_dict(one.state_dict(), strict=True)
    for other in (two, copy.deepcopy(one)):
        torch.testing.assert_close(other(*batch()), one(*batch()))
        assert count_parameters(other) == count_parameters(one)
    share = {"text": {"attention": [[0, 3]], "mlp": [[0, 1]]}, "image": {"mlp": []}}
    other, _ = simplify(clip(), share=share)
    first, second, _, last = other.transformer.resblocks
    assert first.qk is last.qk
    assert first.fc1 is second.fc1
    images = other.visual.transformer.resblocks
    assert len({module for block in images for module in (block.qk, block.fc1)}) == 6


def test_activation_dtype_and_mode_follow_the_old_block():
    model = clip(quick_gelu=True).to(torch.bfloat16).eval()
    simplify(model, towers=("text",))
    block = model.transformer.resblocks[1]
    assert block.act == "quickgelu"
    assert not block.training
    assert {p.dtype for p in block.parameters()} == {block.get_weight_dtype()} == {torch.bfloat16}
    assert model.encode_text(batch()[1]).dtype == torch.bfloat16


def test_tanh_gelu_of_open_clip_stays_tanh_gelu():
    """open_clip makes it by act_kwargs, for the text towers of SigLIP 2."""
    model, _ = simplify(clip(text={"act_kwargs": {"approximate": "tanh"}}))
    assert model.transformer.resblocks[0].act == "gelu_tanh"
    assert model.visual.transformer.resblocks[0].act == "gelu"


def test_models_of_a_fake_mode():
    """Their masks have no values to check."""
    real = clip()
    with FakeTensorMode():
        fake = clip()
        for model in (real, fake):
            simplify(model)
            assert model.transformer.resblocks[0].causal
        assert fake.encode_text(torch.ones(2, 12).long()).shape == (2, 16)


def test_an_activation_that_blocks_lack_is_an_error():
    model = clip()
    model.visual.transformer.resblocks[1].mlp.gelu = nn.Mish()
    message = "image: expected .*'gelu_tanh'.* got Mish in visual.transformer.resblocks.1; towers"
    with pytest.raises(InputError, match=message):
        simplify(model)
    assert kinds(model) == []
    assert len(simplify(model, towers=("text",))[1].replaced) == 4


@pytest.mark.parametrize(("gamma", "same"), [(1.0, True), ({"text": 0.3}, False)])
def test_gamma_and_mlp_ratio_by_tower(gamma, same):
    _, text = batch()
    text[:, 8:] = text[:1, 8:]
    model, _ = simplify(clip(), gamma=gamma, mlp_ratio={"text": 1.5})
    features = model.encode_text(text)
    # below 1, new text features depend on the words
    assert torch.allclose(features[0], features[1], atol=1e-5) == same
    assert torch.equal(model.visual.transformer.resblocks[0].gamma.data, torch.ones(2))
    for tower, ratio in ((model, 1.5), (model.visual, 4)):
        assert {block.hidden / block.width for block in tower.transformer.resblocks} == {ratio}


@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": 99}])
def test_masked_padding_is_as_if_it_were_not_there(pool):
    options = {"cls": CustomTextCLIP, "text": {"no_causal_mask": True, **pool}}
    masked, other = (
        restless(simplify(clip(**options), mask_padding=mask)[0]) for mask in (True, False)
    )
    other.load_state_dict(masked.state_dict())
    text = torch.randint(1, 98, (3, 12))
    for row, length in zip(text, (4, 12, 7)):
        row[length - 1], row[length:] = 99, 0
    masked.set_grad_checkpointing()
    found = masked.encode_text(text)
    for row, length, feature in zip(text, (4, 12, 7), found):
        alone = other.encode_text(row[None, :length])
        torch.testing.assert_close(feature[None], alone, rtol=0, atol=2e-6)
    assert (other.encode_text(text) - found)[0].abs().max() > 0.01
    with pytest.raises(InputError, match=r"attn_mask: expected the shape \(2,\), got \(5, 5\)"):
        masked.text.transformer(torch.randn(2, 5, 24), attn_mask=torch.zeros(5, 5))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            lambda: clip(cls=CustomTextCLIP),
            {"towers": ["image"]},
            "TextTransformer .* and 0 blocks",
        ),
        (lambda: masking(no_causal_mask=True), {"blocks": {"text": [0, 1]}}, ".* and 2 blocks"),
        (lambda: with_text(TextTower(**TEXT, output_dim=16)), {}, "TextTower"),
    ],
)
def test_padding_that_cannot_be_masked(model, options, message):
    model = model()
    expected = (
        r"mask_padding: .* own text tower \(custom_text=True\) .* all its blocks replaced, got"
    )
    with pytest.raises(InputError, match=f"{expected} {message}"):
        simplify(model, mask_padding=True, **options)
    assert not kinds(model)
    causal, _ = simplify(clip(), mask_padding=True)  # its causal tokens do not see padding anyway
    assert type(causal) is CLIP


def test_masks_that_cannot_be_honoured():
    model, _ = simplify(clip())
    block = model.transformer.resblocks[0]
    full = model.visual.transformer.resblocks[0]
    x = torch.randn(2, 12, 24)
    mask = model.attn_mask
    assert block(x, attn_mask=mask).shape == x.shape
    pixels, timm = torch.randn(2, 5, 32), TimmBlock(32, 2)
    for called, masks, message in (
        (block, {}, r"attn_mask: expected the shape \(12, 12\), got None"),
        (block, {"attn_mask": mask.expand(4, 12, 12)}, r"\(12, 12\), got \(4, 12, 12\)"),
        (full, {"attn_mask": torch.zeros(5, 5)}, "attn_mask: expected the shape None, got"),
        (timm, {"is_causal": True}, "attn_mask, is_causal: expected None and False"),
    ):
        with pytest.raises(ValueError, match=message):
            called(x if called is block else pixels, **masks)
    model.attn_mask[0, 1] = 0
    with pytest.raises(ValueError, match="text: expected no mask or a .* with another mask"):
        simplify(model)


def test_timm_vit():
    options = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    model = clip(options | {"image_size": 224}, cls=CustomTextCLIP)
    _, report = simplify(model, towers=("image",))
    blocks = model.visual.trunk.blocks
    paths = [f"visual.trunk.blocks.{index}" for index in range(12)]
    assert report.replaced == dict.fromkeys(paths, "Block")
    assert {type(block) for block in blocks} == {TimmBlock}
    assert {(block.heads, block.norm.eps) for block in blocks} == {(3, 1e-6)}
    model.set_grad_checkpointing()
    model.encode_image(batch(224, 1)[0]).sum().backward()
    assert blocks[10].fc1.weight.grad.abs().sum() > 0


def test_fastvit_blocks_work_on_maps():
    model = fastvit_clip()
    _, report = simplify(model, towers=("image",))
    paths = [f"visual.trunk.stages.3.blocks.{index}" for index in (0, 1)]
    assert kinds(model, MapBlock) == paths
    assert report.replaced == dict.fromkeys(paths, "AttentionBlock")
    block = model.visual.trunk.stages[3].blocks[1]
    assert (block.width, block.heads, block.hidden) == (64, 2, 192)
    # the rate of the replaced block, at the end of the trunk
    assert block.drop_path == pytest.approx(0.3)

    maps = torch.randn(2, 64, 3, 4)
    block.eval()
    tokens = SimplifiedBlock.forward(block, maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(block(maps), tokens.transpose(1, 2).reshape(2, 64, 3, 4))
    lined = block(maps.to(memory_format=torch.channels_last))
    assert lined.is_contiguous(memory_format=torch.channels_last)

    for checkpointing in (False, True):
        model.visual.trunk.set_grad_checkpointing(checkpointing)
        model.encode_image(batch(64, 2)[0]).sum().backward()
    assert block.fc1.weight.grad.abs().sum() > 0
