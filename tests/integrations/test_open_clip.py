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
from simplclip.ops.similarity.chunks import STORE_BYTES
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


def kept(loss, n, width=8):
    """Returns the bytes that are kept for backward."""
    torch.manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(n, width), dim=1).requires_grad_()
        for _ in range(2)
    )
    arguments = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(10.0)}
    if "SigLip" in type(loss).__name__:
        arguments["logit_bias"] = torch.tensor(-10.0)
    if "CoCa" in type(loss).__name__:
        arguments["logits"] = torch.randn(n, 2, 3, requires_grad=True)
        arguments["labels"] = torch.ones(n, 2, dtype=torch.long)
    if type(loss).__name__ in ("DistillClipLoss", "WIKDLoss"):
        arguments |= {f"dist_{name}": value.detach() for name, value in arguments.items()}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(**arguments, output_dict=True)
    return sum(storage.nbytes() for storage in storages.values())


PAGE = (ROOT / "docs" / "losses.md").read_text()


def rows_of_the_docs():
    return re.findall(r"^\| .* \| `(\w+)` \| `(\w+)` \| (\d+) \|$", PAGE, re.MULTILINE)


def test_the_docs_list_the_four_losses():
    assert [theirs for theirs, *_ in rows_of_the_docs()] == list(LOSSES)


@pytest.mark.parametrize(("theirs", "ours", "matrices"), rows_of_the_docs())
def test_what_the_docs_say_is_kept_for_backward(theirs, ours, matrices):
    weights = (2.0, 1.0) if theirs == "CoCaLoss" else ()
    options = {"pm_weight": 0} if ours == "ClipPMLoss" else {}
    small, large = 512, 8192  # the large matrices are more than ours keep
    assert kept(getattr(open_clip.loss, theirs)(*weights), small) == pytest.approx(
        4 * small**2 * int(matrices), rel=0.1
    )
    most = STORE_BYTES + 100 * 4 * large
    assert kept(getattr(losses, ours)(*weights, **options), large) <= most < 4 * large**2
