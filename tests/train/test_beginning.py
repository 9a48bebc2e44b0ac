"""Frozen beginnings of towers: found, computed once in a step of gradient caching, and equal in
every bit.
"""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import nn

from simplclip import gradient_cache, models
from simplclip.models.crop import crop_texts
from simplclip.models.inherit import freeze
from simplclip.train import config, setup
from simplclip.train import step as steps
from simplclip.train.beginning import find_beginning
from support.train.states import random_batches, random_state

CPU = torch.device("cpu")
# forms of a tower -> how many of its two frozen layers are a beginning
FORMS = {
    "skip": 0,
    "pooled": 0,
    "scaled": 1,  # the first layer's output is not the second's input
    "sized": 2,
    "changed": 0,
    "changed without autograd": 0,
}


class Counted(nn.Conv2d):
    """A convolution that counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Tower(nn.Module):
    """Two frozen layers and a trained one; in other forms their outputs are used elsewhere too."""

    def __init__(self, form="chain"):
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.first, self.second, self.last = (Counted(3, 3, 3, padding=1) for _ in range(3))
        freeze(self, ["first", "second"])

    def forward(self, batch):
        kept = x = self.first(batch["image"])
        x = self.second(2 * x if self.form == "scaled" else x)
        if self.form == "changed":
            nn.functional.silu(x, inplace=True)
        elif self.form == "changed without autograd":
            x.data.mul_(x.data)
        x = nn.functional.dropout(x)
        x = self.last(x + kept if self.form == "skip" else x)
        if self.form == "sized":
            x = x * kept.numel() / kept.shape[-1] ** kept.dim()
        return x.mean((2, 3)) + (kept.mean() if self.form == "pooled" else 0)


def example():
    return {"image": torch.rand(1, 3, 8, 8)}


def gradients(tower, encode):
    tower.zero_grad()
    tower.first.calls = 0
    torch.manual_seed(1)
    batches = [{"image": torch.rand(2, 3, 8, 8)} for _ in range(4)]
    gradient_cache.backward(
        {"image": encode}, {"image": batches}, lambda image: (image @ image.T).square().mean()
    )
    assert all(list(batch) == ["image"] for batch in batches)  # all kept outputs are used
    return torch.cat([p.grad.flatten() for p in tower.last.parameters()])


def test_frozen_layers_run_once():
    tower, images = Tower(), example()
    plain = gradients(tower, tower)
    assert tower.first.calls == 7
    state = torch.get_rng_state()
    beginning, size = find_beginning(tower, tower, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert (beginning.modules, size) == ([tower.first, tower.second], 4 * 3 * 64)
    assert torch.equal(gradients(tower, partial(beginning.encode, tower)), plain)
    assert tower.first.calls == 4


@pytest.mark.parametrize(("form", "layers"), FORMS.items())
def test_outputs_that_are_used_elsewhere(form, layers):
    """Only the modules from which a tower can go on are a beginning."""
    tower = Tower(form)
    plain = gradients(tower, tower)
    result = find_beginning(tower, tower, example())
    if layers:
        beginning, _ = result
        assert beginning.modules == [tower.first, tower.second][-layers:]
        assert torch.equal(gradients(tower, partial(beginning.encode, tower)), plain)
    else:
        assert result is None
        assert not any("forward" in vars(module) for module in tower.modules())


def test_an_output_that_is_changed_later():
    """It is not kept of a micro-batch that changes it: the layers run again."""
    changing = Tower("changed")
    plain = gradients(changing, changing)
    tower = Tower()
    beginning, _ = find_beginning(tower, tower, example())
    tower.form = "changed"
    assert torch.equal(gradients(tower, partial(beginning.encode, tower)), plain)


def test_a_tower_without_frozen_layers():
    tower = Tower()
    tower.first.requires_grad_(True)
    # the second layer's output needs a gradient
    assert find_beginning(tower, tower, example()) is None


@pytest.mark.slow
def test_texts_of_several_lengths():
    """Texts that are cropped run the tower once for each length."""
    model = models.create("siclip-tiny", text_cfg={"layers": 2, "width": 64, "heads": 2})
    names = ("token_embedding", "positional_embedding", "transformer.resblocks.0")
    freeze(model, [f"text.{name}" for name in names])
    model.train()
    crop_texts(model, multiple=1)
    words = ["a", "two dogs", "a red cat on a mat with a hat", "the sea and the sky over the town"]
    texts = models.tokenizer("siclip-tiny")(64 * words)

    def encode(batch):
        return model.encode_text(batch["text"], normalize=True)

    batches = [{"text": texts}, {"text": texts.flip(0)}, {"text": texts}]

    def step(function):
        model.zero_grad()
        gradient_cache.backward(
            {"text": function}, {"text": batches}, lambda text: (text @ text.T).square().mean()
        )
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = step(encode)
    beginning, _ = find_beginning(model, encode, {"text": (torch.arange(texts.shape[1]) % 2)[None]})
    with torch.no_grad():
        beginning.encode(encode, batches[0])
        outputs = batches[0].pop(beginning)
    assert len(outputs) > 1
    assert torch.equal(step(partial(beginning.encode, encode)), plain)


def trainer_state(*changes):
    """A run of siclip-lite0, whose images go through the first layers of an ImageNet network."""
    values = {
        "model": {"name": "siclip-lite0"},
        "inherit": {"source": ["efficientnet-lite0", "minilm"]},
        "data": {"train": "nowhere/*.tar", "batch_size": 6, "micro_batch": 2},
        "run": {"out": "runs/none", "steps": 10},
    }
    torch.manual_seed(3)
    return random_state(config.from_dict(config.override(values, changes)))


def weights_of(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.slow
def test_a_step_of_the_trainer_is_equal_in_every_bit():
    weights = []
    for changes in ([], ["run.keep_frozen=false"]):
        state = trainer_state(*changes)
        steps.keep_frozen(state)
        steps.train_step(state, random_batches(state))
        weights.append(weights_of(state))
    assert torch.equal(*weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "memory", "towers"),
    [
        ([], None, ["image"]),
        (["run.keep_frozen=false"], None, []),
        (["data.micro_batch=null"], None, []),
        ([], 1 << 17, []),  # no room
    ],
)
def test_where_outputs_are_kept(changes, memory, towers):
    state = trainer_state(*changes)
    steps.keep_frozen(state, memory)
    assert list(state.beginnings) == towers
    assert sum("runs once a step" in line for line in state.lines) == len(towers)


@pytest.mark.prove
def test_compiled_towers_keep_outputs_too(monkeypatch):
    """Frozen and trained layers are compiled; what is replayed is decided outside."""
    compiler = mock.Mock(side_effect=partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch, "compile", compiler)
    weights = []
    for compiled in (False, True):
        state = trainer_state()
        steps.keep_frozen(state)
        if compiled:
            setup.compile_towers(state.prepared)
        net = state.prepared.model.visual.trunk.patch_embed.backbone
        calls = []
        net.blocks.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        steps.train_step(state, random_batches(state))
        assert len(calls) == 3  # of five encodings of three micro-batches
        weights.append(weights_of(state))
    assert compiler.called
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
