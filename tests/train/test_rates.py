"""The optimizer by name and learning rates by part, against torch's and timm's own calls."""

import json
import re
from fnmatch import fnmatchcase

import open_clip
import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from timm.optim import create_optimizer_v2
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from simplclip import models
from simplclip.models.mobileclip import TextTower
from simplclip.train import loop, optimizer
from simplclip.train.config import ConfigError
from simplclip.train.optimizer import learning_rate
from simplclip.train.setup import load_model, make_state, shapes_of
from simplclip.train.step import accumulate_gradients, train_step
from support.train import tiny
from support.train.runs import go

pytestmark = pytest.mark.long

CPU = torch.device("cpu")
VISION = {
    "rates-timm": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
    "rates-vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "rates-resnet": {"layers": [1, 2, 1, 1], "width": 8, "patch_size": None},
}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
# name of a parameter -> layer, where blocks are counted
TEXT_LAYERS = {
    "positional_embedding": 0,
    "token_embedding.*": 0,
    "transformer.resblocks.0.*": 1,
    "transformer.resblocks.1.*": 2,
    "transformer.resblocks.2.*": 3,
    "ln_final.*": 4,
    "text_projection": 4,
}
VISION_LAYERS = {
    "visual.class_embedding": 0,
    "visual.positional_embedding": 0,
    "visual.conv1.*": 0,
    "visual.ln_pre.*": 0,
    "visual.transformer.resblocks.0.*": 1,
    "visual.transformer.resblocks.1.*": 2,
    "visual.ln_post.*": 3,
    "visual.proj": 3,
}


@pytest.fixture(scope="module", autouse=True)
def open_clip_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in VISION.items():
        values = {"embed_dim": 16, "vision_cfg": vision | {"image_size": 32}, "text_cfg": TEXT}
        (folder / f"{name}.json").write_text(json.dumps(values))
    open_clip.add_model_config(folder)


def settings(folder, *changes, name=None):
    if name:
        changes = (f"model={{name: 'open_clip:{name}'}}", "data.augment=none", *changes)
    return tiny.settings(folder, "optim.options={}", "loss.pm_weight=0", *changes)


def layer_of(name, layers):
    return next(layer for pattern, layer in layers.items() if fnmatchcase(name, pattern))


def steps_by_hand(config, make, steps=10):
    """Trains a copy of the run's model by `make(model)`, an optimizer whose groups may have
    "lr_scale"; returns the parameters of the run and the copy.
    """
    torch.manual_seed(0)
    state = make_state(config, CPU, "fp32")
    copy = make_state(config, CPU, "fp32")
    copy.model.load_state_dict(state.model.state_dict())
    optimizer, weights = make(copy.model), dict(copy.model.named_parameters())
    names = {weight: name for name, weight in state.model.named_parameters()}
    # in another order the norm of the gradient would be rounded otherwise
    order = [names[weight] for group in state.optimizer.param_groups for weight in group["params"]]
    loader = iter(loop.make_loader(state))
    for step in range(steps):
        batch = next(loader)
        row = train_step(state, [batch])
        assert row["lr"] == learning_rate(config, step)  # the base rate
        optimizer.zero_grad()
        accumulate_gradients(copy, [batch])
        nn.utils.clip_grad_norm_([weights[name] for name in order], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group.get("lr_scale", 1.0)
        optimizer.step()
        copy.step += 1
    assert learning_rate(config, 0) < learning_rate(config, 1) > learning_rate(config, 9) > 0
    return dict(state.model.named_parameters()), weights


def check_equal(pair):
    ours, theirs = pair
    assert ours.keys() == theirs.keys()
    worst = max((value - theirs[name]).abs().max() for name, value in ours.items())
    print("largest difference", worst.item())
    assert worst <= 1e-6


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, fused=True)


def text_groups(model, decay=0.5):
    """Returns a group of each parameter outside of the image tower, by written-out layers."""
    groups = []
    for name, weight in model.named_parameters():
        if name.startswith("visual."):
            continue
        scale = 1.0 if name == "logit_scale" else decay ** (4 - layer_of(name, TEXT_LAYERS))
        weight_decay = 0.1 if weight.ndim > 1 else 0.0
        groups.append({"params": [weight], "lr_scale": scale, "weight_decay": weight_decay})
    return groups


DECAY = ["optim.layer_decay=0.5", "run.steps=20"]


@pytest.mark.slow
def test_layer_decay_of_a_timm_tower_is_timms(tmp_path):
    def make(model):
        # timm's function: rates by layer, no decay of 1-d parameters
        groups = param_groups_layer_decay(model.visual.trunk, weight_decay=0.1, layer_decay=0.5)
        groups += [{"params": model.visual.head.parameters(), "weight_decay": 0.1}]
        return adamw(groups + text_groups(model))

    check_equal(steps_by_hand(settings(tmp_path, *DECAY, name="rates-timm"), make))


