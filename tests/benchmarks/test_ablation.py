"""The ablation: its runs, going on after a stop, failures and the table."""

import json
import re

import pytest

from benchmarks import ablation
from benchmarks.results_file import read_csv
from simplclip.evaluation import Figure, ModelResult, SplitResult
from simplclip.train.config import ConfigError
from support.train import tiny

TEXT = """
steps: 1
set: [loss.pm_weight=0]
.parts: &parts [[optim.lr=1e-4]]
effects:
  - {name: matching, base: [], variant: [loss.pm_weight=1]}
  - {name: rate, base: [], variant: [*parts], seeds: 3}
"""


@pytest.fixture
def command(tmp_path):
    held = tiny.write_shard(tmp_path / "held" / "held-0.tar")
    settings = tiny.settings(tmp_path, "run.steps=1", f"eval.splits={{a: {held}, b: {held}}}")
    (tmp_path / "full.yaml").write_text(settings.to_yaml())
    (tmp_path / "effects.yaml").write_text(TEXT)
    effects = ("--effects", str(tmp_path / "effects.yaml"))
    return [str(tmp_path / "full.yaml"), *effects, "--out", str(tmp_path / "out"), "--seeds", "2"]


def evaluated(recall):
    """A model's result: image to text has `recall` in split a and half of it in b; text to image
    0.2 more.
    """
    splits = {}
    for name, value in (("a", recall), ("b", recall / 2)):
        to_text, to_image = ({"R@1": Figure(value=v, chance=0.1)} for v in (value, value + 0.2))
        splits[name] = SplitResult(images=9, texts=9, image_to_text=to_text, text_to_image=to_image)
    about = {"checkpoint": "run/last.pt", "model": "siclip-tiny", "precision": "fp32"}
    return ModelResult(**about, step=1, splits=splits)


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by made-up results; returns seeds and last settings of the runs."""
    names = []

    def train(run, source, threads):
        run.folder.mkdir(parents=True)
        names.append((run.settings[0], run.settings[-2]))
        (run.folder / ablation.RESULT).write_text(evaluated(len(names) / 100).model_dump_json())

    monkeypatch.setattr(ablation, "train", train)
    return names


@pytest.mark.slow
def test_each_run_is_done_once_and_the_same_command_goes_on(command, trained, tmp_path):
    ablation.main(command)
    base, matching, rate = "run.steps=1", "loss.pm_weight=1", "optim.lr=1e-4"
    runs = [(0, base), (0, matching), (1, base), (1, matching)]
    # the bases of seeds 0 and 1 are those of the first effect
    runs += [(0, rate), (1, rate), (2, base), (2, rate)]
    assert trained == [(f"run.seed={seed}", setting) for seed, setting in runs]
    rows = read_csv(tmp_path / "out" / "effects.csv")
    assert [(row["effect"], row["split"], row["seeds"]) for row in rows] == [
        (effect, split, seeds)
        for effect, seeds in (("matching", "2"), ("rate", "3"))
        for split in ("all", "a", "b")
    ]
    ablation.main(command)
    assert len(trained) == 8
    ablation.main([*command, "--only", "matching", "--set", "optim.lr=0.5"])
    assert [setting for _, setting in trained[8:]] == ["optim.lr=0.5"] * 4


@pytest.mark.slow
def test_wrong_settings_and_names_end_it_before_a_run(command, trained, tmp_path):
    with pytest.raises(SystemExit, match="--only: expected a name of .*effects.yaml, got x"):
        ablation.main([*command, "--only", "x"])
    (tmp_path / "effects.yaml").write_text(TEXT.replace("pm_weight=1", "pm_wieght=1"))
    with pytest.raises(ConfigError, match="did you mean loss.pm_weight"):
        ablation.main(command)
    (tmp_path / "effects.yaml").write_text(TEXT.replace("variant:", "varaint:"))
    with pytest.raises(ValueError, match=r"effects.0.varaint"):
        ablation.main(command)
    assert not trained


def test_figures_of_an_effect():
    recalls = (0.10, 0.14), (0.12, 0.20), (0.14, 0.14)
    pairs = [[evaluated(base), evaluated(variant)] for base, variant in recalls]
    every, a, _ = ablation.rows_of(ablation.Effect(name="e", base=[], variant=[]), pairs)
    # Means over both directions are recall + 0.1 in split a, and recall / 2 + 0.1 in split b.
    expected = {"split": "a", "base": 22.0, "base std": 2.0, "variant": 26.0, "variant std": 3.4641}
    expected |= {"difference": 4.0, "p": 0.2254, "low": -5.9366, "high": 13.9366}
    assert expected.items() <= a.items()
    assert (every["split"], every["base"], every["difference"]) == ("all", 19.0, 3.0)


@pytest.mark.prove
def test_a_run_is_trained_and_evaluated_and_a_failure_names_its_log(command):
    options = ablation.parser().parse_args(command)
    ((_, ((run, _), _)), *_) = ablation.planned(options)
    assert ablation.train(run, options.config, 1) is None
    assert json.loads((run.folder / ablation.RESULT).read_text())["step"] == 1
    assert not (run.folder / "last.pt").exists()
    failing = ablation.run_of(options, ["data.train=nowhere-*.tar"], 0)
    message = rf"{failing.folder} ended with \d+: see {failing.folder}/log.txt"
    assert re.fullmatch(message, ablation.train(failing, options.config, 1))


def test_the_effects_of_the_demo_are_valid():
    options = ablation.parser().parse_args(["examples/emoji/siclip-lite0.yaml", "--out", "none"])
    plan = ablation.planned(options)
    assert len(plan) >= 12
    assert all(base.folder != variant.folder for _, pairs in plan for base, variant in pairs)
