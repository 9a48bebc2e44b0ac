"""use_losses: open_clip's factory makes this library's losses, until it is undone."""

import argparse

import open_clip
import pytest

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


@pytest.mark.parametrize(("changes", "theirs", "ours"), CASES)
def test_the_factory_makes_ours(changes, theirs, ours):
    args = argparse.Namespace(**ARGS | changes)
    with use_losses():
        assert type(open_clip.create_loss(args)) is ours
        assert getattr(open_clip.loss, theirs) is ours
    assert type(open_clip.create_loss(args)) is getattr(open_clip.loss, theirs) is not ours


def test_it_stays_until_it_is_undone():
    before = open_clip.loss.ClipLoss
    replaced = use_losses()
    try:
        assert open_clip.ClipLoss is open_clip.loss.ClipLoss is losses.ClipLoss
        with use_losses():  # nothing is left to replace
            pass
        assert open_clip.ClipLoss is losses.ClipLoss
    finally:
        replaced.undo()
    assert open_clip.ClipLoss is before
    replaced.undo()


def test_an_error_within_the_block_undoes_it():
    before = open_clip.loss.SigLipLoss
    with pytest.raises(KeyError), use_losses():
        raise KeyError
    assert open_clip.loss.SigLipLoss is before
