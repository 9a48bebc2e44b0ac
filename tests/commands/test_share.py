"""simplclip share: measures against their definitions, groups for a budget, and the command on shards."""

import copy
import json
import math
import tarfile

import numpy as np
import pytest
import tiny
import torch
import yaml
from clips import batch, clip
from open_clip.model import CustomTextCLIP
from timm.models import fastvit
from torch import nn
from typer.testing import CliRunner

from simplclip import models, sharing
from simplclip.commands.main import app
from simplclip.common.errors import InputError
from simplclip.data.loader import EmptyEpochError
from simplclip.encoder import Encoder
from simplclip.models.mobileclip import TextTower
from simplclip.models.simplify import count_parameters, simplify
from simplclip.sharing import likeness as likenesses
from simplclip.sharing.groups import parse_budget, propose, sizes
from simplclip.train import checkpoint

IMAGE, TEXT = batch()
LENGTHS = TEXT.argmax(1) + 1


def lively(model):
    """Weights that make attention maps differ."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in ("attn", "qk", "mlp", "fc")):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    return model.eval()


def measured(model, tower, lengths=LENGTHS, parts=((0, 2), (2, 3))):
    encode = model.encode_text if tower == "text" else model.encode_image
    inputs = TEXT if tower == "text" else IMAGE
    batches = [(inputs[a:b], lengths[a:b] if tower == "text" and lengths is not None else None) for a, b in parts]
    return sharing.measure(model, tower, batches, encode)


def divergence(p, q):
    """Jensen-Shannon in nats by its definition, of float64 [..., L]."""
    kl = lambda a, b: torch.where(a > 0, a * (a / b).log(), 0).sum(-1)  # noqa: E731
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def check(likeness, maps, inputs, outputs, lengths):
    """maps: of each block [B, H, L, L]; inputs, outputs: [B, L, C]."""
    n, count = len(maps), len(maps[0])
    for i in range(n):
        for j in range(n):
            found = torch.zeros(3)
            for row, length in enumerate(lengths.tolist()):
                p, q = (maps[b][row, :, :length].double() for b in (i, j))
                updates = [(outputs[b] - inputs[b])[row, :length] for b in (i, j)]
                cosines = (
                    torch.cosine_similarity(*pair, dim=-1) for pair in (updates, [outputs[b][row, :length] for b in (i, j)])
                )
                found += torch.stack([divergence(p, q).mean(), *(c.mean() for c in cosines)]).float() / count
            got = torch.stack([t[i, j] for t in (likeness.attention, likeness.updates, likeness.outputs)]).float()
            torch.testing.assert_close(got, found, rtol=1e-3, atol=2e-5)


@torch.no_grad()
def recorded(model, blocks, encode):
    """Inputs and outputs of blocks in one forward pass."""
    seen = []
    handles = [b.register_forward_hook(lambda m, args, out: seen.append((args[0].clone(), out.clone()))) for b in blocks]
    encode()
    for handle in handles:
        handle.remove()
    return [x for x, _ in seen], [y for _, y in seen]


@torch.no_grad()
def softmax_maps(q, k, heads, mask=None):
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (logits if mask is None else logits + mask).softmax(-1)


@pytest.mark.parametrize("numbers", [1, 1000, 2**22])
def test_a_causal_text_tower(numbers, monkeypatch):
    monkeypatch.setattr(likenesses, "_NUMBERS", numbers)
    model = lively(clip())
    blocks = model.transformer.resblocks
    inputs, outputs = recorded(model, blocks, lambda: model.encode_text(TEXT))
    maps = []
    for block, x in zip(blocks, inputs):
        y = block.ln_1(x)
        maps.append(block.attn(y, y, y, attn_mask=model.attn_mask, average_attn_weights=False)[1])
    likeness = measured(model, "text")
    assert likeness.samples == 3
    assert likeness.paths == [f"transformer.resblocks.{i}" for i in range(4)]
    assert 0.01 < likeness.attention[0, 1] < math.log(2)
    check(likeness, maps, inputs, outputs, LENGTHS)
    assert not any(block._forward_hooks or block._forward_pre_hooks or block.attn._forward_pre_hooks for block in blocks)


def test_image_towers_and_full_attention():
    model = lively(clip(text={"no_causal_mask": True}))
    inputs, outputs = recorded(model, model.visual.transformer.resblocks, lambda: model.encode_image(IMAGE))
    maps = []
    for block, x in zip(model.visual.transformer.resblocks, inputs):
        y = block.ln_1(x)
        maps.append(block.attn(y, y, y, average_attn_weights=False)[1])
    check(measured(model, "image"), maps, inputs, outputs, torch.tensor([5, 5, 5]))
    assert measured(model, "text", None).attention[0, 1] != measured(model, "text").attention[0, 1]


def test_norms_of_queries_and_keys():
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "qk_norm": True}
    model = lively(clip(vision))
    blocks = model.visual.transformer.resblocks
    for block in blocks:
        nn.init.uniform_(block.attn.ln_q.weight, 0.5, 2.0)
    x, y = recorded(model, blocks, lambda: model.encode_image(IMAGE))
    maps = []
    with torch.no_grad():
        for block, h in zip(blocks, x):
            qkv = nn.functional.linear(block.ln_1(h), block.attn.in_proj_weight, block.attn.in_proj_bias)
            q, k = (t.unflatten(-1, (2, -1)) for t in qkv.chunk(3, -1)[:2])
            maps.append(softmax_maps(block.attn.ln_q(q).flatten(2), block.attn.ln_k(k).flatten(2), 2))
    check(measured(model, "image"), maps, x, y, torch.tensor([5, 5, 5]))


def test_a_timm_tower():
    name = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224, "timm_pool": "", "timm_proj": "linear"}
    model = clip(name, cls=CustomTextCLIP)
    model.visual.trunk.blocks = model.visual.trunk.blocks[:2]
    images, blocks = torch.randn(2, 3, 224, 224), model.visual.trunk.blocks
    lively(model)
    x, y = recorded(model, blocks, lambda: model.encode_image(images))
    with torch.no_grad():
        maps = [softmax_maps(*b.attn.qkv(b.norm1(h)).chunk(3, -1)[:2], 3) for b, h in zip(blocks, x)]
    likeness = sharing.measure(model, "image", [(images, None)], model.encode_image)
    check(likeness, maps, x, y, torch.tensor([197, 197]))


def test_fastvit_and_mobileclip():
    model = clip(cls=CustomTextCLIP)
    model.text = TextTower(12, 100, 24, 2, 3, output_dim=16)
    model.visual = nn.Sequential()
    model.visual.trunk = fastvit.FastVit(
        layers=(1, 1, 1, 3), embed_dims=(8, 16, 32, 64), mlp_ratios=(2, 2, 2, 3), num_classes=16,
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
    )  # fmt: skip
    lively(model)
    images = torch.randn(3, 3, 96, 96)
    blocks = model.visual.trunk.stages[3].blocks
    for block in blocks:
        nn.init.constant_(block.layer_scale_1.gamma, 0.3)
    x, y = recorded(model, blocks, lambda: model.encode_image(images))
    maps = []
    with torch.no_grad():
        for block, h in zip(blocks, x):
            qkv = block.token_mixer.qkv(block.norm(h).flatten(2).transpose(1, 2))
            maps.append(softmax_maps(*qkv.chunk(3, -1)[:2], 2))
    likeness = sharing.measure(model, "image", [(images, None)], model.encode_image)
    rows = [[t.flatten(2).transpose(1, 2) for t in some] for some in (x, y)]
    check(likeness, maps, *rows, torch.tensor([9, 9, 9]))

    layers = model.text.layers[1:-1]
    x, y = recorded(model, layers, lambda: model.encode_text(TEXT))
    with torch.no_grad():
        maps = [softmax_maps(*m.attn.qkv_proj(m.ln_1(h)).chunk(3, -1)[:2], 2) for m, h in zip(layers, x)]
    check(measured(model, "text"), maps, x, y, LENGTHS)


def test_simplified_blocks():
    model = lively(simplify(clip())[0])
    blocks = model.transformer.resblocks
    for block in blocks:
        nn.init.uniform_(block.alpha, 0.5, 2.0)
    x, y = recorded(model, blocks, lambda: model.encode_text(TEXT))
    mask = torch.full((12, 12), float("-inf")).triu(1)
    with torch.no_grad():
        normed = [b.norm(h) for b, h in zip(blocks, x)]
        maps = [softmax_maps(*b.qk(n).chunk(2, -1), 2, mask) for b, n in zip(blocks, normed)]
        kept = [b.attention_gain * b.alpha.repeat_interleave(12) * n for b, n in zip(blocks, normed)]
    check(measured(model, "text"), maps, kept, y, LENGTHS)
    deep = copy.deepcopy(model).to(torch.bfloat16)
    torch.testing.assert_close(measured(deep, "text").attention, measured(model, "text").attention, rtol=0.1, atol=0.01)


def likeness_of(attention, updates=None, tower="text"):
    n = len(attention)
    updates = torch.ones(n, n) if updates is None else updates
    return sharing.Likeness(tower, [f"b.{i}" for i in range(n)], 1, attention, updates, updates)


def test_groups_for_a_budget():
    model = clip()
    size = sizes(model, "text")
    assert size.now == count_parameters(model)["text"]
    alone = [[i] for i in range(4)]
    twin, _ = simplify(clip())
    assert size.total("all", alone) == count_parameters(twin)["text"]
    attention = torch.tensor([[0.0, 0.3, 0.2, 0.2], [0.3, 0.0, 0.1, 0.4], [0.2, 0.1, 0.0, 0.15], [0.2, 0.4, 0.15, 0.0]])
    updates = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.4], [0.0, 0.0, 0.4, 1.0]])
    likeness = likeness_of(attention, updates)
    qk, mlp = 2 * 24 * 24, 2 * 24 * 96 + 96 + 24
    whole = size.total("all", alone)

    def groups(budget):
        return {p.what: (p.groups, p.parameters, p.fits) for p in propose(likeness, size, budget)}

    found = groups(whole)
    assert found == dict.fromkeys(found, ((), whole, True))
    found = groups(whole - qk)
    assert found["attention"] == (((1, 2),), whole - qk, True)  # of lowest divergence
    assert found["mlp"] == (((0, 1),), whole - mlp, True)
    assert found["all"] == (((0, 1),), whole - qk - mlp, True)  # 0.43 / 2 + 0.05 / 2 against 0.14 / 2 + 1 / 4
    found = groups(whole - 2 * qk)
    assert found["attention"] == (((0, 1, 2),), whole - 2 * qk, True)  # the mean over pairs: 0.25, and 0.275
    found = groups(whole - 2 * mlp)
    assert found["mlp"] == (((0, 1), (2, 3)), whole - 2 * mlp, True)
    assert found["attention"] == (((0, 1, 2, 3),), whole - 3 * qk, False)
    for what, (merged, parameters, _) in found.items():
        fresh, report = simplify(clip(), share={"text": {what: merged}})
        assert count_parameters(fresh)["text"] == report.after["text"] == parameters
    least = whole - 3 * qk - 3 * mlp
    assert groups(least)["all"] == (((0, 1, 2, 3),), least, True)
    with pytest.raises(
        InputError, match=f"budget: expected at least {least:,} parameters of the text tower, .* got {least - 1:,}"
    ):
        groups(least - 1)


def test_blocks_of_other_shapes_are_not_merged():
    model = clip()
    model.transformer.resblocks[1] = clip(text={"heads": 4}).transformer.resblocks[1]
    size = sizes(model, "text")
    unlike = torch.zeros(4, 4)
    unlike[1] = unlike[:, 1] = torch.nan
    likeness = measured(lively(model), "text")
    assert likeness.attention[0, 1].isnan()
    assert likeness.attention[0, 2] > 0
    found = {
        p.what: p.groups for p in propose(likeness_of(unlike), size, size.total("all", [[0], [1], [2], [3]]) - 2 * 24 * 24)
    }
    assert found["attention"] == ((2, 3),)
    assert found["mlp"] == ((0, 1),)


@pytest.mark.parametrize(
    ("text", "number"),
    [("80%", 8000), ("12.5 %", 1250), ("9_780", 9780), ("9,780", 9780), ("9.78k", 9780), ("2M", 2_000_000)],
)
def test_budgets(text, number):
    assert parse_budget(text, 10_000) == number
    for bad in ("", "x", "0", "-3", "80 percent", "0%"):
        with pytest.raises(InputError, match="budget: expected a number of parameters"):
            parse_budget(bad, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with four text blocks, of which 1 and 2 are alike, and shards."""
    folder = tmp_path_factory.mktemp("share")
    tiny.write_shard(folder / "val-0.tar")
    config = tiny.settings(folder, "model.options={simplified: false, text_cfg: {layers: 4, width: 64, heads: 2}}")
    model = lively(models.create("siclip-tiny", **config.model.options))
    blocks = model.text.transformer.resblocks
    # What these blocks add is the same in each channel, which a layer norm takes away: the next block sees the same.
    for block in (blocks[1], blocks[2]):
        for layer in (block.attn.out_proj, block.mlp.c_proj):
            nn.init.zeros_(layer.weight)
            nn.init.ones_(layer.bias)
    blocks[2].load_state_dict(blocks[1].state_dict())
    state = {"model": model.state_dict(), "config": config.to_dict(), "step": 1}
    checkpoint.save(folder, state, keep=0)
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["share", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_command_proposes_identical_blocks_first(folder, tmp_path):
    result = call(folder, "--data", folder / "val-0.tar", "--samples", 10, "--budget", "99%", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "image tower left out: image: expected at least two blocks to compare, got 1" in result.stdout
    about = json.loads((tmp_path / "share.json").read_text())
    found = about["towers"]["text"]
    assert found["samples"] == 10
    assert found["attention_divergence"][1][2] < 1e-6 < 0.01 < found["attention_divergence"][0][1]
    assert found["update_cosine"][1][2] == pytest.approx(1)
    assert (tmp_path / "share.png").stat().st_size > 10_000
    row = next(line for line in result.stdout.splitlines() if line.strip().startswith("1, 2"))
    assert row.split()[2:4] == ["0.0000", "1.0000"]

    budget = found["parameters"]["simplified"] - 1
    arguments = ["--tower", "text", "--samples", 10, "--budget", budget, "--out", tmp_path]
    result = call(folder, "--data", folder / "val-0.tar", *arguments)
    assert result.exit_code == 0, result.output
    proposals = json.loads((tmp_path / "share.json").read_text())["towers"]["text"]["proposals"]
    assert [p["share"]["text"][p["what"]] for p in proposals] == [[[1, 2]]] * 3
    lines = [line.strip() for line in result.stdout.splitlines() if "simplify_options.share=" in line]
    assert len(lines) == 3
    for line, proposal in zip(lines, proposals):
        key, _, value = line.partition("=")
        changes = ["model.options={text_cfg: {layers: 4, width: 64, heads: 2}}", f"{key}={value}"]
        model = models.create("siclip-tiny", **tiny.settings(tmp_path, *changes).model.options)
        assert yaml.safe_load(value) == proposal["share"]
        assert count_parameters(model)["text"] == proposal["parameters"] <= budget


def small_encoder():
    def preprocess(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    def tokenizer(texts):
        return TEXT[:1].repeat(len(texts), 1)

    return Encoder("small", lively(clip()), preprocess, tokenizer, torch.device("cpu"), "fp32")


def test_both_towers_of_an_encoder(folder, tmp_path, capsys):
    """In fewer samples than asked for, and in batches that do not divide them."""
    how = {"batch_size": 7, "workers": 0, "out": tmp_path}
    about = sharing.run(small_encoder(), folder / "val-0.tar", samples=100, budget="70%", **how)
    assert {name: tower["samples"] for name, tower in about["towers"].items()} == {"image": 24, "text": 24}
    for name, tower in about["towers"].items():
        proposal = tower["proposals"][2]
        _, report = simplify(clip(), share=proposal["share"])
        assert proposal["share"][name]["all"]
        assert report.after[name] == proposal["parameters"] <= 0.7 * report.before[name]
    text = measured(lively(clip()), "text", parts=((0, 1),))  # the tokens up to the end alone
    torch.testing.assert_close(about["towers"]["text"]["attention_divergence"], text.attention.tolist(), rtol=0, atol=1e-5)
    few = sharing.run(small_encoder(), folder / "val-0.tar", samples=10, **how)
    assert {tower["samples"] for tower in few["towers"].values()} == {10}
    assert json.loads((tmp_path / "share.json").read_text()) == few
    assert "wrote" in capsys.readouterr().out


def test_without_a_budget_nothing_is_proposed(folder, tmp_path):
    console_out = call(folder, "--data", folder / "val-0.tar", "--tower", "text", "--samples", 3, "--out", tmp_path)
    assert "share=" not in console_out.stdout
    assert "proposals" not in json.loads((tmp_path / "share.json").read_text())["towers"]["text"]


def test_what_the_command_refuses(folder, tmp_path):
    shards = ["--data", folder / "val-0.tar", "--out", tmp_path / "out"]
    for arguments, message in (
        (["--tower", "image"], "image: expected at least two blocks to compare, got 1"),
        (["--tower", "audio"], "tower: expected one of"),
        (["--tower", "text", "--budget", "5"], "budget: expected at least"),
        (
            ["--budget", "half"],
            "budget: expected a number of parameters such as 9.78M, or a percentage such as 80%, got 'half'",
        ),
        (["--checkpoint", "nowhere.pt"], "no such file"),
    ):
        result = call(folder, *shards, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="budget: expected a percentage for two towers, or --tower with a number, got '9'"):
        sharing.run(small_encoder(), folder / "val-0.tar", budget="9", out=tmp_path / "out")
    images = tmp_path / "images.tar"
    with tarfile.open(folder / "val-0.tar") as old, tarfile.open(images, "w") as new:
        for member in old.getmembers():
            if member.name.endswith("png"):
                new.addfile(member, old.extractfile(member))
    with pytest.raises(EmptyEpochError, match="has no usable caption; 24 skipped: 24 missing caption"):
        sharing.run(small_encoder(), images, tower="text", out=tmp_path / "out")
    with pytest.raises(InputError, match="text: expected at least one sample, got none"):
        sharing.measure(clip(), "text", [], None)
    odd = clip({"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "scaled_cosine_attn": True})
    with pytest.raises(InputError, match="attention: expected products of q and k, got scaled cosine attention"):
        measured(odd.eval(), "image")
