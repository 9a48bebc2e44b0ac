"""benchmarks.share: divergences by their definition, groups, and the program."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import simplclip
from benchmarks import share
from simplclip.common.errors import InputError
from simplclip.evaluation.encoder import Encoder
from support.models.open_clip_models import batch, clip
from support.train import tiny

IMAGE, TEXT = batch()
LENGTHS = TEXT.argmax(1) + 1
CAUSAL = torch.full((12, 12), float("-inf")).triu(1)


def lively(model):
    """Gives a model weights that make attention maps differ."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "attn" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 * 1.5)
    return model.eval()


@torch.no_grad()
def test_divergences_are_those_of_the_definition():
    model, maps = lively(clip()), []

    def record(block, args, output):
        weight, bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        parts = nn.functional.linear(block.ln_1(args[0]), weight, bias).chunk(3, -1)
        q, k = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in parts[:2])
        maps.append((q @ k.mT / q.shape[-1] ** 0.5 + CAUSAL).softmax(-1).double())

    handles = [block.register_forward_hook(record) for block in model.transformer.resblocks]
    model.encode_text(TEXT)
    for handle in handles:
        handle.remove()
    batches = [(TEXT[:2], LENGTHS[:2]), (TEXT[2:], LENGTHS[2:])]
    divergence = share.divergences(model, "text", batches, model.encode_text)
    assert 0.01 < divergence[0, 1] < math.log(2)
    for (i, p), (j, q) in itertools.product(enumerate(maps), repeat=2):
        # [B, H, L]
        kl = [torch.where(a > 0, a * (2 * a / (p + q)).log(), 0).sum(-1) for a in (p, q)]
        rows = [row[:, :length].mean() for row, length in zip((kl[0] + kl[1]) / 2, LENGTHS)]
        torch.testing.assert_close(divergence[i, j], torch.stack(rows).mean(), rtol=1e-3, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_blocks_that_differ_in_heads_are_not_merged():
    model = lively(clip())
    model.transformer.resblocks[1] = lively(clip(text={"heads": 4})).transformer.resblocks[1]
    divergence = share.divergences(model, "text", [(TEXT, None)], model.encode_text)
    assert divergence[0, 1].isinf()
    assert share.merged(divergence, 1) == [[0], [1], [2, 3]]
    with pytest.raises(InputError, match="text: expected at least one sample, got none"):
        share.divergences(model, "text", [], model.encode_text)


def test_groups_of_least_divergence_are_merged_first():
    rows = [[0, 0.3, 0.2, 0.2], [0.3, 0, 0.1, 0.4], [0.2, 0.1, 0, 0.26], [0.2, 0.4, 0.26, 0]]
    # 1 and 2 join first. Then 0 joins them at the mean of 0.3 and 0.2; 3 would join at the mean of
    # 0.4 and 0.26, later.
    expected = {3: [[0], [1, 2], [3]], 2: [[0, 1, 2], [3]], 1: [[0, 1, 2, 3]]}
    assert {count: share.merged(torch.tensor(rows), count) for count in expected} == expected


@pytest.mark.parametrize("tower", ["text", "image"])
def test_the_program_names_identical_blocks_first(tower, tmp_path, monkeypatch, capsys):
    """Text blocks 1 and 2 are alike."""
    model = lively(clip())
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
    shard = tiny.write_shard(tmp_path / "val-0.tar")
    groups = str(len(share.attentions_of(model, tower)) - 1)
    share.main(["small", "--data", shard, "--tower", tower, "--samples", "16", "--groups", groups])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{tower}: 16 samples"
    if tower == "text":
        assert ["1,", "2", "0.0000"] in [line.split() for line in printed]
        assert printed[-1].endswith("share={text: {attention: [[1, 2]]}}")
