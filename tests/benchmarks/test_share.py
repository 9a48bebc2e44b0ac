"""benchmarks.share: divergences by their definition, groups for a budget, and the program."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from open_clip.model import CustomTextCLIP
from timm.models import fastvit
from torch import nn

import simplclip
from benchmarks import share as sharing
from benchmarks.share import divergences, parse_budget, propose
from simplclip.common.errors import InputError
from simplclip.evaluation.encoder import Encoder
from simplclip.models.mobileclip import TextTower
from simplclip.models.simplify import count_parameters, simplify
from support.models.open_clip_models import batch, clip
from support.train import tiny

IMAGE, TEXT = batch()
LENGTHS = TEXT.argmax(1) + 1
CAUSAL = torch.full((12, 12), float("-inf")).triu(1)


def lively(model):
    """Gives a model weights that make attention maps differ."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("ln_q", "ln_k", "alpha", "layer_scale_1")):
            nn.init.uniform_(parameter, 0.5, 2.0)
        elif parameter.ndim == 2 and any(part in name for part in ("attn", "qk", "mlp", "fc")):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    return model.eval()


def vision(**options):
    return clip(
        {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, **options}
    )


def mobileclip():
    model = clip(cls=CustomTextCLIP)
    model.text, model.visual = TextTower(12, 100, 24, 2, 3, output_dim=16), nn.Sequential()
    mixers = ("repmixer", "repmixer", "repmixer", "attention")
    sizes = {"layers": (1, 1, 1, 3), "embed_dims": (8, 16, 32, 64), "mlp_ratios": (2, 2, 2, 3)}
    model.visual.trunk = fastvit.FastVit(**sizes, num_classes=16, token_mixers=mixers)
    return model


def of_open_clip(block, x):
    attention = block.attn
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q, k, _ = nn.functional.linear(block.ln_1(x), weight, bias).chunk(3, -1)
    norms = (getattr(attention, name, nn.Identity()) for name in ("ln_q", "ln_k"))
    return [norm(t.unflatten(-1, (2, -1))).flatten(2) for norm, t in zip(norms, (q, k))]


def of_fastvit(block, x):
    return block.token_mixer.qkv(block.norm(x).flatten(2).mT).chunk(3, -1)[:2]


def of_simplified(block, x):
    return block.qk(block.norm(x)).chunk(2, -1)


