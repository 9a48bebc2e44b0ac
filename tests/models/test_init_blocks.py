"""Simplified blocks that start from pretrained ones: what is equal, dropped and refused."""

import copy

import pytest
import torch
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from timm.layers import GluMlp, RmsNorm
from timm.models import fastvit
from timm.models.vision_transformer import Block
from torch import nn

from simplclip import models
from simplclip.models.inherit import inherit
from simplclip.models.init_blocks import convert, start
from simplclip.models.simplify import MapBlock, simplify
from simplclip.nn import SimplifiedBlock, share_weights
from support.models.open_clip_models import clip

C, H = 24, 2
_SCALES = {"scale_heads": True, "scale_attn_inner": True, "scale_attn": True}
TOKENS = {
    "open_clip": lambda: ResidualAttentionBlock(C, H, 2.0, ls_init_value=0.1),
    "custom": lambda: CustomResidualAttentionBlock(C, H, 2.0, **_SCALES),
    "timm": lambda: Block(C, H, 2.0, qkv_bias=True, init_values=0.1),
    "timm_rms": lambda: Block(C, H, 2.0, norm_layer=RmsNorm),
}
NORMS = ("ln_1", "norm1")


def trained(make, seed=0):
    """Returns a block in eval mode, each of whose tensors differs from its initial values."""
    torch.manual_seed(seed)
    block = make().eval()
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn_like(tensor)
            positive = name.endswith("running_var") or "norm" in name
            tensor.copy_(noise.abs() + 0.5 if positive else noise * 0.3)
    return block


def started(old, **options):
    block = SimplifiedBlock(C, H, 2.0, **options)
    start({"b": (block, old.state_dict())})
    return block


