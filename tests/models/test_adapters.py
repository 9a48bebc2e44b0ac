"""LoRA's adapters in towers: values, names, what is frozen, and what is refused."""

import copy
import pickle

import peft
import pytest
import torch
from open_clip.transformer import Attention
from torch import nn

import simplclip
from simplclip import models
from simplclip.common.errors import InputError
from simplclip.models.inherit import is_frozen
from simplclip.models.lora import LinearAttention, add_lora
from simplclip.models.weights import merged
from support.models import lora
from support.models.open_clip_models import MODEL_TEXT, MODEL_VISION

SETTINGS = {
    "rank": 3,
    "alpha": 7.0,
    "dropout": 0.0,
    "towers": ["image", "text"],
    "modules": ["*"],
}
PLAIN = {"embed_dim": 16, "vision_cfg": MODEL_VISION, "text_cfg": MODEL_TEXT}


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory):
    lora.register_models(tmp_path_factory.mktemp("models"))


def plain(seed=0, **options):
    torch.manual_seed(seed)
    return models.create("open_clip:ViT-B-32", **PLAIN | options)


def features(model, size=16):
    given = lora.batch(side=size)
    with torch.no_grad():
        return model.eval().encode_image(given["image"] / 255), model.encode_text(
            given["text"][:, 0]
        )


def training(model):
    """Returns the names, in the state dict, of what trains."""
    return {n for n, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}


def assert_close(ours, theirs, near=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= near * b.norm()


@pytest.mark.parametrize(
    ("mask", "keys", "bias"),
    [
        (None, "same", True),
        ("bool", "same", False),
        ("float", "keys", True),
        ("of heads", "three", True),
    ],
)
def test_attention_has_torchs_values(mask, keys, bias):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, bias=bias)
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
    ours = LinearAttention(copy.deepcopy(theirs))
    q, k, v = torch.randn(3, 5, 6, 8)
    if keys != "three":
        k = v = q if keys == "same" else k
    masks = {
        None: None,
        "bool": torch.ones(6, 6, dtype=torch.bool).triu(1),
        "float": torch.randn(6, 6),
        "of heads": torch.randn(2 * 5, 6, 6),
    }
    expected, _ = theirs(q, k, v, need_weights=False, attn_mask=masks[mask])
    got, none = ours(q, k, v, need_weights=False, attn_mask=masks[mask])
    assert none is None
    assert torch.allclose(got, expected, atol=1e-6)
    got.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(ours.in_proj.weight.grad, theirs.in_proj_weight.grad, atol=1e-4)


@pytest.mark.parametrize("name", [*lora.CONFIGS])
def test_adapters_start_at_nothing_and_merge_as_pefts(name):
    torch.manual_seed(0)
    model = models.create(f"open_clip:{name}")
    size = model.visual.image_size
    size = size if isinstance(size, int) else size[0]
    before = features(model, size)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    frozen, (line,) = add_lora(model, SETTINGS, [])
    assert "adapters of rank 3: " in line
    assert_close(features(model, size), before)
    assert_equal(merged(checkpoint_of(model)), tensors)
    adapters = {key for key in model.state_dict() if ".lora_" in key}
    assert training(model) == adapters | {"logit_scale"}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for key, _ in model.named_parameters() if ".lora_" in key or key == "logit_scale"
    }
    assert all(is_frozen(model.get_submodule(part)) for part in frozen if _is_module(model, part))

    now = features(lora.started(model), size)
    assert (now[0] - before[0]).norm() > 0.01 * before[0].norm()
    assert (now[1] - before[1]).norm() > 0.01 * before[1].norm()
    weights = merged(checkpoint_of(model))
    other = models.create(f"open_clip:{name}")
    other.load_state_dict(weights, strict=True)
    assert_close(features(other, size), now, 1e-5)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied.load_state_dict(model.state_dict(), strict=True)
    assert_close(features(copied, size), now)

    theirs = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for module in theirs:
        module.merge()
    assert len(theirs) == len(adapters) // 2
    assert_equal(merged(checkpoint_of(model, alpha=0.0)), weights)


