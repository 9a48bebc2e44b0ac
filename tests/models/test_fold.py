"""Folding: equal values with fewer layers."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import ConvNormAct
from torch import nn

import simplclip
from simplclip.models.fold import fold_frozen
from simplclip.models.inherit import freeze
from simplclip.models.mobileclip import RepMixerBlock
from support.models.open_clip_models import clip
from support.models.weights import with_statistics


def norms(model):
    named = model.named_modules()
    return [name for name, part in named if getattr(part, "running_mean", None) is not None]


def same(model, folded, x):
    with torch.no_grad():
        expected, found = model(x), folded(x)
    return bool(expected.any()) and (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("repvgg_a0", 61, 0),  # a ByobNet with branches
        ("fastvit_mci0", 114, 2),  # its two attention blocks have norms of their own
        ("resnet10t", 14, 14),  # has no ConvNormAct
    ],
)
def test_a_net_of_timm_computes_the_same(name, before, after):
    model = with_statistics(timm.create_model(name, num_classes=8))
    folded = simplclip.fold(model.train())
    model.eval()
    assert (len(norms(model)), len(norms(folded))) == (before, after)
    x = torch.randn(2, 3, 64, 64)
    assert same(model, folded, x)
    again = pickle.loads(pickle.dumps(copy.deepcopy(folded)))
    assert torch.equal(again(x), folded(x))


def test_forms_of_layers():
    for act, groups, bias in ((True, 1, False), (False, 4, True)):
        options = {"stride": 2, "padding": 1, "groups": groups, "bias": bias, "apply_act": act}
        model = with_statistics(nn.Sequential(ConvNormAct(4, 8, 3, **options)))
        folded = simplclip.fold(model)
        assert not norms(folded)
        assert same(model, folded, torch.randn(2, 4, 9, 9))
    plain = with_statistics(nn.Sequential(ConvNormAct(4, 8, 3, apply_norm=False)))
    assert same(plain, simplclip.fold(plain), torch.randn(2, 4, 9, 9))


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


def frozen_part():
    """Returns a model whose first part is frozen, and runs folded; and the copies."""
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(RepMixerBlock(8), nn.Linear(8, 4)))
    freeze(model, ["0"])
    return model.train(), fold_frozen(model)


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return model[1].weight.grad


def test_frozen_parts_run_folded_with_equal_gradients():
    model, copies = frozen_part()
    assert list(copies) == ["0"]
    x = torch.randn(2, 5, 8)
    folded = gradients(model, x)
    del model[0].forward
    plain = gradients(model, x)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(folded, plain)  # so the copy ran


def test_the_copies_belong_to_no_model():
    model, copies = frozen_part()
    plain = with_statistics(nn.Sequential(RepMixerBlock(8), nn.Linear(8, 4)))
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 5, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other[0].forward.__self__ is not copies["0"]


def test_what_has_nothing_to_fold_has_no_copy():
    vit = clip()
    freeze(vit, ["visual"])  # its one convolution has no norm
    assert not fold_frozen(vit.train())
