"""Each benchmark program runs at its smallest size."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from benchmarks import gpu, loader, study
from simplclip.train import config
from support.data import pairs
from support.paths import ROOT
from support.train import tiny


@pytest.fixture(autouse=True)
def outside_xdist(monkeypatch):
    """pytest-benchmark measures nothing in a worker of xdist, and knows one by this variable."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def measurements(folder: Path) -> list[dict]:
    files = [path for path in folder.glob("*.json") if path.name != "selftest.json"]
    return [each for path in files for each in json.loads(path.read_text())["benchmarks"]]


@pytest.mark.slow
def test_an_op_is_measured(tmp_path):
    command = ["pytest", "benchmarks", "--device=cpu", "--op=sigmoid", "-k", "small and not compil"]
    command += ["--benchmark-max-time=0.01", f"--benchmark-json={tmp_path / 'sigmoid.json'}"]
    assert gpu.called(command, tmp_path / "log.txt") == 0
    assert "6 passed" in (tmp_path / "log.txt").read_text()
    found = measurements(tmp_path)
    assert {each["params"]["form"] for each in found} == {
        *("simplclip", "open_clip", "open_clip_chunks")
    }
    assert all(each["stats"]["median"] > 0 for each in found)
    assert all(each["extra_info"]["peak_mib"] > 0 for each in found)


@pytest.mark.prove
def test_the_program_for_a_gpu_measures_every_op(tmp_path):
    options = ["--device=cpu", "--out", str(tmp_path), "-k", "small", "--benchmark-max-time=0.01"]
    with pytest.raises(SystemExit) as ended:
        gpu.main(options)
    assert ended.value.code == 0, (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "selftest.json").read_text())
    ops = {each["params"]["op"] for each in measurements(tmp_path)}
    assert ops == gpu.LOSSES.keys() | gpu.MODULES.keys()


@pytest.mark.slow
def test_loaders_are_compared(tmp_path, capsys):
    picture = tiny.picture((9, 9, 9), "ring")
    samples = [(f"{i}", {"png": picture, "txt": b"a ring"}) for i in range(48)]
    shard = pairs.write(tmp_path / "train-0.tar", samples)
    options = ["--seconds", "0", "--repeats", "1", "--batch", "8", "--size", "32"]
    loader.main(["--shards", shard, *options])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["simplclip", "open_clip"]


@pytest.mark.prove
def test_a_study_trains_each_run_once_and_compares_them(tmp_path, capfd):
    held = tiny.write_shard(tmp_path / "held" / "held-0.tar")
    settings = tiny.settings(tmp_path, f"eval.splits={{a: {held}, b: {held}}}")
    start = "model.checkpoint=OUT/start-SEED/last.pt"
    runs = {
        "start": {},
        "faster": {"base": "start", "set": [[start], "optim.lr=0.1"], "blend": True},
    }
    values = {"config": yaml.safe_load(settings.to_yaml()), "seeds": 2}
    values |= {"set": ["run.steps=1"], "runs": runs}
    file, out = tmp_path / "study.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    study.main([str(file), "--out", str(out)])
    with open(out / "study.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert {row["split"] for row in rows} == {"all", "a", "b"}
    names = list(dict.fromkeys(row["run"] for row in rows))
    assert names[:3] == ["start", "faster", "faster, alpha 0"]
    by_run = {row["run"]: row for row in rows if row["split"] == "all"}
    assert by_run["faster, alpha 0"]["R@1"] == by_run["start"]["R@1"]
    assert float(by_run["faster"]["low"]) <= float(by_run["faster"]["difference"])
    capfd.readouterr()
    study.main([str(file), "--out", str(out), "--only", "start"])
    assert capfd.readouterr().out == f"wrote {out / 'study.csv'}\n"
    with pytest.raises(SystemExit):
        study.main([str(file), "--out", str(out), "--only", "x"])
    assert "--only: expected a name of" in capfd.readouterr().err


def test_figures_of_a_difference():
    base = [{"a": value} for value in (20.0, 22.0, 24.0)]
    found = [{"a": value} for value in (24.0, 30.0, 24.0)]
    (row,) = study.rows_of("x", found, base)
    expected = {"R@1": 26.0, "std": 3.464, "difference": 4.0, "low": -5.937, "high": 13.937}
    assert expected.items() <= row.items()


@pytest.mark.parametrize("name", ["ablation", "finetune"])
def test_the_settings_of_a_study_are_valid(name, tmp_path):
    made = study.Study(ROOT / "benchmarks" / f"{name}.yaml", tmp_path)
    for run in made.runs.values():
        settings = study.flat([made.settings, run.get("set", [])])
        config.load(made.config, [*settings, "run.out=runs/x"])
        assert run.get("base") in (None, *made.runs)