# What makes the model; its tower and the tower's blocks; q and k [B, L, C] by a block's input, mask
BLOCKS = "transformer.resblocks"
TOWERS = {
    "open_clip, causal": (clip, "text", BLOCKS, of_open_clip, CAUSAL),
    "q and k normed": (lambda: vision(qk_norm=True), "image", f"visual.{BLOCKS}", of_open_clip, 0),
    "FastViT": (mobileclip, "image", "visual.trunk.stages.3.blocks", of_fastvit, 0),
    "MobileCLIP": (mobileclip, "text", f"text.{BLOCKS}", of_open_clip, 0),
    "simplified": (lambda: simplify(clip())[0], "text", BLOCKS, of_simplified, CAUSAL),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_divergences_are_those_of_the_definition(name):
    make, tower, blocks, queries_keys, mask = TOWERS[name]
    model, maps = lively(make()), []
    encode, inputs, lengths = model.encode_text, TEXT, LENGTHS
    if tower == "image":
        encode, inputs, lengths = model.encode_image, IMAGE, [None] * 3
    if name == "FastViT":
        inputs = 100 * batch(96)[0]

    def record(block, args, output):
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in queries_keys(block, args[0]))
        maps.append((q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1).double())

    handles = [block.register_forward_hook(record) for block in model.get_submodule(blocks)]
    encode(inputs)
    for handle in handles:
        handle.remove()
    parts = slice(0, 2), slice(2, 3)
    batches = [(inputs[part], lengths[part] if tower == "text" else None) for part in parts]
    divergence = divergences(model, tower, batches, encode)
    assert 0.01 < divergence[0, 1] < math.log(2)
    for (i, p), (j, q) in itertools.product(enumerate(maps), repeat=2):
        # [B, H, L]
        kl = [torch.where(a > 0, a * (2 * a / (p + q)).log(), 0).sum(-1) for a in (p, q)]
        rows = [row[:, :length].mean() for row, length in zip((kl[0] + kl[1]) / 2, lengths)]
        torch.testing.assert_close(divergence[i, j], torch.stack(rows).mean(), rtol=1e-3, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_blocks_that_differ_in_heads_are_not_compared_or_merged():
    model = lively(clip())
    model.transformer.resblocks[1] = lively(clip(text={"heads": 4})).transformer.resblocks[1]
    divergence = divergences(model, "text", [(TEXT, None)], model.encode_text)
    assert divergence[0, 1].isnan()
    assert divergence[0, 2] > 0
    with pytest.raises(InputError, match="budget: expected at least"):
        propose(model, "text", divergence, 1)
    enough = count_parameters(simplify(clip())[0])["text"] - 1
    proposed = propose(model, "text", divergence, enough)[0]["share"]
    assert proposed == {"text": {"attention": [[2, 3]]}}
    odd = vision(scaled_cosine_attn=True).eval()
    message = "attention: expected products of q and k, got scaled cosine attention"
    with pytest.raises(InputError, match=message):
        divergences(odd, "image", [(IMAGE, None)], odd.encode_image)


def test_groups_for_a_budget():
    divergence = torch.tensor(
        [[0.0, 0.3, 0.2, 0.2], [0.3, 0.0, 0.1, 0.4], [0.2, 0.1, 0.0, 0.26], [0.2, 0.4, 0.26, 0.0]]
    )
    qk, mlp = 2 * 24 * 24, 2 * 24 * 96 + 96 + 24
    whole = count_parameters(simplify(clip())[0])["text"]
    # 1 and 2 join first. Then 0 joins them at the mean of 0.3 and 0.2; 3 would join at the mean of
    # 0.4 and 0.26, later.
    one, two, all_four = [[1, 2]], [[0, 1, 2]], [[0, 1, 2, 3]]
    for budget, expected in (
        (whole, {"attention": None, "mlp": None, "all": None}),
        (whole - 1, {"attention": one, "mlp": one, "all": one}),
        (whole - qk - 1, {"attention": two, "mlp": one, "all": one}),
        # attention alone cannot save this many parameters
        (whole - 2 * mlp - 1, {"mlp": all_four, "all": two}),
    ):
        proposals = propose(clip(), "text", divergence, budget)
        assert {p["what"]: p["share"].get("text", {}).get(p["what"]) for p in proposals} == expected
        for proposal in proposals:
            _, made = simplify(clip(), share=proposal["share"])
            assert made.after["text"] == proposal["parameters"] <= budget
    divergence[0, 1] = torch.nan  # these blocks saw other numbers of tokens
    proposed = propose(clip(), "text", divergence, whole - qk - 1)[0]["share"]
    assert proposed == {"text": {"attention": [[1, 2, 3]]}}
    divergence[0, 1] = 0.3
    least = whole - 3 * qk - 3 * mlp
    message = f"budget: expected at least {least:,} parameters, .* got {least - 1:,}"
    with pytest.raises(InputError, match=message):
        propose(clip(), "text", divergence, least - 1)
    budgets = {"80%": 8000, "12.5%": 1250, "9780": 9780, "9.78k": 9780, "2M": 2_000_000}
    assert {text: parse_budget(text, 10_000) for text in budgets} == budgets


@pytest.fixture
def share(tmp_path, monkeypatch):
    """Runs the program on shards and a model whose text blocks 1 and 2 are alike."""
    shard, model = tiny.write_shard(tmp_path / "val-0.tar"), lively(clip())
    blocks = model.transformer.resblocks
    # They add the same to each channel, which the next block's norm removes.
    for layer in (blocks[1].attn.out_proj, blocks[1].mlp.c_proj):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
    blocks[2].load_state_dict(blocks[1].state_dict())

    def preprocess(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255

    def tokenizer(texts):
        return TEXT[:1].repeat(len(texts), 1)

    encoder = Encoder("small", model, preprocess, tokenizer, torch.device("cpu"), "fp32")
    monkeypatch.setattr(simplclip, "load", lambda *_: encoder, raising=False)
    arguments = ["small", "--data", str(shard), "--out", str(tmp_path / "out")]
    return encoder, lambda *more: sharing.main([*arguments, *more])


def test_the_program_proposes_identical_blocks_first(share, tmp_path, capsys):
    encoder, call = share
    budget = count_parameters(simplify(clip())[0])["text"] - 1
    call("--samples", "10", "--budget", str(budget))
    printed = capsys.readouterr().out
    about = json.loads((tmp_path / "out" / "share.json").read_text())
    assert about["samples"] == 10
    model, batches = encoder.model, [(TEXT[:1], LENGTHS[:1])]
    up_to_end = divergences(model, "text", batches, model.encode_text)
    torch.testing.assert_close(about["attention_divergence"], up_to_end.tolist(), rtol=0, atol=1e-5)
    assert ["1,", "2", "0.0000"] in [line.split() for line in printed.splitlines()]
    assert [p["share"]["text"][p["what"]] for p in about["proposals"]] == [[[1, 2]]] * 3
    values = re.findall(r"  model\.options\.simplify_options\.share=(.*)", printed)
    assert [yaml.safe_load(value) for value in values] == [p["share"] for p in about["proposals"]]


def test_an_image_tower_on_all_samples_without_a_budget(share, tmp_path, capsys):
    share[1]("--tower", "image")
    about = json.loads((tmp_path / "out" / "share.json").read_text())
    assert (about["samples"], len(about["attention_divergence"]), about["proposals"]) == (24, 3, [])
    assert "share=" not in capsys.readouterr().out


def test_a_budget_of_nothing_is_refused(share, tmp_path):
    message = "budget: expected a number of parameters such as 9.78M, or a percentage .* got '0%'"
    with pytest.raises(InputError, match=message):
        share[1]("--budget", "0%")
    assert not (tmp_path / "out").exists()