@pytest.mark.slow
def test_layer_decay_of_open_clips_towers_counts_blocks(tmp_path):
    def make(model):
        groups = text_groups(model, decay=0.8)
        for name, weight in model.visual.named_parameters(prefix="visual"):
            scale = 0.5 ** (3 - layer_of(name, VISION_LAYERS))
            decays = 0.1 if weight.ndim > 1 else 0.0
            groups.append({"params": [weight], "lr_scale": scale, "weight_decay": decays})
        return adamw(groups)

    decay = "optim.layer_decay={image: 0.5, text: 0.8}"
    check_equal(steps_by_hand(settings(tmp_path, "run.steps=20", decay, name="rates-vit"), make))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "lion"])
def test_optimizers_are_timms(tmp_path, name):
    def make(model):
        scaled = [weight for n, weight in model.named_parameters() if n.startswith("visual.")]
        rest = [weight for n, weight in model.named_parameters() if not n.startswith("visual.")]
        groups = []
        for weights, scale in ((scaled, 0.25), (rest, 1.0)):
            matrices = [weight for weight in weights if sum(n > 1 for n in weight.shape) > 1]
            others = [weight for weight in weights if sum(n > 1 for n in weight.shape) < 2]
            groups += [
                {"params": matrices, "weight_decay": 0.1, "lr_scale": scale},
                {"params": others, "weight_decay": 0.0, "lr_scale": scale},
            ]
        return create_optimizer_v2(groups, name, lr=1e-3)

    changes = [f"optim.name={name}", "optim.lr_scale={visual: 0.25}", "run.steps=20"]
    check_equal(steps_by_hand(settings(tmp_path, *changes, name="rates-vit"), make))


def layers(tower):
    """Returns the layers of a tower's parameters by name."""
    numbers = optimizer.layers_of(tower)
    return {name: numbers[weight] for name, weight in tower.named_parameters() if weight in numbers}


def test_layers_of_a_resnet_are_its_blocks():
    tower = models.create("open_clip:rates-resnet", device="meta").visual
    starts = {"conv": 0, "bn": 0, "layer1": 1, "layer2.0": 2, "layer2.1": 3, "layer3": 4}
    starts |= {"layer4": 5, "attnpool": 6}
    for name, layer in layers(tower).items():
        assert layer == next(n for start, n in starts.items() if name.startswith(start)), name


def test_what_blocks_share_is_in_the_layer_of_the_first_and_has_both_names(tmp_path):
    options = {"share": {"text": [[0, 1]]}}
    model = models.create("siclip-tiny", device="meta", simplify_options=options)
    first, second = model.text.transformer.resblocks
    numbers = optimizer.layers_of(model.text)
    assert first.fc1.weight is second.fc1.weight
    assert [numbers[weight] for weight in (first.fc1.weight, second.norm.weight)] == [1, 2]
    config = settings(tmp_path, "optim.lr_scale={text.transformer.resblocks.1.fc1: 0.5}")
    assert optimizer.scales(model, config)[first.fc1.weight] == 0.5


