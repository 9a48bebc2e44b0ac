"""use_losses: open_clip's factory makes this library's losses, until it is undone."""

import argparse
import sys
import types

import open_clip
import pytest
import torch

from simplclip import losses
from simplclip.integrations.open_clip import use_losses

ARGS = {"distill": False, "model": "ViT-B-32", "siglip": False, "local_loss": False, "gather_with_grad": False, "rank": 0}
ARGS |= {"world_size": 1, "horovod": False, "loss_dist_impl": None, "coca_caption_loss_weight": 2.0}
ARGS |= {"coca_contrastive_loss_weight": 1.0}
CASES = [
    ({}, "ClipLoss", losses.ClipLoss),
    ({"siglip": True}, "SigLipLoss", losses.SigLipLoss),
    ({"model": "coca_ViT-B-32"}, "CoCaLoss", losses.CoCaLoss),
    ({"distill": True}, "DistillClipLoss", losses.WIKDLoss),
]


@pytest.fixture
def module(monkeypatch):
    """Makes a loaded module that runs this code."""

    def make(code, name="users_module"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(code, vars(module))
        return module

    return make


@pytest.mark.parametrize(("changes", "theirs", "ours"), CASES)
def test_the_factory_makes_ours(changes, theirs, ours, module):
    args = argparse.Namespace(**ARGS | changes)
    users = module(f"from open_clip.loss import {theirs} as Loss\nmake = lambda: Loss")
    with use_losses():
        assert type(open_clip.create_loss(args)) is ours
        assert getattr(open_clip.loss, theirs) is users.make() is ours
    assert type(open_clip.create_loss(args)) is getattr(open_clip.loss, theirs) is users.Loss is not ours


def test_it_stays_until_it_is_undone():
    before = open_clip.loss.ClipLoss
    replaced = use_losses()
    try:
        assert open_clip.ClipLoss is open_clip.loss.ClipLoss is losses.ClipLoss
        with use_losses():
            assert open_clip.ClipLoss is losses.ClipLoss
        assert open_clip.ClipLoss is losses.ClipLoss
    finally:
        replaced.undo()
    assert open_clip.ClipLoss is before
    replaced.undo()
    assert open_clip.ClipLoss is before


def test_the_last_undo_counts_in_any_order():
    before = open_clip.loss.SigLipLoss
    first, second = use_losses(), use_losses()
    first.undo()
    first.undo()
    assert open_clip.loss.SigLipLoss is open_clip.factory.SigLipLoss is losses.SigLipLoss
    second.undo()
    assert open_clip.loss.SigLipLoss is open_clip.factory.SigLipLoss is before


def test_modules_that_are_imported_meanwhile(module):
    code = "from open_clip import CoCaLoss"
    before = open_clip.CoCaLoss
    with use_losses():
        theirs, others = module(code, "open_clip.later"), module(code)
        assert theirs.CoCaLoss is others.CoCaLoss is losses.CoCaLoss
    assert theirs.CoCaLoss is before
    assert others.CoCaLoss is losses.CoCaLoss  # it may have asked for ours


def test_what_others_assign_meanwhile_stays(module):
    users = module("from open_clip import ClipLoss")
    with use_losses():
        users.ClipLoss = torch.nn.Identity
    assert users.ClipLoss is torch.nn.Identity


def test_a_subclass_made_before_stays_open_clips(module):
    users = module(
        "from open_clip import ClipLoss\n"
        "class Mine(ClipLoss):\n"
        "    def forward(self, image, text, scale):\n"
        "        return super().forward(image, text, scale) + self.get_logits(image, text, scale)[0].sum()"
    )
    features = torch.randn(2, 5, 7)
    expected = users.Mine()(*features, 3.0)
    with use_losses():
        torch.testing.assert_close(users.Mine()(*features, 3.0), expected)


def test_an_error_within_the_block_undoes_it():
    before = open_clip.loss.SigLipLoss
    with pytest.raises(KeyError), use_losses():
        raise KeyError
    assert open_clip.loss.SigLipLoss is before
