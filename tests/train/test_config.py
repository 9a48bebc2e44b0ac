"""Config: the file, --set, and errors that name the key."""

import pytest
import yaml

from simplclip.common.files import differences
from simplclip.train import config

WRONG = ["beta: 1", "betas: 0.9", "betas: [0.9]", "betas: [0.9, 1]", "betas: [0.9, x]", "eps: 0", "eps: x", "amsgrad: 1"]
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
    assert c.optim.options == {"betas": [0.9, 0.98], "eps": 1e-6}
    assert config.load(write(tmp_path, c.to_yaml())) == c
    assert config.from_dict(c.to_dict()) == c
    with pytest.raises(Exception, match="frozen"):
        c.optim.lr = 1.0


def test_set_parses_values_as_yaml(tmp_path):
    free = ["data.train=[a.tar, b.tar]", "model.options.width=64", "eval.splits.held=h-*.tar"]
    plain = ["optim.lr=2e-3", "optim.min_lr=1E-8", "optim.grad_clip=null", "loss.projection=true", "run.steps=7"]
    c = config.load(write(tmp_path, MINIMAL), free + plain)
    assert (c.data.train, c.model.options, c.eval.splits) == (["a.tar", "b.tar"], {"width": 64}, {"held": "h-*.tar"})
    assert (c.optim.lr, c.optim.min_lr, c.optim.grad_clip, c.loss.projection, c.run.steps) == (2e-3, 1e-8, None, True, 7)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optim.learning_rate=1", "known here: optim.lr"),
        ("lr=1", "did you mean optim.lr?"),
        ("run.batch_size=8", "did you mean data.batch_size?"),
        ("optimm.lr=8", "did you mean optim?"),
        ("zzz=8", "known here: model, inherit, data, loss, optim, eval, run"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path, key, nearest):
    message = error_of(tmp_path, MINIMAL, [key])
    unknown = "optimm" if key.startswith("optimm") else key.partition("=")[0]
    assert message.startswith(f"{unknown}: unknown key")
    assert nearest in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast' (str)"),
        ("data.batch_size=1.5", "data.batch_size: expected a whole number, got 1.5 (float)"),
        ("loss.projection=3", "loss.projection: expected true or false, got 3 (int)"),
        ("run.precision=fp8", "run.precision: expected one of fp32, bf16, fp16, auto, got 'fp8' (str)"),
        ("inherit.blocks=average", "inherit: expected `source` beside blocks = average, got none"),
        ("data.train=3", "data.train: expected a string or a mapping or a list of strings or mappings, got 3 (int)"),
        ("data.train={shards: a, weigth: 2}", "data.train.weigth: unknown key; did you mean data.train.weight?"),
        ("data.train=[{shards: a, weight: 0}]", "data.train.0.weight: expected greater than 0, got 0 (int)"),
        ("data.train=[{weight: 2}]", "data.train.0.shards: missing; expected a string or a list of strings"),
        ("data.train=[{shards: [a], weight: x}]", "data.train.0.weight: expected a number, got 'x' (str)"),
        ("eval.splits.held=3", "eval.splits.held"),
        ("optim=3", "optim: expected a mapping, got 3 (int)"),
        ("optim.lr=.nan", "optim.lr: expected a finite number, got nan (float)"),
        *(
            (f"optim.options={{{wrong}}}", "optim.options: expected betas (two numbers from 0 to below 1), eps ")
            for wrong in WRONG
        ),
        ("optim.lr=-1", "optim.lr: expected greater than 0, got -1 (int)"),
        ("run.out.x=3", "--set run.out.x: run.out is not a section, it is 'runs/x' (str)"),
        ("run.steps", "--set: expected key=value (e.g. optim.lr=1e-3), got 'run.steps'"),
        ("run.out=[", "--set run.out: not valid YAML"),
        ("data.micro_batch=7", "data.micro_batch: expected a divisor of data.batch_size = 256, got 7"),
        ("data.micro_batch={image: 7}", "data.micro_batch.image: expected a divisor of data.batch_size = 256, got 7"),
        ("data.micro_batch={imge: 8}", "data.micro_batch.imge: unknown key"),
        (
            "data.micro_batch=some",
            "data.micro_batch: expected a whole number or one of auto or null or a mapping, got 'some'",
        ),
        ("loss.pm_weight={value: 1, start: 9, until: 4}", "loss.pm_weight: expected until after start = 9, got 4"),
        ("loss.pm_weight={value: 1, end: 4}", "loss.pm_weight: expected `to`, the weight reached at `end`, got none"),
        ("loss.pm_weight={vlue: 1}", "loss.pm_weight.value: missing"),
        ("loss.pm_weight=much", "loss.pm_weight: expected a number or a mapping, got 'much'"),
        ("loss={contrastive_weight: {value: 1, until: 7}, pm_weight: 0}", "loss: expected at least one weight above 0 at"),
    ],
)
def test_wrong_value_names_key_expected_and_got(tmp_path, override, message):
    assert error_of(tmp_path, MINIMAL, [override]).startswith(message)


