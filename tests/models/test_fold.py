"""Folding: equal values with fewer layers."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import simplclip
from simplclip import models
from simplclip.nn import SimplifiedBlock
from support.models.weights import with_statistics

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[str]:
    named = model.named_modules()
    return [name for name, part in named if getattr(part, "running_mean", None) is not None]


def same(model: nn.Module, folded: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        expected, found = model(x), folded(x)
    return bool(expected.any()) and (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("repvgg_a0", 61, 0),  # a ByobNet with branches
        ("densenet121", 121, 62),  # norms that read the outputs of several layers stay
        ("resnetv2_50", 49, 17),  # norms before their layers stay as well
    ],
)
def test_a_net_of_timm_computes_the_same(name, before, after):
    model = with_statistics(timm.create_model(name, num_classes=8))
    folded = simplclip.fold(model)
    assert len(norms(model)) == before
    assert len(norms(folded)) == after
    assert same(model, folded, IMAGE)


@pytest.mark.slow
def test_a_siclip_keeps_its_blocks():
    model = with_statistics(models.create("siclip-lite0"))
    folded = simplclip.fold(model)
    assert not norms(folded.visual)
    blocks = [module for module in folded.modules() if isinstance(module, SimplifiedBlock)]
    assert len(blocks) == len(model.simplify_report.replaced)
    x = torch.randn(2, 3, 48, 48)
    assert same(model.visual, folded.visual, x)
    # folding a folded model changes nothing
    again = pickle.loads(pickle.dumps(copy.deepcopy(simplclip.fold(folded))))
    assert torch.equal(again.visual(x), folded.visual(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_forms_of_layers(bias, affine):
    for layer in (
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, bias=bias),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=bias, padding_mode="reflect"),
    ):
        norm = nn.BatchNorm2d(layer.out_channels, affine=affine)
        model = with_statistics(nn.Sequential(layer, norm))
        folded = simplclip.fold(model)
        assert not norms(folded), model
        assert same(model, folded, torch.randn(2, 4, 9, 9)), model


class Twice(nn.Module):
    """A layer whose output goes to a norm and elsewhere."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Reader(Twice):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.weight.sum()


class OneNorm(Twice):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(self.other(x))


class Choice(Twice):
    def forward(self, x, plain=False):
        y = self.conv(x)
        return y if plain or x.sum() > 1e9 else self.bn(y)


class Order(Twice):
    """Children in the order of a layer and its norm; `forward` runs the norm first."""

    def forward(self, x):
        return self.conv(self.bn(x))


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(doubled)
    return model


def doubled(module, args, output):
    return 2 * output


def in_two_places():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), conv)


@pytest.mark.parametrize(
    "make",
    [
        *(Twice, Reader, OneNorm, Choice, Order, hooked, in_two_places),
        lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_what_is_no_certain_pair_is_left(make):
    model = with_statistics(make())
    folded = simplclip.fold(model)
    assert norms(folded) == norms(model)
    assert same(model, folded, IMAGE)


def test_tied_weights_keep_their_values_elsewhere():
    first, second = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 1, bias=False)
    second.weight = first.weight
    model = with_statistics(nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second))
    folded = simplclip.fold(model)
    assert not norms(folded)
    assert same(model, folded, IMAGE)


def test_a_module_that_is_merged_itself():
    block = with_statistics(timm.create_model("fastvit_t8")).stem[0]
    state = torch.get_rng_state()
    folded = simplclip.fold(block)
    # folding must not change a run's random numbers
    assert torch.equal(torch.get_rng_state(), state)
    assert norms(block)
    assert not norms(folded)
    assert same(block, folded, torch.randn(1, 3, 16, 16))
    assert not any(p.requires_grad for p in folded.parameters())


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    message = "model: expected eval mode .* got BatchNorm2d '1' in training mode"
    with pytest.raises(ValueError, match=message):
        simplclip.fold(model)
    with pytest.raises(TypeError, match="model: expected an nn.Module, got NoneType"):
        simplclip.fold(None)
