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
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean optim.lr?"),
        ("optimm.lr=1", "optimm: unknown key; did you mean optim?"),
        ("model.optoins=1", "model.optoins: unknown key; did you mean model.options?"),
        ("run.wandb=1", "run.wandb: unknown key; simplclip train --help-config lists all"),
        ("optim.lr=fast", "optim.lr: Input should be a valid number, "),
        ("run.precision=fp8", "run.precision: Input should be 'fp32', 'bf16', 'fp16' or 'auto'"),
        ("optim=3", "optim: Input should be a valid dictionary"),
        ("optim.lr_scale={plain: -1}", "optim.lr_scale.plain: Input should be greater than or"),
        ("data.micro_batch=0", "data.micro_batch: Input should be greater than or equal to 1"),
        ("data.train=3", "data.train: Input should be a valid string, got 3; or: "),
        ("optim.layer_decay=2", "optim.layer_decay: Input should be less than or equal to 1"),
        ("run.out.x=3", "--set run.out.x: expected a section out, got 'runs/x'"),
        ("run.steps", "--set: expected key=value (e.g. optim.lr=1e-3), got 'run.steps'"),
        ("run={steps: 7}", "run.out: missing; expected folder of the run: "),
        (
            "run={out: x, steps: 7, epochs: 2}",
            "run: expected one of steps and epochs, got steps = 7 and epochs = 2.0",
        ),
        (
            "model={image_size: 64, options: {vision_cfg: {image_size: 32}}}",
            "model: image_size: expected one value, got 64",
        ),
        (
            "data.micro_batch=7",
            "data.micro_batch: expected a divisor of data.batch_size = 256, got 7",
        ),
        ("loss.pm_weight=x", "loss.pm_weight: Input should be a valid number, "),
        ("loss.pm_weight={to: 1}", "loss.pm_weight.value: missing"),
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
    ],
)
def test_a_wrong_value_is_one_line_that_begins_with_its_key(tmp_path, override, message):
    error = error_of(tmp_path, MINIMAL, [override])
    assert error.startswith(message)
    assert "\n" not in error


def test_several_errors_have_a_line_each(tmp_path):
    lines = error_of(tmp_path, {"run": {"steps": "many"}, "optim": {"lrr": 1}}).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "data.train",
        "optim.lrr",
        "run.out",
        "run.steps",
    ]


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
