"""Training by the sigmoid base and by a teacher: scale and bias, stages, captions, caching, the
gradient of each term.
"""

import json
import math
import os
import resource
from functools import partial
from unittest import mock

import pytest
import torch

from simplclip import models
from simplclip.common.errors import InputError
from simplclip.models.trained import read_checkpoint
from simplclip.train import loop
from simplclip.train.setup import make_state
from simplclip.train.step import train_step
from support.train import tiny
from support.train.runs import go, rows

SIGMOID = "loss.base=sigmoid"
CPU = torch.device("cpu")
STAGES = [  # Stages of WIKD: one space after the other, with the base in the last stage
    SIGMOID,
    "loss.feature_weight={value: 1.0, until: 2}",
    "loss.relational_weight={value: 1.0, start: 2, until: 4}",
    "loss.interactive_weight={value: 1.0, start: 4}",
    "loss.contrastive_weight={value: 1.0, start: 4}",
    "loss.pm_weight={value: 0.5, start: 4}",
    "data.captions_per_image=2",
]
CACHED = ["data.micro_batch=4"]


@pytest.mark.slow
def test_where_scale_and_bias_start_and_what_the_run_says_of_it(tmp_path):
    """By the config, the source, or SigLIP; the contrastive base has the model's own."""
    sources = {
        "siglip": {"init_logit_scale": math.log(50), "init_logit_bias": -12.0},
        "clip": {"init_logit_scale": math.log(80)},
    }
    for name, options in sources.items():
        model = models.create("siclip-tiny", **tiny.MODEL, **options)
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    siglip, clip = (f"inherit.source={tmp_path / name}.pt" for name in sources)
    started = f"model.checkpoint={tmp_path / 'clip'}.pt"
    set_scale = f"model.options.init_logit_scale={math.log(30)}"
    set_bias = "model.options.init_logit_bias=-4.0"
    for changes, scale, bias in (
        ([], 1 / 0.07, None),
        ([SIGMOID], 10, -10),
        ([SIGMOID, set_scale], 30, -10),
        ([SIGMOID, set_bias], 10, -4),
        ([SIGMOID, "model.options.init_logit_bias=null"], 10, None),
        ([SIGMOID, siglip], 50, -12),
        ([SIGMOID, siglip, set_bias], 50, -4),
        ([SIGMOID, clip], 80, -10),
        ([clip, set_scale], 30, None),
        ([started], 80, None),
        ([SIGMOID, started, set_scale, set_bias], 30, -4),
    ):
        model = make_state(tiny.settings(tmp_path, *changes), CPU, "fp32").model
        assert model.logit_scale.exp().item() == pytest.approx(scale), changes
        assert (None if model.logit_bias is None else model.logit_bias.item()) == bias, changes
        if SIGMOID in changes and (scale, bias) in ((10, -10), (10, None)):
            out = tmp_path / "-".join(map(str, (len(changes), scale, bias)))
            line = f"scale {scale}" + ("" if bias is None else f", bias {bias}")
            text = go(tiny.settings(tmp_path, "run.steps=1", f"run.out={out}", *changes))
            assert f"{line}\n" in text
            assert ("logit_bias" in rows(out)[0]) == (bias is not None)


