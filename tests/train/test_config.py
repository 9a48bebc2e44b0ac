"""Configs: the file, --set, and errors that name the key."""

import os
import re

import pytest
import yaml

from simplclip.models.naming import configs
from simplclip.train import config

MINIMAL = {"data": {"train": "x-*.tar"}, "run": {"out": "runs/x"}}


def write(tmp_path, values) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def error_of(tmp_path, values, overrides=()) -> str:
    with pytest.raises(config.ConfigError) as caught:
        config.load(write(tmp_path, values), overrides)
    return str(caught.value)


def test_defaults_and_round_trip(tmp_path):
    c = config.load(write(tmp_path, MINIMAL))
    assert c.data.train == "x-*.tar"
    assert config.load(write(tmp_path, c.to_yaml())) == c
    assert config.from_dict(c.to_dict()) == c
    with pytest.raises(Exception, match="frozen"):
        c.optim.lr = 1.0


def test_texts_that_look_like_numbers_are_read_back_as_texts(tmp_path):
    c = config.from_dict(MINIMAL | {"run": {"out": "1e-3"}, "eval": {"splits": {"1e3": "+2E05"}}})
    assert config.load(write(tmp_path, c.to_yaml())) == c


def test_set_parses_values_as_yaml(tmp_path):
    free = ["data.train=[a.tar, b.tar]", "model.options.width=64", "eval.splits.held=h-*.tar"]
    plain = ["optim.lr=2e-3", "optim.weight_decay=1E-8", "optim.grad_clip=null"]
    plain += ["run.compile=true", "run.steps=7", "run.out=~/runs"]
    c = config.load(write(tmp_path, MINIMAL), free + plain)
    assert c.run.out == os.path.expanduser("~/runs")
    assert c.data.train == ["a.tar", "b.tar"]
    assert (c.model.options, c.eval.splits) == ({"width": 64}, {"held": "h-*.tar"})
    assert (c.optim.lr, c.optim.weight_decay, c.optim.grad_clip) == (2e-3, 1e-8, None)
    assert (c.run.compile, c.run.steps) == (True, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "lr: unknown key; did you mean optim.lr?"),
        ("optim.lr=fast", "optim.lr: expected a valid number, got 'fast' (str)"),
        (
            "run.precision=fp8",
            "run.precision: expected 'fp32', 'bf16', 'fp16' or 'auto', got 'fp8' (str)",
        ),
        ("optim=3", "optim: expected a mapping, as {NAME: VALUE}"),
        ("data.sidecars=taught", "data.sidecars: expected a list, as [VALUE], got 'taught' (str)"),
        ("run.device=gpu", "run.device: expected auto, cpu, cuda or cuda:N, got 'gpu' (str)"),
        ("optim.lr=.nan", "optim.lr: expected a finite number, got nan (float)"),
        (
            "run={out: x, steps: 7, epochs: 2}",
            "run: expected one of steps and epochs, got steps = 7 and epochs = 2.0",
        ),
        ("optim.lr_scale={plain: -1}", "optim.lr_scale.plain: expected greater than or equal to 0"),
        ("optim.lr=-1", "optim.lr: expected greater than 0, got -1 (int)"),
        ("run.out.x=3", "--set run.out.x: expected a section out, got 'runs/x' (str)"),
        (
            "model={name: siclip-tiny, image_size: 64, options: {vision_cfg: {image_size: 32}}}",
            "model: image_size: expected one value, got 64",
        ),
        ("run.steps", "--set: expected key=value (e.g. optim.lr=1e-3), got 'run.steps'"),
        (
            "data.micro_batch=7",
            "data.micro_batch: expected a divisor of data.batch_size = 256, got 7",
        ),
        (
            "loss.pm_weight={value: 1, start: 9, until: 4}",
            "loss.pm_weight: expected until after start = 9, got 4",
        ),
        (
            "loss.pm_weight={value: 1, end: 4}",
            "loss.pm_weight: expected `to`, the weight reached at `end`, got none",
        ),
        (
            "loss={contrastive_weight: {value: 1, until: 7}, pm_weight: 0}",
            "loss: expected at least one weight above 0 at",
        ),
        (
            "loss={contrastive_weight: {value: 1, to: 0, until: 5}, pm_weight: {value: 1, start: "
            "5}}",
            "loss: expected at least one weight above 0 at every step, got none at step 4",
        ),
    ],
)
def test_wrong_value_names_key_expected_and_got(tmp_path, override, message):
    assert error_of(tmp_path, MINIMAL, [override]).startswith(message)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optimm.lr", "optim.lr"),
        ("train.learning-rate", "optim.lr"),
        ("optim.wd", "optim.weight_decay"),
        ("run.fp16", "run.precision"),
        ("data.shuffle_buffer", "data.options.shuffle_buffer"),
        ("run.wandb", None),
    ],
)
def test_an_unknown_key_is_answered_by_the_nearest(tmp_path, key, near):
    """By spelling, by the words of its meaning or by initials, in whatever section it is."""
    message = error_of(tmp_path, MINIMAL, [f"{key}=1"])
    advice = f"did you mean {near}?" if near else "simplclip train --help-config lists all"
    assert f"{key}: unknown key; {advice}" in message.splitlines()


