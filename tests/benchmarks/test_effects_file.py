"""The effects file: its errors, and the runs that its effects stand for."""

import re

import pytest
from paths import ROOT

from benchmarks.ablation import effects as files
from simplclip.train.config import ConfigError

DEMO = str(ROOT / "examples/emoji/siclip-lite0.yaml")
ONE = """
effects:
  - {name: a, group: g, base: [loss.pm_weight=0], variant: [loss.pm_weight=1]}
"""


def load(folder, text):
    path = folder / "effects.yaml"
    path.write_text(text)
    return files.load(path)


def trials(folder, text, seed=0, **options):
    found = load(folder, text)
    return [files.trials(found, effect, seed, DEMO, **options) for effect in found.effects]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a mapping with `effects`, got list"),
        ("steps: 3", "effects: field required"),
        (ONE.replace("variant:", "varaint:"), "effects.0.varaint: extra inputs are not permitted"),
        (ONE.replace("group: g", "group: g, steps: 0"), "effects.0.steps: input should be greater than or equal to 1"),
        (ONE + ONE.replace("effects:", "").lstrip("\n"), "expected different names of effects, got 'a' twice"),
        (
            ONE.replace("group: g", "group: g, needs: [d]"),
            "data: expected the command that makes each folder of `needs`, got none",
        ),
    ],
)
def test_errors_of_the_file_name_the_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_errors_name_the_effect_or_the_built_in_files(tmp_path):
    for setting, message in (
        ("loss.pm_wieght=1", "a, variant: loss.pm_wieght: unknown key; did you mean loss.pm_weight?"),
        ("eval.splits={}", "eval.splits: expected held-out data, got none"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            trials(tmp_path, ONE.replace("loss.pm_weight=1", f"'{setting}'"))
    with pytest.raises(ConfigError, match="effects: expected a YAML file, or emoji, got emojis"):
        files.load("emojis")


def test_equal_settings_are_one_run_however_they_are_written(tmp_path):
    text = """
.parts: &parts [loss.pm_weight=0, [loss.feature_weight=0, "loss.relational_weight=0"]]
effects:
  - {name: a, group: g, base: [*parts], variant: [*parts, loss.pm_weight=1]}
  - {name: b, group: g, set: [*parts], base: [], variant: ["loss.pm_weight=1.0"]}
  - {name: c, group: g, set: [*parts], base: [optim.lr=0.0015], variant: [optim.lr=1.5e-4]}
"""
    a, b, c = trials(tmp_path, text)
    assert a["base"].digest == b["base"].digest == c["base"].digest
    assert a["variant"].digest == b["variant"].digest
    digests = {a["base"].digest, a["variant"].digest, c["variant"].digest}
    digests |= {trials(tmp_path, text, **more)[0]["base"].digest for more in ({"seed": 1}, {"overrides": ["run.steps=7"]})}
    assert len(digests) == 5
    assert (a["base"].name, a["variant"].seed) == (f"a-base-s0-{a['base'].digest}", 0)


def test_order_of_settings(tmp_path):
    text = """
steps: 10
set: [data.batch_size=1, optim.lr=1]
effects:
  - {name: a, group: g, steps: 20, set: [optim.lr=2, optim.warmup=2], base: [optim.warmup=3], variant: [run.seed=9]}
"""
    (pair,) = trials(tmp_path, text, seed=4, overrides=["data.batch_size=5"])
    every = ["run.seed=4", "data.batch_size=1", "optim.lr=1", "run.steps=20", "optim.lr=2", "optim.warmup=2"]
    for side, own in (("base", "optim.warmup=3"), ("variant", "run.seed=9")):
        assert pair[side].overrides(tmp_path)[:-1] == [*every, own, "data.batch_size=5"]


def test_prepared_runs(tmp_path):
    text = """
steps: 10
set: [data.batch_size=8]
prepare:
  own: ["model.options={simplified: false}", run.steps=40]
effects:
  - {name: a, group: g, base: [], variant: ["inherit.source=[minilm, '{own}']"]}
"""
    (pair,) = trials(tmp_path, text, seed=2)
    own = pair["variant"].prepared["own"]
    assert (pair["base"].prepared, own.keep, own.seed, pair["variant"].keep) == ({}, True, 2, False)
    assert own.settings == ("data.batch_size=8", "run.steps=10", "model.options={simplified: false}", "run.steps=40")
    assert f"inherit.source=[minilm, '{tmp_path / own.name}/last.pt']" in pair["variant"].overrides(tmp_path)
    (other,) = trials(tmp_path, text.replace("run.steps=40", "run.steps=41"), seed=2)
    assert other["variant"].digest != pair["variant"].digest, "another checkpoint is inherited"
    assert other["base"].digest == pair["base"].digest


def test_the_built_in_effects_are_valid_and_compare_different_runs():
    found = files.load("emoji")
    pairs = {effect.name: files.trials(found, effect, 0, DEMO) for effect in found.effects}
    assert len(pairs) >= 12
    assert all(pair["base"].digest != pair["variant"].digest for pair in pairs.values())
    groups = {effect.group for effect in found.effects}
    known = "pair matching, distillation, inheritance, captions, sharing, block, noise, padding, recipe"
    assert groups == {*known.split(", ")}
    digests = {trial.digest for pair in pairs.values() for trial in pair.values()}
    assert len(digests) < 1.4 * len(pairs), "most effects share their bases"
    assert sum(effect.steps == 400 for effect in found.effects) >= 4
