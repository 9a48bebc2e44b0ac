"""The comparison of ways to fine-tune: which runs it makes, what it chooses, and its figures."""

import json

import pytest

from benchmarks import finetune, finetune_chart
from benchmarks.ablation import RESULT
from benchmarks.results_file import read_csv
from simplclip import models
from simplclip.evaluation import BlendResults, Figure, ModelResult, SplitResult
from simplclip.evaluation.results import BlendRow
from support.programs import forked
from support.train import tiny

ABOUT = {"checkpoint": "last.pt", "model": "siclip-lite0", "precision": "fp32", "step": 1}
ALPHAS = (0.0, 0.5, 1.0)


def splits(new, old):
    """Results whose R@1 is `new` and `old`, on the parts test 0.1 less."""
    made = {}
    for domain, value in (("new", new), ("old", old)):
        for part, less in (("valid", 0.0), ("test", 0.1)):
            ways = [{"R@1": Figure(value=value - less + way, chance=0.1)} for way in (0.1, -0.1)]
            figures = {"image_to_text": ways[0], "text_to_image": ways[1]}
            made[f"{domain}-{part}"] = SplitResult(images=9, texts=9, **figures)
    return made


@pytest.fixture
def made_up(monkeypatch):
    """Replaces training by made-up results, and the plan; returns the runs that were trained."""
    trained = []

    def train(run, source, threads, *, further, keep):
        values = dict(setting.split("=", 1) for setting in run.settings)
        trained.append(values)
        seed = int(values["run.seed"])
        # the base, else the second rate is the best one
        new, old = 0.2, 0.6 + seed / 100
        if "optim.lr" in values:
            rates = next(form.rates for form in finetune.FORMS.values() if is_of(form, values))
            new = (0.5, 0.6, 0.4)[rates.index(float(values["optim.lr"]))] + seed / 100
            old = 0.3
        assert keep == ("optim.lr" not in values)
        run.folder.mkdir(parents=True)
        result = ModelResult(**ABOUT, splits=splits(new, old))
        (run.folder / RESULT).write_text(result.model_dump_json())
        if further:
            # on valid the means are 0.45 of the run, 0.5 of the middle, 0.4 of the start
            rows = [
                BlendRow(alpha=alpha, mean=0.0, splits=splits(*recalls))
                for alpha, recalls in zip(ALPHAS, ((0.2, 0.6), (0.5, 0.5), (new, old)))
            ]
            blend = BlendResults(**ABOUT, versions={}, start="base", best=0.0, rows=rows)
            (run.folder / finetune.BLEND).write_text(blend.model_dump_json())

    def is_of(form, values):
        return all(setting.split("=", 1)[1] in values.values() for setting in form.settings)

    # the settings of full are those of any form
    monkeypatch.setattr(finetune, "FORMS", dict(reversed(finetune.FORMS.items())))
    monkeypatch.setattr(finetune, "train", train)
    cost = {"trained": 1, "mib": 2, "ms": 3}
    monkeypatch.setattr(finetune, "costs", lambda runs, _: dict.fromkeys(runs, cost))
    monkeypatch.setattr(finetune, "build_domains", lambda: None)
    return trained


def test_each_form_has_its_best_rate_and_the_blend_its_best_alpha(made_up, tmp_path):
    command = ["--out", str(tmp_path), "--seeds", "3"]
    finetune.main(command)
    forms = len(finetune.FORMS)
    assert len(made_up) == 3 + forms * (3 + 2)  # bases; all rates of a seed, one of two others
    rows = read_csv(tmp_path / "finetune.csv")
    by_form = {row["form"]: row for row in rows if row["part"] == "test"}
    for name, form in finetune.FORMS.items():
        row = by_form[name]
        assert float(row["lr"]) == form.rates[1]
        # seeds: 50, 51 and 52; t = 4.3027 of 2 degrees of freedom, over the root of 3
        assert [float(row[key]) for key in ("new", "new low", "new high")] == [51, 48.52, 53.48]
        assert [float(row[key]) for key in ("old", "old low", "both")] == [20, 20, 35.5]
    assert float(by_form["zero-shot"]["new"]) == 10
    blend = by_form["best blend of full"]
    assert (blend["alpha"], float(blend["new"]), float(blend["old"])) == ("0.5, 0.5, 0.5", 40, 40)
    curve = [row for row in rows if row["form"] == "blends of full"]
    assert [float(row["alpha"]) for row in curve] == [*ALPHAS]
    tried = [row for row in rows if row["part"] == "valid"]
    assert len(tried) == 3 * forms
    assert {float(row["new"]) for row in tried} == {40, 50, 60}
    finetune.main(command)
    assert len(made_up) == 3 + forms * 5  # nothing is trained twice


def test_a_failed_run_ends_it_with_its_line(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "train", lambda run, *_, **__: f"{run.folder} ended with 1")
    with pytest.raises(SystemExit, match="tries these again:\n.* ended with 1"):
        finetune.main(["--out", str(tmp_path)])


def test_starts_from_the_base_of_its_seed(made_up, tmp_path):
    finetune.main(["--out", str(tmp_path), "--seeds", "2"])
    bases = {}
    for values in made_up:
        if "optim.lr" in values:
            bases.setdefault(values["run.seed"], set()).add(values["model.checkpoint"])
    assert [len(starts) for starts in bases.values()] == [1, 1]
    assert len(set.union(*bases.values())) == 2


@pytest.mark.slow
def test_time_and_memory_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "REPEATS", 3)
    source = tiny.write_config(tmp_path)
    runs = {}
    for name, frozen in (("all", []), ("text", ["--set", "optim.lr_scale={visual.*: 0}"])):
        words = ["--out", str(tmp_path / "out"), "--config", source, *frozen]
        comparison = finetune.Comparison(finetune.parser().parse_args(words))
        runs[name] = comparison.run("full", 1e-4, 0)

    def measure() -> None:
        (tmp_path / "costs.json").write_text(json.dumps(finetune.costs(runs, source)))

    # in a process of its own: no fork could train after a real step that follows a planned one
    assert forked(measure) == 0
    found = json.loads((tmp_path / "costs.json").read_text())
    small = {"vision_cfg": {"image_size": tiny.IMAGE_SIZE}}
    image = models.create("siclip-tiny", **small, **tiny.MODEL).visual
    frozen_count = sum(weight.numel() for weight in image.parameters())
    assert found["all"]["trained"] - found["text"]["trained"] == frozen_count
    assert found["text"]["ms"] < found["all"]["ms"] < 10_000
    # weights and two moments in float32, then gradients and activations
    assert 12 * found["all"]["trained"] / 2**20 < found["all"]["mib"] < 500
    assert found["text"]["mib"] < found["all"]["mib"]


def test_the_chart_has_a_point_for_each_form(tmp_path):
    rows = []
    for number, form in enumerate(["zero-shot", "full", "blends of full", "blends of full"]):
        row: dict = {"form": form}
        for name in ("new", "old"):
            row |= {name: 10 + number, f"{name} low": 8 + number, f"{name} high": 12 + number}
        rows.append({key: str(value) for key, value in row.items()})
    text = finetune_chart.draw(rows, "a.csv")
    assert text.count("<circle") == 2 * 2  # with its sample beside the name
    assert text.count("<polyline") == 1
    assert "from a.csv" in text
