"""open_clip's main branch (4.2.0.dev0), by stand-ins of what changed there: towers without `batch_first`, and the trainer."""

import sys
import types

import open_clip_4
import pytest
import recorded
import torch
from clips import batch, clip

from simplclip.integrations import open_clip_train as openclip_train
from simplclip.models.simplify import simplify

DISTILL = ("--distill-model", "ViT-B-32", "--distill-pretrained", "x")


def without_batch_first(transformer):
    """Removes batch_first from a tower, whose loop over the blocks becomes that of the main branch."""

    class Transformer(type(transformer)):
        def forward(self, x, attn_mask=None):
            for block in self.resblocks:
                x = block(x, attn_mask=attn_mask)
            return x

    del transformer.batch_first
    transformer.__class__ = Transformer


def test_simplify_needs_no_batch_first():
    changed, model = clip(), clip()
    without_batch_first(changed.transformer)
    without_batch_first(changed.visual.transformer)
    outputs = []
    for one in (changed, model):
        torch.manual_seed(0)
        _, report = simplify(one)
        assert len(report.replaced) == 7
        outputs.append(one(*batch()))
    torch.testing.assert_close(*outputs)


@pytest.fixture
def trainer(monkeypatch):
    trainer = open_clip_4.module()
    monkeypatch.setitem(sys.modules, "open_clip_train", types.ModuleType("open_clip_train"))
    monkeypatch.setitem(sys.modules, "open_clip_train.main", trainer)
    monkeypatch.setitem(sys.modules, "open_clip_train.data", types.ModuleType("open_clip_train.data"))
    return trainer


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ((), ("ClipLoss", "ClipPMLoss")),
        (DISTILL, ("DistillClipLoss", "WIKDLoss")),
        (("--siglip",), ("SigLipLoss", "SigLipLoss")),
        (("--model", "coca"), ("CoCaLoss", "CoCaLoss")),
        (("--model", "clap", "--siglip"), ("ClipLoss", "ClipPMLoss")),
    ],
)
def test_the_launcher_gives_the_trainers_own_losses(trainer, argv, names):
    argv = ["--model", "ViT-B-32", *argv]
    before = dict(vars(trainer))
    theirs, task = trainer.main(argv)
    ours, replaced = openclip_train.main(argv)
    assert vars(trainer) == before
    assert (type(task.loss).__name__, type(replaced.loss).__name__) == names
    assert type(replaced.loss).__module__.startswith("simplclip.")
    for name in ("caption_loss_weight", "clip_loss_weight", "dist_impl"):
        assert getattr(replaced.loss, name, None) == getattr(task.loss, name, None)
    assert len(ours) == len(theirs) == 10
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=1e-4)


def test_learned_parameters_are_trained_saved_and_resumed(trainer, tmp_path):
    def run(folder, *argv):
        (tmp_path / folder).mkdir(exist_ok=True)
        argv = ["--model", "ViT-B-32", "--pm-weight", "1", "--checkpoint-path", str(tmp_path / folder), *argv]
        return openclip_train.main(argv)

    whole, task = run("whole", "--epochs", "2")
    assert task.loss.plane_weight.item() != task.loss.INITIAL_WEIGHT
    run("parts")
    second, again = run("parts", "--epochs", "2", "--resume", str(tmp_path / "parts" / "epoch_1.pt"))
    for mine, other in zip(second, whole[10:]):
        assert mine == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(again.loss.plane_weight, task.loss.plane_weight)
    checkpoint = torch.load(tmp_path / "parts" / "epoch_1.pt", weights_only=True)
    assert "simplclip_loss.plane_weight" in checkpoint["state_dict"]


def test_what_cannot_be_replaced_is_named(trainer):
    with pytest.raises(ValueError, match="--model genlip: expected open_clip's .* got CrossEntropyLoss, which"):
        openclip_train.main(["--model", "genlip"])
    with pytest.raises(ValueError, match="--fsdp: expected a loss without learned parameters"):
        openclip_train.main(["--model", "ViT-B-32", "--fsdp", "--pm-weight", "1"])
    steps, _ = openclip_train.main(["--model", "ViT-B-32", "--fsdp"])
    assert len(steps) == 10


def test_sigmoid_and_pair_matching_have_one_sweep_in_the_launcher(trainer, monkeypatch, tmp_path):
    """The trainer adds the terms up; the first term carries the gradient of the sum."""
    calls = recorded.calls(monkeypatch)
    argv = ["--model", "ViT-B-32", "--siglip", "--pm-weight", "1", "--checkpoint-path", str(tmp_path)]
    steps, _ = openclip_train.main(argv)
    assert [name for name, _ in calls] == ["similarity_sigmoid"] * len(steps)


def test_another_trainer_is_an_error_that_names_a_version(trainer, capsys):
    del trainer.create_task
    with pytest.raises(SystemExit):
        openclip_train.main(["--model", "ViT-B-32"])
    assert "found another trainer; pip install 'open_clip_torch==3.3.*' works" in capsys.readouterr().err
