"""use_losses: open_clip's factory makes this library's losses, until it is undone."""

import argparse
import re
import sys
import types

import open_clip
import pytest
import torch

from simplclip import losses
from simplclip.integrations.open_clip import LOSSES, use_losses
from support.paths import ROOT

FLAGS = ("distill", "siglip", "local_loss", "gather_with_grad", "horovod")
ARGS = {"model": "ViT-B-32", "rank": 0, "world_size": 1, "loss_dist_impl": None}
ARGS |= {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0}
ARGS |= dict.fromkeys(FLAGS, False)
CASES = [
    ({}, "ClipLoss", losses.ClipLoss),
    ({"siglip": True}, "SigLipLoss", losses.SigLipLoss),
    ({"model": "coca_ViT-B-32"}, "CoCaLoss", losses.CoCaLoss),
    ({"distill": True}, "DistillClipLoss", losses.WIKDLoss),
]


@pytest.fixture
def module(monkeypatch):
    """Returns a function that makes a loaded module from code."""

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
    made = type(open_clip.create_loss(args))
    assert made is getattr(open_clip.loss, theirs) is users.Loss is not ours


def test_a_use_within_another_changes_nothing_and_an_error_within_the_block_undoes_it():
    before = open_clip.loss.SigLipLoss
    with use_losses():
        with pytest.raises(KeyError), use_losses():
            raise KeyError
        assert open_clip.loss.SigLipLoss is open_clip.factory.SigLipLoss is losses.SigLipLoss
    assert open_clip.loss.SigLipLoss is open_clip.factory.SigLipLoss is before


def test_modules_that_are_imported_meanwhile(module):
    code = "from open_clip import CoCaLoss"
    before = open_clip.CoCaLoss
    with use_losses():
        theirs, others = module(code, "open_clip.later"), module(code)
        assert theirs.CoCaLoss is others.CoCaLoss is losses.CoCaLoss
    assert theirs.CoCaLoss is before
    assert others.CoCaLoss is losses.CoCaLoss  # its code may have asked for this library's class


def test_what_others_assign_meanwhile_stays(module):
    users = module("from open_clip import ClipLoss")
    with use_losses():
        users.ClipLoss = torch.nn.Identity
    assert users.ClipLoss is torch.nn.Identity


def test_a_subclass_made_before_stays_open_clips(module):
    users = module(
        "from open_clip import ClipLoss\nclass Mine(ClipLoss):\n    def forward(self, image, text, "
        "scale):\n        return super().forward(image, text, scale) + self.get_logits(image, "
        "text, scale)[0].sum()"
    )
    features = torch.randn(2, 5, 7)
    expected = users.Mine()(*features, 3.0)
    with use_losses():
        torch.testing.assert_close(users.Mine()(*features, 3.0), expected)


def test_the_docs_list_the_four_losses():
    page = (ROOT / "docs" / "losses.md").read_text()
    rows = re.findall(r"^\| .* \| `(\w+)` \| `(\w+)` \| \d+ \|$", page, re.MULTILINE)
    assert dict(rows) == {theirs: loss.__name__ for theirs, loss in LOSSES.items()}