def test_layers_of_mobileclips_text_tower_are_those_of_its_lock():
    found = layers(
        TextTower(context_length=8, vocab_size=9, width=16, heads=2, layers=3, output_dim=8)
    )
    blocks = {name.split(".mixer")[0]: n for name, n in found.items() if ".mixer" in name}
    assert blocks == {"first": 0, "last": 3}
    assert found["transformer.resblocks.2.ln_1.weight"] == 3
    assert found["text_projection"] == found["ln_final.weight"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("proj", ["linear", "mlp"])
def test_layers_of_a_hugging_face_tower(proj):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    found = layers(HFTextEncoder("bert", 16, config, "cls_pooler", proj))
    assert {n for name, n in found.items() if ".embeddings." in name} == {0}
    assert {n for name, n in found.items() if ".layer.1." in name} == {2}
    assert {n for name, n in found.items() if name.startswith("proj")} == {3}
    assert len({*found.values()}) == 4


def test_without_factors_the_groups_are_as_before(tmp_path):
    for changes in [(), ("optim.layer_decay=1",), ("optim.lr_scale={visual: 1}",)]:
        groups = make_state(settings(tmp_path, *changes), CPU, "fp32").optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert not any("lr_scale" in group for group in groups)


def test_the_last_pattern_counts_and_multiplies_the_layers_factor(tmp_path):
    patterns = "{'visual.*': 0.5, 'visual.trunk.blocks.?': 0.1, 'logit_*': 3}"
    config = settings(tmp_path, "optim.layer_decay=0.5", f"optim.lr_scale={patterns}")
    state = make_state(config, CPU, "fp32")
    scale = {}
    for group in state.optimizer.param_groups:
        scale |= dict.fromkeys(group["params"], group["lr_scale"])
    model = state.model
    assert scale[model.visual.trunk.blocks[0].fc1.weight] == pytest.approx(0.5 * 0.1)
    assert scale[model.visual.trunk.pos_embed] == pytest.approx(0.25 * 0.5)
    assert scale[model.visual.head.proj.weight] == 0.5
    assert scale[model.logit_scale] == 3
    assert scale[model.text.token_embedding.weight] == 0.25
    assert {scale[weight] for weight in state.objective.loss.parameters()} <= {1}


@pytest.mark.slow
def test_a_factor_of_0_freezes(tmp_path):
    patch, gains = "visual.trunk.patch_embed", "text.*.alpha"
    config = settings(tmp_path, f"optim.lr_scale={{{patch}: 0, '{gains}': 0}}", "run.steps=2")
    model, frozen, _ = load_model(config)
    assert frozen == shapes_of(config)[1] == [patch, "text.transformer.resblocks.0.alpha"]
    assert not model.train().visual.trunk.patch_embed.training  # statistics of norms stay
    text = go(config)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert f"of which {trained:,} train" in text
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["frozen"] == frozen
    states = saved["optimizer"]["state"]
    assert len(states) == sum(weight.requires_grad for weight in model.parameters())
    torch.manual_seed(0)
    fresh = load_model(config)[0].state_dict()
    for name, value in saved["model"].items():
        kept = name.startswith(patch) or fnmatchcase(name, gains)
        if kept or value.is_floating_point():
            assert torch.equal(value, fresh[name]) == kept, name


@pytest.mark.parametrize("change", ["logit_scale: 0", "visual: 0", "text: 0"])
def test_frozen_towers_and_scales_train(tmp_path, change):
    go(settings(tmp_path, f"optim.lr_scale={{{change}}}", "run.steps=1", "data.micro_batch=4"))


RIGHT = "expected patterns of parameters or modules that train, got"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["name=lionn"], "optim.name: expected .*, got 'lionn'; nearest: lion"),
        (["name=lookahead_lion"], "optim.name: expected .*, got 'lookahead_lion'; nearest"),
        (["name=xyzzy"], "optim.name: expected .*, got 'xyzzy'; nearest: none"),
        (["name=adahessian"], "optim.name: expected .*, got 'adahessian'; it needs second"),
        pytest.param(
            ["name=kron"],
            "optim.name: expected .*, got 'kron'; it needs the package opt_einsum",
            marks=pytest.mark.skipif(
                torch.backends.opt_einsum.is_available(), reason="it is there"
            ),
        ),
        (["name=bnblion8bit"], "optim.name: expected .*, got 'bnblion8bit'; .*bitsandbytes"),
        (
            ["name=lion", "options.layer_decay=0.5"],
            "optim.options: expected arguments of timm.optim.Lion, got .*: unexpected layer_decay",
        ),
        (["name=lion", "options.eps=1"], "optim.options: .*: unexpected eps"),
        (["name=sgd", "options.weight_decay=1"], "optim.options: .* unexpected weight_decay"),
        (["name=muon", "options.momentum=2"], "optim.options: expected arguments of timm.optim.Mu"),
        (["name=muon", "options.ns_steps=1.5"], "optim.options: .*: 1.5}: slice indices"),
        (["name=muon", "options.adjust_lr_fn=nope"], "optim.options: .*: 'nope'}: "),
        (["name=muon", "options.ns_coefficients=nope"], "optim.options: .*: 'nope'}: "),
        (["name=adamw", "options.amsgrad='no'"], "optim.options: .* 'amsgrad': 'no'}: "),
        (["lr_scale={visua: 0}"], f"optim.lr_scale: {RIGHT} 'visua', which matches none; nea"),
        (["lr_scale={'*': 0}"], "optim.lr_scale: expected a tower that trains, got {'.': 0.0}"),
        (["lr_scale={visual: 0, text: 0}"], "optim.lr_scale: expected a tower that trains"),
        (["lr_scale={visual: 0.5, 'vis*': 0}"], f"optim.lr_scale: {RIGHT} 'visual', which .* froz"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        go(settings(tmp_path, *(f"optim.{change}" for change in changes)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_log_says_what_trains_at_which_rate(tmp_path):
    def lines(*changes):
        state = make_state(settings(tmp_path, "optim.lr=0.01", *changes), CPU, "fp32")
        return state.model, [*optimizer.describe(state.optimizer, state.model, state.config)]

    model, found = lines()
    count = sum(weight.numel() for weight in model.parameters())
    assert found == [
        "optimizer  adamw, learning rates: 1",
        f"rate       0.01: {count:,} parameters, the model",
    ]
    model, found = lines("optim.name=lion", "loss.pm_weight=1", "optim.lr_scale={visual: 0.1}")
    count = sum(weight.numel() for weight in model.visual.parameters())
    assert found[0] == "optimizer  lion, learning rates: 2"
    assert re.fullmatch(
        r"rate       0\.01: [\d,]+ parameters, text, logit_scale, the loss", found[1]
    )
    assert found[2] == f"rate       0.001: {count:,} parameters, visual"
    deep = ["model={name: 'open_clip:rates-timm'}", "optim.layer_decay=0.5"]
    model, found = lines(*deep)
    assert found[0] == "optimizer  adamw, learning rates: 7"
    assert [line.split(":")[0].split()[1] for line in found[1:]] == [
        *("0.01", "0.005", "0.0025"),
        *("0.000625", "0.000313", "0.000156"),
    ]
    assert len(max(found, key=len)) < 200