def attention_maps(qk):  # [B, L, 2C] -> [B, H, L, L]
    q, k = (t.unflatten(2, (H, -1)).transpose(1, 2) for t in qk.chunk(2, -1))
    return (q @ k.transpose(-1, -2) * (C // H) ** -0.5).softmax(-1)


@pytest.mark.parametrize("kind", TOKENS)
def test_the_mlp_path_is_that_of_the_old_block(kind):
    """With zero values and outputs, a block adds its MLP of the normalised input."""
    old = trained(TOKENS[kind])
    for name, tensor in old.state_dict().items():
        if any(part in name for part in ("out_proj", "attn.proj", "ln_attn")):
            tensor.zero_()
    x = torch.nn.functional.layer_norm(torch.randn(2, 5, C), (C,), eps=0.0)
    new = started(old)
    nn.init.zeros_(new.alpha)
    nn.init.zeros_(new.beta)
    nn.init.zeros_(new.gamma)
    torch.testing.assert_close(new(x), old(x) - x, rtol=1e-4, atol=1e-4)
    assert new.mlp_gain == new.attention_gain == 1
    assert torch.equal(new.norm.weight, torch.ones(C))


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("biased", [False, True])
def test_attention_maps_are_those_of_the_old_block_but_for_the_bias_of_q(kind, biased):
    old = trained(TOKENS[kind])
    norm = next(getattr(old, name) for name in NORMS if hasattr(old, name))
    state = old.state_dict()
    if getattr(norm, "bias", None) is not None and not biased:
        nn.init.zeros_(norm.bias)
    for name, bias in state.items():  # the bias of k has no effect on the maps
        if name.endswith(("qkv.bias", "in_proj_bias")) and not biased:
            bias[:C].zero_()
    x = torch.randn(2, 5, C)
    n = norm(torch.nn.functional.layer_norm(x, (C,)))
    weight = next(v for k, v in state.items() if k.endswith(("qkv.weight", "in_proj_weight")))
    bias = next((v for k, v in state.items() if k.endswith(("qkv.bias", "in_proj_bias"))), None)
    qk = torch.nn.functional.linear(n, weight, bias)[..., : 2 * C]
    new = started(old)
    ours, theirs = attention_maps(new.qk(new.norm(x))), attention_maps(qk)
    assert torch.allclose(ours, theirs, atol=1e-5) == (not biased or kind == "timm_rms")


@torch.no_grad()
def test_fastvit_from_its_running_statistics():
    """The old norm is per channel, the new one per token: equal at the usual mean and scale."""
    maps = torch.randn(64, 64, 4, 4) * (torch.rand(64, 1, 1) + 0.5) * 3 + torch.randn(64, 1, 1)
    maps = 3 + 2 * (maps - maps.mean(1, keepdim=True)) / maps.std(1, keepdim=True, unbiased=False)
    old = trained(lambda: fastvit.AttentionBlock(64, mlp_ratio=2.0, layer_scale_init_value=0.1))
    nn.init.zeros_(old.token_mixer.proj.weight)  # attention adds nothing
    nn.init.zeros_(old.token_mixer.proj.bias)
    tap = old.mlp.conv.conv.weight
    # the token alone
    tap.data *= torch.zeros(7, 7).index_put((torch.tensor(3), torch.tensor(3)), torch.tensor(1.0))
    for norm, x in ((old.norm, maps), (old.mlp.conv.bn, old.mlp.conv.conv(maps))):
        norm.running_mean.copy_(x.mean((0, 2, 3)))
        norm.running_var.copy_(x.var((0, 2, 3), unbiased=False))
    new = MapBlock(64, 2, 2.0).eval()
    start({"b": (new, old.state_dict())})
    nn.init.zeros_(new.qk.weight)
    torch.testing.assert_close(new(maps), old(maps), rtol=1e-3, atol=1e-3)
    assert (old(maps) - maps).std() > 0.1  # the MLP adds something
    torch.testing.assert_close(new.attention_gain.data, torch.tensor(2.0), rtol=1e-3, atol=0)


def test_blocks_that_are_refused():
    folded = {k: v for k, v in fastvit.AttentionBlock(64).state_dict().items() if ".bn." not in k}
    with pytest.raises(KeyError, match="attn.qkv.weight"):
        convert(nn.Linear(3, 3).state_dict())
    for block, message in (
        (Block(C, H, 3.0), r"b: .* width 24, 48 hidden units, got fc1.weight \[72, 24\]"),
        (Block(C, H, 2.0, mlp_layer=GluMlp), r"48 hidden units, got fc2.weight \[24, 24\]"),
        (SimplifiedBlock(C, H, 2.0, value=True), r"hidden units, got value.weight \[24, 24\]"),
    ):
        new = SimplifiedBlock(C, H, 2.0)
        old = copy.deepcopy(new.state_dict())
        with pytest.raises(ValueError, match=message):
            start({"b": (new, block.state_dict())})
        torch.testing.assert_close(new.state_dict(), old, rtol=0, atol=0)
    with pytest.raises(ValueError, match="b: expected a block with a layer norm, got rmsnorm"):
        start({"b": (SimplifiedBlock(C, H, 2.0, norm="rmsnorm"), Block(C, H, 2.0).state_dict())})
    with pytest.raises(ValueError, match="b: expected a block of .* without 'norm2.running_mean"):
        start({"b": (MapBlock(64, 2, 4.0), folded)})


def test_merges_of_what_is_shared_only():
    olds = [trained(TOKENS["open_clip"], seed) for seed in range(3)]
    alone = [convert(old.state_dict()) for old in olds]
    for merge in ("average", "first"):
        blocks = [SimplifiedBlock(C, H, 2.0) for _ in olds]
        share_weights(blocks, [[0, 2]], "attention")
        share_weights(blocks, [[2, 1]], "mlp")
        states = [old.state_dict() for old in olds]
        start(dict(zip("012", zip(blocks, states))), merge)

        def merged(name, *members, merge=merge):
            values = [alone[i][name] for i in members]
            return sum(values) / len(values) if merge == "average" else values[0]

        for i, attention, mlp in ((0, (0, 2), (0,)), (1, (1,), (1, 2)), (2, (0, 2), (1, 2))):
            torch.testing.assert_close(blocks[i].qk.weight.data, merged("qk.weight", *attention))
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                torch.testing.assert_close(blocks[i].get_parameter(name).data, merged(name, *mlp))


SHARE = {"text": {"attention": [[0, 1]]}}


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return models.create("siclip-tiny", **(options or {"simplify_options": {"share": SHARE}}))


def without_blocks(model):
    return {name: t for name, t in model.state_dict().items() if "resblocks" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["average", "first"])
def test_inherit_starts_blocks_which_train_on(merge):
    source = tiny(1, simplified=False)
    model = tiny()
    expected = tiny(1, simplified=False)
    simplify(expected, share=SHARE, init=merge, gamma={"text": 0.3})
    report = inherit(model, source, blocks=merge)
    named = model.named_modules()
    started = {name: module for name, module in named if isinstance(module, SimplifiedBlock)}
    assert report.rows["text.transformer"][0] == "trains"
    for name, block in started.items():
        assert block.train().training
        assert all(p.requires_grad for p in block.parameters())
        theirs = expected.get_submodule(name).state_dict()
        torch.testing.assert_close(block.state_dict(), theirs, rtol=0, atol=0)
    one, two = tiny(), tiny()
    inherit(one, source)
    alone, shared = (each.text.transformer.resblocks[0].qk.weight for each in (one, model))
    assert not torch.equal(alone, shared)
    inherit(two, [without_blocks(source), source], blocks=merge)
    torch.testing.assert_close(two.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_sources_without_fitting_blocks_leave_the_model_as_it_was():
    model, source = tiny(), tiny(1, simplified=False)
    old = copy.deepcopy(model.state_dict())
    wide = tiny(1, simplified=False, text_cfg={"mlp_ratio": 2.0})
    first = "text.transformer.resblocks.0"
    for states, merge, message in (
        (without_blocks(source), "first", f"blocks: .* with a block {first}, got none"),
        (wide, "first", rf"{first}: expected .* 1024 hidden units, got fc1.weight \[512"),
        (source, "mean", "blocks: expected one of .'average', 'first'., .* got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            inherit(model, states, blocks=merge)
        torch.testing.assert_close(model.state_dict(), old, rtol=0, atol=0)
        assert all(p.requires_grad for p in model.parameters())
    message = "blocks: .* for a model with simplified blocks, got 'first' for 0 blocks"
    with pytest.raises(ValueError, match=message):
        inherit(tiny(simplified=False), source, blocks="first")


def test_the_norm_has_the_eps_of_the_old_one():
    """At a variance of eps it counts as much as the variance."""
    x = 1e-3**0.5 * torch.randn(2, 5, 32)
    for init in ("first", "random"):
        model = clip()
        old = model.visual.transformer.resblocks[1].ln_1
        old.eps = 1e-3
        simplify(model, init=init)
        norm = model.visual.transformer.resblocks[1].norm
        torch.testing.assert_close(norm(x), old(x))