def test_missing_and_several_errors_at_once(tmp_path):
    message = error_of(tmp_path, {"run": {"steps": "many"}})
    assert "data.train: missing; expected the pairs" in message
    assert "run.out: missing; expected folder of the run" in message
    assert "run.steps: expected a valid integer, got 'many' (str)" in message
    message = error_of(tmp_path, {"data": {"train": "x"}})
    assert message.startswith("run.out: missing; expected folder of the run")


def test_the_length_that_is_typed_replaces_that_of_the_file(tmp_path):
    values = MINIMAL | {"run": {"out": "runs/x", "steps": 50}, "optim": {"warmup": 9}}
    file = write(tmp_path, values)
    for overrides, steps, epochs in (
        (["run.epochs=3"], None, 3.0),
        (["run.epochs=3", "run.steps=7"], 7, None),
        (["run.epochs=null"], 50, None),
        ([], 50, None),
    ):
        loaded = config.load(file, overrides)
        assert (loaded.run.steps, loaded.run.epochs) == (steps, epochs)
        assert config.from_dict(loaded.to_dict()) == loaded
    assert config.load(write(tmp_path, MINIMAL)).run.steps == 1000


def test_files_that_are_no_config(tmp_path):
    assert "expected a mapping of sections" in error_of(tmp_path, "- a\n- b\n")
    assert "not valid YAML" in error_of(tmp_path, "a: [\n")
    twice = "optim:\n  lr: 1\ndata: {train: x}\n'optim':\n  warmup: 2\n"
    message = "expected each key once, got 'optim' in line 1 and in line 4"
    assert message in error_of(tmp_path, twice)
    inner = ["model.options={text_cfg: {width: 8, width: 9}}"]
    message = "--set model.options: not valid YAML: expected each key once, got 'width' in line 1"
    assert message in error_of(tmp_path, {}, inner)
    built_in = ", ".join(configs())
    with pytest.raises(config.ConfigError, match=f"the built-in {built_in}, got 'siclip2-s1'"):
        config.load("siclip2-s1")
    with pytest.raises(config.ConfigError, match="got 'siclip-tiny', a model; a file with model: "):
        config.load("siclip-tiny")


def test_one_image_is_a_batch_of_feature_distillation_alone():
    values = {"data": {"train": "x.tar", "batch_size": 1}, "run": {"out": "r", "steps": 2}}
    config.check_new_run(config.from_dict(values | {"loss": {"feature_weight": 0.5}}))
    for loss in ({"base": "sigmoid"}, {"pm_weight": 1.0}, {"relational_weight": 1.0}):
        with pytest.raises(config.ConfigError, match=r"data.batch_size: expected at least 2"):
            config.check_new_run(config.from_dict(values | {"loss": loss}))


def test_describe_is_a_config_with_every_key():
    text = config.describe()
    assert max(map(len, text.splitlines())) <= 80
    values = yaml.safe_load(text)
    comments = re.sub(r"\n +# ", " ", text)  # those of several lines in one
    for key, field in config.keys().items():
        assert field.description
        assert field.description in comments
        node = values
        for part in key.split("."):
            node = node[part]
    values["data"]["train"], values["run"]["out"] = "x", "y"
    least = {"data": {"train": "x"}, "run": {"out": "y"}}
    assert config.from_dict(values) == config.from_dict(least)