@pytest.mark.slow
def test_fp16(tmp_path, monkeypatch):
    """The first scale is too large: a step is skipped, and the curves leave out its norm."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**16))
    # A CPU is slow at convolutions in float16.
    small = ["model.image_size=16", "data.batch_size=4", "data.micro_batch=2"]
    go(tiny.settings(tmp_path, SIGMOID, "run.precision=fp16", "run.steps=4", *small), curves=True)
    logged = rows(tmp_path / "run")
    norms = [math.isfinite(float(row["grad_norm"])) for row in logged]
    assert norms == sorted(norms)
    assert (norms[0], norms[-1]) == (False, True)
    assert len({row["logit_bias"] for row in logged}) == sum(norms)
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_stages_of_wikd(tmp_path):
    changes = [*STAGES, *CACHED, f"run.out={tmp_path / 'whole'}"]
    text = go(tiny.settings(tmp_path, *changes, teacher=256))
    assert "shaped_attention by cpu\n" in text, "the first stage compares no pairs"
    assert (
        "WIKDLoss: sigmoid, relational, interactive, feature, pair matching, to stored features of "
        "made up; " in text
    )
    logged = rows(tmp_path / "whole")
    on = {"feature": {1, 2}, "relational": {3, 4}}
    on |= dict.fromkeys(("sigmoid", "interactive", "pair_matching"), {5, 6, 7})
    for term, steps in on.items():
        active = {int(row["step"]) for row in logged if float(row[f"{term}_loss"]) > 0}
        assert active == steps, term
    assert len({row["logit_bias"] for row in logged[:5]}) == 1, (
        "the bias has no gradient before its term"
    )
    assert len({row["logit_bias"] for row in logged[4:]}) == 3


@pytest.mark.slow
def test_a_teacher_of_another_width_is_projected_and_its_source_may_have_a_weight(tmp_path):
    changes = ["loss.feature_weight=1", "loss.interactive_weight=1", "run.steps=1"]
    shard = tiny.settings(tmp_path, teacher=16).data.train
    changes.append(f"data.train=[{{shards: {shard}, weight: 2}}]")
    go(tiny.settings(tmp_path, *changes, teacher=16))
    assert read_checkpoint(tmp_path / "run")["loss"]["image_projection"].shape == (16, 256)


def test_features_of_another_width_than_their_folder_says(tmp_path):
    settings = tiny.settings(tmp_path, "loss.feature_weight=1", teacher=16)
    stamp = json.dumps({"teacher": {"name": "made up", "width": 8, "logit_scale": 10.0}})
    (tmp_path / "data" / "teacher" / "meta.json").write_text(stamp)
    with pytest.raises(
        InputError,
        match="data.sidecars: expected features of width 8, as their meta.json says, got .* 16",
    ):
        go(settings)


@pytest.mark.slow
def test_many_micro_batches_do_not_use_up_file_descriptors(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limit[1]))
    try:
        changes = ["data.micro_batch=1", "data.batch_size=24", "data.workers=1", "run.steps=1"]
        assert "step 1/1" in go(tiny.settings(tmp_path, *changes))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_micro_batches_give_the_whole_batches_gradient(tmp_path, monkeypatch, micro_batch):
    """Captions have 8 tokens, half of what a micro-batch counts."""
    results = []
    names = ("feature", "relational", "interactive", "pm")
    always = [*(f"loss.{name}_weight=0.7" for name in names), "data.captions_per_image=2"]
    for changes in ([], [f"data.micro_batch={micro_batch}"]):
        torch.manual_seed(0)
        settings = tiny.settings(tmp_path, SIGMOID, *always, *changes, teacher=256)
        state = make_state(settings, CPU, "fp32")
        torch.nn.init.normal_(state.model.text.transformer.resblocks[0].qk.weight, std=0.05)
        encode = mock.Mock(side_effect=state.model.encode_text)
        monkeypatch.setattr(state.model, "encode_text", encode)
        size, count = loop._micro_batch_size_and_count(state.config)
        loader = iter(loop.make_loader(state))
        monkeypatch.setattr(state.optimizer, "step", lambda: None)
        row = train_step(state, [next(loader) for _ in range(count)])
        named = [*state.model.named_parameters(), *state.objective.loss.named_parameters()]
        seen = [len(call.args[0]) for call in encode.call_args_list]
        results.append((row, {name: parameter.grad for name, parameter in named}, seen))
    (row, grads, once), (cached_row, cached, seen) = results
    assert once == [16]
    size = 4 * micro_batch
    assert seen[: -(-16 // size)] == [len(part) for part in torch.empty(16).split(size)]
    assert cached_row == pytest.approx(row, rel=1e-4)
    for name, grad in grads.items():
        assert (grad - cached[name]).abs().max() <= 1e-4 * grad.abs().max() + 1e-7, name
