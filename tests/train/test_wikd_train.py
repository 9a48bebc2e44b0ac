"""Training with a teacher in the shards, several captions, gradient caching and inherited weights, in the trainer."""

import os
import resource

import pytest
import tiny
from runs import check_resumed, go, rows

from simplclip import data
from simplclip.train import checkpoint
from simplclip.train.config import ConfigError

WIDTH = 256  # of siclip-tiny
WIKD = [
    "loss.feature_weight={value: 1.0, to: 0.0, end: 4}",
    "loss.relational_weight={value: 1.0, start: 2}",
    "loss.interactive_weight=1.0",
    "data.captions_per_image=2",
]
CACHED = ["data.micro_batch=4", "model.freeze_norms=true"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [WIKD, [*WIKD, *CACHED, "run.precision=bf16", "model.options.vision_cfg.timm_drop=0.2"]])
def test_it_trains_logs_every_term_and_resumes_bit_for_bit(tmp_path, monkeypatch, changes):
    text = check_resumed(tmp_path, monkeypatch, 4, changes, teacher=WIDTH)
    assert "WIKDLoss: contrastive, relational, interactive, feature, pair matching; features of made up, 256 wide" in text
    logged = rows(tmp_path / "whole")
    assert [float(row["relational_loss"]) > 0 for row in logged] == [False, False, True, True, True, True, True]
    assert [float(row["feature_loss"]) > 0 for row in logged] == [True, True, True, True, False, False, False]
    for row in logged:
        terms = sum(float(value) for name, value in row.items() if name.endswith("_loss"))
        assert float(row["loss"]) == pytest.approx(terms, rel=1e-2 if "bf16" in str(changes) else 1e-5)


@pytest.mark.slow
def test_many_micro_batches_do_not_use_up_file_descriptors(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limit[1]))
    try:
        changes = ["data.micro_batch=1", "data.batch_size=48", "data.workers=1", "run.steps=1", "model.freeze_norms=true"]
        assert "step 1/1" in go(tiny.settings(tmp_path, *changes))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize(
    ("change", "teacher", "error", "message"),
    [
        ("loss.feature_weight=1", 0, data.ShardError, "no teacher is named in .*meta.json; make them by `simplclip teacher`"),
        (
            "optim.options.beta=1",
            0,
            ConfigError,
            "optim.options: expected arguments of torch.optim.AdamW, got {.*'beta': 1}",
        ),
        ("optim.options.betas=[1, 2]", 0, ConfigError, "optim.options: .*: Invalid beta parameter at index 0: 1"),
        ("inherit.source=nowhere.pt", 0, Exception, "nowhere.pt"),
        ("data.micro_batch=4", 0, ValueError, "model: expected no batch statistics, got BatchNorm"),
        ("data.train=[none.tar]", 0, ValueError, "data.train: expected a file, got 'none.tar', which does not exist"),
        ("data.batch_size=100", 0, RuntimeError, "batch_size 100"),
        ("model.options.depth=3", 0, ConfigError, "model.options"),
    ],
)
def test_what_does_not_fit_is_one_error_and_leaves_nothing(tmp_path, change, teacher, error, message):
    out = tmp_path / "new" / "run"
    with pytest.raises(error, match=message):
        go(tiny.settings(tmp_path, change, f"run.out={out}", teacher=teacher))
    assert not out.parent.exists()


def test_a_teacher_of_another_width_is_projected(tmp_path):
    changes = ["loss.feature_weight=1", "loss.interactive_weight=1", "run.steps=2"]
    go(tiny.settings(tmp_path, *changes, teacher=16))
    assert checkpoint.load(tmp_path / "run")["loss"]["image_projection"].shape == (16, WIDTH)