def checkpoint_of(model, alpha=SETTINGS["alpha"]):
    lora = SETTINGS | {"alpha": alpha}
    return {"model": model.state_dict(), "config": {"model": {"lora": lora}}}


def assert_equal(ours, theirs):
    assert [*ours] == [*theirs]
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def _is_module(model, name):
    return name in dict(model.named_modules())


def test_layers_that_get_no_adapter():
    """Those of an attention of several widths, and those whose weight is shared."""
    pool = {"attentional_pool": True, "attn_pooler_heads": 2}
    model = plain(vision_cfg=MODEL_VISION | pool, embed_dim=24)
    frozen, _ = add_lora(model, SETTINGS | {"towers": ["image"]}, [])
    assert isinstance(model.visual.transformer.resblocks[0].attn, LinearAttention)
    assert isinstance(model.visual.attn_pool.attn, nn.MultiheadAttention)
    assert "visual.attn_pool" in frozen
    custom = plain(vision_cfg=MODEL_VISION | {"qk_norm": True})
    add_lora(custom, SETTINGS | {"towers": ["image"]}, [])
    attention = custom.visual.transformer.resblocks[0].attn
    assert isinstance(attention, Attention)
    assert not attention.in_proj_weight.requires_grad
    assert isinstance(attention.out_proj, peft.tuners.lora.Linear)
    shared = plain(text_cfg=MODEL_TEXT | {"layers": 2})
    first, second = (block.mlp for block in shared.transformer.resblocks)
    second.c_fc.weight = first.c_fc.weight
    _, (line,) = add_lora(shared, SETTINGS | {"towers": ["text"]}, [])
    assert line.endswith(" 6 in the text tower")
    assert type(first.c_fc) is nn.Linear


def test_one_tower_and_its_patterns_leave_the_other_as_it_was():
    model, source = plain(), plain(seed=1)
    table = simplclip.inherit(model, source, train=["ln_final", "visual.*"])
    settings = SETTINGS | {"towers": ["text"], "modules": ["*.mlp.c_proj", "*.attn"]}
    frozen, (line,) = add_lora(model, settings, table.names, ["ln_final"])
    assert line.endswith("rank 3: 3 in the text tower")
    assert all(p.requires_grad for p in model.visual.parameters())
    assert model.ln_final.weight.requires_grad
    assert model.ln_final.training
    assert not model.token_embedding.training
    assert not model.positional_embedding.requires_grad
    assert type(model.visual.transformer.resblocks[0].attn) is nn.MultiheadAttention
    assert type(model.visual.transformer.resblocks[0].mlp.c_proj) is nn.Linear
    assert type(model.transformer.resblocks[0].mlp.c_fc) is nn.Linear
    names = {name for name in training(model) if not name.startswith(("visual.", "logit"))}
    block = "transformer.resblocks.0"
    layers = ("attn.in_proj", "attn.out_proj", "mlp.c_proj")
    expected = {f"{block}.{n}.lora_{matrix}.default.weight" for n in layers for matrix in "AB"}
    assert names == expected | {"ln_final.weight", "ln_final.bias"}
    frozen_elsewhere = plain()
    table = simplclip.inherit(frozen_elsewhere, source)
    frozen, _ = add_lora(frozen_elsewhere, settings, table.names)
    assert "visual" in frozen
    assert is_frozen(frozen_elsewhere.visual)
    dropped = plain()
    simplclip.inherit(dropped, source)
    add_lora(dropped, SETTINGS | {"dropout": 0.5}, [])
    dropped.train()
    assert dropped.transformer.resblocks[0].mlp.c_fc.lora_dropout["default"].training


def test_simplified_blocks_are_refused_by_name():
    model = models.create("siclip-tiny")
    with pytest.raises(
        InputError, match=r"without simplified blocks, got the image tower with vis"
    ):
        add_lora(model, SETTINGS, [])


def test_under_autocast_adapters_take_inputs_as_they_come():
    model = plain()
    add_lora(model, SETTINGS, [])
    inputs = []
    for layer in (m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)):
        layer.lora_A["default"].register_forward_hook(lambda _, x, y: inputs.append(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features(model)
    assert torch.bfloat16 in inputs