def test_missing_and_several_errors_at_once(tmp_path):
    message = error_of(tmp_path, {"run": {"steps": "many"}})
    assert "data: missing" in message
    assert "run.out: missing; expected a string" in message
    assert "run.steps: expected a whole number, got 'many' (str)" in message


@pytest.mark.parametrize(("key", "same"), config.GONE.items())
def test_a_key_that_is_gone_is_taken_with_its_default_alone(tmp_path, key, same):
    assert key not in set(config.keys())
    section, _, name = key.partition(".")
    now = config.load(write(tmp_path, MINIMAL))
    stored = now.to_dict()
    for value in same:
        stored[section][name] = value
        assert config.from_dict(stored) == now
        assert stored[section][name] == value  # the caller's dict stays as it is
    stored[section][name] = {"value": 30}
    message = f"{key}: this setting is gone: expected none, or its default {same[0]!r}, got {{'value': 30}}"
    assert error_of(tmp_path, stored) == message
    if section == "run":  # it never changed the result, and a checkpoint cannot be edited
        assert config.from_dict(stored, stored=True) == now


def test_keys_of_earlier_versions_for_adamw_are_its_options(tmp_path):
    stored = config.load(write(tmp_path, MINIMAL)).to_dict()
    del stored["optim"]["options"]
    for keys, options in (
        ({"beta1": 0.9, "beta2": 0.98, "eps": 1e-6}, {}),
        ({"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}, {"betas": [0.9, 0.95], "eps": 1e-8}),
        ({"eps": 1e-8}, {"eps": 1e-8}),
    ):
        now = config.from_dict(MINIMAL | {"optim": {"options": options}})
        assert config.from_dict(stored | {"optim": stored["optim"] | keys}) == now
    message = r"optim.options: expected betas .* got {'betas': \[0.9, 'x'\], 'eps': 1e-06} \(dict\)"
    with pytest.raises(config.ConfigError, match=message):
        config.load(write(tmp_path, MINIMAL), ["optim.beta2=x"])


def test_files_that_are_no_config(tmp_path):
    assert "expected a mapping of sections" in error_of(tmp_path, "- a\n- b\n")
    assert "not valid YAML" in error_of(tmp_path, "a: [\n")
    with pytest.raises(config.ConfigError, match="did you mean 'siclip-tiny-emoji'"):
        config.load("siclip-tiny-emojis")


@pytest.mark.parametrize("name", sorted(config.builtin()))
def test_builtin_configs_are_valid_but_for_the_data_of_some(name):
    assert config.load(name, ["data.train=x.tar"]).model.name


def test_describe_is_a_config_with_every_key():
    text = config.describe()
    values = yaml.safe_load(text)
    for key, field in config.keys().items():
        assert field.description
        assert field.description in text
        node = values
        for part in key.split("."):
            node = node[part]
    values["data"]["train"], values["run"]["out"] = "x", "y"
    assert config.from_dict(values) == config.from_dict({"data": {"train": "x"}, "run": {"out": "y"}})


def test_differences():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}}) == {"a.c": (2, 5), "d": (3, None)}
