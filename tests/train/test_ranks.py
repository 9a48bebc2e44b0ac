"""Several torchrun ranks train like one process, on the same samples in the same order."""

import functools
import json
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import rank_train
import runs
import tiny
import torch
import torch.distributed as dist
from launch import ENVIRONMENT, TORCHRUN, torchrun
from paths import ROOT
from torch import nn

from simplclip.common import ranks
from simplclip.train import checkpoint
from simplclip.train.batches import loader
from simplclip.train.config import ConfigError
from simplclip.train.together import Together, share_norms

DISTILLED = ["loss.relational_weight=1", "loss.interactive_weight=0.5", "loss.feature_weight=10"]
CACHED = ["data.batch_size=60", "data.micro_batch=12"]  # several micro-batches on each of 2, 3 and 4 ranks
CASES = {
    # Some steps do not use the plane and the projections.
    "distilled": [*DISTILLED, "loss.pm_weight={value: 1, start: 1}", "loss.feature_weight={value: 10, until: 2}"],
    "captions": ["data.captions_per_image=2", "optim.ema=0.5", "eval.every=2", "eval.splits={held: DATA}"],
    "sigmoid cached": ["loss.base=sigmoid", *DISTILLED, *CACHED],
    "captions cached": ["data.captions_per_image=2", *CACHED, "data.micro_batch={image: 12, text: 10}"],
    "sync norms": ["model.freeze_norms=false"],
}
PROOFS = {  # cases of 30 steps
    "contrastive": [],
    "sigmoid": ["loss.base=sigmoid"],
    "workers": ["data.workers=2", *CACHED],
    "auto": ["data.micro_batch=auto"],
    "distilled cached": [*DISTILLED, "loss.pm_weight={value: 1, start: 1}", *CACHED],
    "contrastive cached": CACHED,
    "kl": [*DISTILLED, "loss.interactive=kl"],
    "kl cached": [*DISTILLED, "loss.interactive=kl", *CACHED],
    "bf16": [*DISTILLED, "run.precision=bf16"],
    "bf16 cached": [*DISTILLED, "run.precision=bf16", *CACHED],
}
FAULTS = {
    "stopped": ["SIGTERM", 1, 2],
    "not finite": ["not finite", 1, 2],
}


# Relative tolerances; training batch norms amplify rounding.
NEAR = {"bf16": 5e-3, "bf16 cached": 5e-3, "sync norms": 3e-5}


def entry(folder, name, steps, changes, **options):
    always = [f"run.out={folder / name.replace(' ', '-')}", f"run.steps={steps}", "data.batch_size=12", "optim.lr=1e-4"]
    return {"changes": [*always, "model.freeze_norms=true", *changes], **options}


def trained(folder: Path, plan: str, entries: dict, ranks: int, *options: str, ok: bool = True):
    """Returns the results of each rank, or without `ok` torchrun's error output."""
    if not (folder / "data").exists():
        (folder / "data").symlink_to(folder.parent / "data")
    tiny.write_config(folder, teacher=16)
    (folder / f"{plan}.json").write_text(json.dumps(entries))
    # The runs need a fifteenth of this time on two idle cores.
    run = torchrun("rank_train.py", folder, plan, ranks=ranks, options=options, check=ok, timeout=3600)
    if not ok:
        return run.stderr
    return [json.loads((folder / f"{plan}-{rank}.json").read_text()) for rank in range(ranks)]


def write_data(folder):
    """Writes four shards of 24 samples. In all but the first, one, two and three samples in a row are broken."""
    for number in range(4):
        path = tiny.write_shard(folder / "data" / f"train-{number}.tar", teacher=16)
        with tarfile.open(path) as tar, open(path, "r+b") as file:
            pictures = [member for member in tar if member.name.endswith("png")]
            for member in pictures[number : 2 * number]:
                file.seek(member.offset_data)
                file.write(bytes(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def of_ranks(folder):
    """Returns the results of the ranks, which one start of torchrun runs."""

    @functools.cache
    def start(ranks, steps):
        place = folder / f"{ranks}-{steps}"
        place.mkdir()
        cases = CASES | (PROOFS if steps == 30 else {})
        plan = {name: entry(place, name, steps, data_of(folder, changes)) for name, changes in cases.items()}
        if ranks > 1:
            workers = [*data_of(folder), "data.workers=2"]
            plan |= {name: entry(place, name, steps, workers, fault=fault) for name, fault in FAULTS.items()}
            return trained(place, "plan", plan, ranks)
        settings = {name: tiny.settings(folder, *entry["changes"], teacher=16) for name, entry in plan.items()}
        return [{name: rank_train.observed(config) for name, config in settings.items()}]

    return start


def data_of(folder, changes=()):
    held_out = str(folder / "data" / "train-0.tar")
    return [f"data.train={folder / 'data' / 'train-{0..3}.tar'}", *(change.replace("DATA", held_out) for change in changes)]


def equal(folder, name, got, expected, ranks, steps):
    assert [rank[name]["error"] for rank in (*got, *expected)] == [None] * (ranks + 1)
    ids = [sorted(i for rank in got for i in rank[name]["ids"][step]) for step in range(steps)]
    assert ids == [sorted(ids) for ids in expected[0][name]["ids"]]
    assert all(rank[name]["weights"] == got[0][name]["weights"] for rank in got)
    one, several = (folder / f"{n}-{steps}" / name.replace(" ", "-") for n in (1, ranks))
    same(several, one, NEAR.get(name, 1e-6))


def same(run, whole, near=1e-6):
    """Checks that losses and weights are those of another run, up to rounding."""
    ours, theirs = checkpoint.load(run), checkpoint.load(whole)
    for part in ("model", "loss", *(["ema"] if "ema" in theirs else [])):
        weights = [torch.cat([torch.zeros(1), *(t.flatten() for t in state[part].values())]) for state in (ours, theirs)]
        assert (weights[0] - weights[1]).norm() <= near * weights[1].norm(), part
    assert ours["schedule"] == theirs["schedule"]
    if (whole / "evaluation.csv").exists():
        assert runs.rows(run, "evaluation.csv") == runs.rows(whole, "evaluation.csv")
    assert len(runs.rows(run)) == len(runs.rows(whole)) == theirs["step"]
    for our, their in zip(runs.rows(run), runs.rows(whole)):
        for key in their:
            close = pytest.approx(float(their[key]), rel=near if key == "loss" else 5 * near)
            assert float(our[key]) == close, (key, our["step"])


@pytest.mark.parametrize(
    ("ranks", "steps", "name"),
    [
        *((2, 3, name) for name in CASES),
        *(pytest.param(n, 30, name, marks=pytest.mark.prove) for n in (2, 3, 4) for name in CASES | PROOFS),
    ],
)
def test_ranks_train_as_one_process(folder, of_ranks, ranks, steps, name):
    equal(folder, name, of_ranks(ranks, steps), of_ranks(1, steps), ranks, steps)


def test_each_rank_cuts_its_texts_by_tokens(of_ranks):
    """The ranks may have different numbers of micro-batches."""
    first, second = (rank["captions cached"]["cut"] for rank in of_ranks(2, 3))
    assert len(first) == len(second) == 3
    for few, many in zip(first, second):
        assert sum(few) == sum(many) == 60
        assert len(few) < len(many) < 6  # 10 texts of full length would need this many


def test_a_signal_to_any_rank_saves_once_and_one_process_goes_on(folder, of_ranks):
    """One process continues with the batches of a run that never stopped."""
    got, place = of_ranks(2, 3), folder / "2-3"
    assert got[0]["stopped"]["error"].startswith("Interrupted: signal to another rank: saved step 2 of 3")
    assert got[1]["stopped"]["error"] == "SystemExit: 130"
    assert not (place / "stopped-1.txt").read_text()  # only the first rank prints
    assert checkpoint.load(place / "stopped")["step"] == 2
    plan = [entry(place, name, 3, [*data_of(folder), "data.workers=2"]) for name in ("stopped", "undisturbed")]
    stopped, whole = (tiny.settings(folder, *one["changes"], teacher=16) for one in plan)
    rest, all_of_it = rank_train.observed(stopped, resume=True), rank_train.observed(whole)
    assert "step 2 with 1 ranks after 2: batches, order and schedule are the same" in (place / "stopped-0.txt").read_text()
    assert [got[0]["stopped"]["ids"][step] + got[1]["stopped"]["ids"][step] for step in (0, 1)] == all_of_it["ids"][:2]
    assert rest["ids"] == all_of_it["ids"][2:]
    same(place / "stopped", place / "undisturbed")


def test_a_step_that_is_not_finite_on_one_rank_stops_all(of_ranks):
    first, second = of_ranks(2, 3)
    assert first["not finite"]["error"].startswith("TrainingError: step 2: not finite: loss=nan")
    assert "Saved step 1 in" in first["not finite"]["error"]
    assert second["not finite"]["error"] == "SystemExit: 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [pytest.param("raises", "ValueError: made up", marks=pytest.mark.prove), ("SIGKILL", "Signal 9 (SIGKILL)")],
)
def test_a_rank_that_dies_ends_the_others(folder, what, reason):
    """The other ranks end in the time that torchrun gives; its report names the rank; the last whole step is saved."""
    place = folder / what
    place.mkdir()
    plan = {what: entry(place, "run", 1000, [*data_of(folder), "data.workers=1"], fault=[what, 1, 3])}
    said = trained(place, "plan", plan, 2, ok=False)
    root = said[said.index("Root Cause") :]
    assert "rank      : 1" in root
    assert reason in root
    assert checkpoint.load(place / "run")["step"] == 2
    assert time.time() - (place / "run-fault").stat().st_mtime < 30


@pytest.mark.prove
@pytest.mark.parametrize(("deaths", "steps"), [(1, 7), (10, 60)])
def test_torchrun_goes_on_after_deaths(folder, deaths, steps):
    """Ranks die at random times; training resumes on the same samples and reaches the same weights."""
    place = folder / f"deaths-{deaths}"
    place.mkdir()
    changes = [*data_of(folder), "data.workers=1", "run.save_every=1"]
    plan = {"run": entry(place, "run", steps, changes, fault=["kills", deaths], resume=True)}
    trained(place, "plan", plan, 2, f"--max-restarts={deaths}")
    whole = rank_train.observed(tiny.settings(folder, *entry(place, "whole", steps, changes)["changes"], teacher=16))
    for rank in (0, 1):
        seen = [json.loads(line) for line in (place / f"run-{rank}.jsonl").read_text().splitlines()]
        assert {attempt for attempt, *_ in seen} == set(range(deaths + 1))
        assert {step for _, step, _ in seen} == set(range(steps))
        assert all(ids == whole["ids"][step][6 * rank : 6 * rank + 6] for _, step, ids in seen)
    same(place / "run", place / "whole")


@pytest.mark.prove
def test_another_number_of_ranks_goes_on(folder):
    """From 4 to 2 to 1 rank, from 4 to 3 and to 1, from 2 to 4; and to 3 ranks, which do not divide the batch."""
    place, changes = folder / "numbers", [*data_of(folder), "data.workers=1"]
    place.mkdir()

    def go(ranks, **plan):
        """Runs a plan: name -> fault, or None. A run that exists is resumed."""
        more = {"odd": ["data.batch_size=8"]}
        plan = {
            name: entry(place, name, 6, changes + more.get(name, []), fault=fault, resume=(place / name).exists())
            for name, fault in plan.items()
        }
        return trained(place, f"plan-{ranks}-{len(plan)}", plan, ranks)[0]

    go(4, four=["SIGTERM", 3, 2], odd=["SIGTERM", 0, 2])
    for name in ("by_1", "by_2", "by_3"):
        shutil.copytree(place / "four", place / name)
    go(2, by_2=["SIGTERM", 1, 4], two=["SIGTERM", 1, 3])
    assert [checkpoint.load(place / name)["step"] for name in ("four", "by_2", "two")] == [2, 4, 3]
    said = go(3, by_3=None, odd=None)
    assert said["odd"]["error"] == "ConfigError: data.batch_size: expected a multiple of the 3 ranks, got 8"
    go(4, two=None, odd=None)
    for name in ("by_1", "by_2", "whole"):
        config = tiny.settings(folder, *entry(place, name, 6, changes)["changes"], teacher=16)
        assert rank_train.observed(config, resume=name != "whole")["error"] is None
    for name in ("by_1", "by_2", "by_3", "two"):
        same(place / name, place / "whole")


@pytest.mark.prove
def test_the_documented_line(tmp_path):
    """The command in docs/training.md runs, on other pictures."""
    (line,) = re.findall(r"^torchrun .*siclip-tiny-emoji.*$", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    for name in ("train", "concepts", "vendor"):
        tiny.write_shard(tmp_path / "data" / "emoji" / f"{name}-0.tar", copies=8 if name == "train" else 1)
    _, *rest = line.split()
    command = [*TORCHRUN, *rest]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    assert run.stdout.count("done       step 5 in") == 1
    assert checkpoint.load(tmp_path / "runs" / "siclip-tiny-emoji")["ranks"] == 2


def test_ranks_that_do_not_divide_the_batch(folder, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 5)
    training = SimpleNamespace(config=tiny.settings(folder, "data.batch_size=12", "data.micro_batch=6", teacher=16))
    with pytest.raises(ConfigError, match="data.micro_batch: expected a multiple of the 5 ranks, got 6"):
        loader(training)


def test_batch_norms_that_would_drift(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    with pytest.raises(ConfigError, match=r"model.freeze_norms: expected true for several ranks on a cpu.*BatchNorm1d '.0'"):
        share_norms(nn.Sequential(nn.BatchNorm1d(2)), torch.device("cpu"))


def test_the_towers_that_train_travel_once(monkeypatch):
    """Frozen parts do not travel; temperature and losses are averaged apart; no step searches for unused parameters."""
    monkeypatch.setattr(ranks, "count", lambda: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.ModuleDict({"tower": nn.Linear(2, 2), "never": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
        model["frozen"].requires_grad_(False)
        model.logit_scale = nn.Parameter(torch.tensor(3.0))
        trained = [*model["tower"].parameters(), *model["never"].parameters()]
        together = Together(model, at_once=True)
        assert (together.ddp.static_graph, together.ddp.find_unused_parameters) == (True, False)
        assert set(together.ddp.parameters()) == set(trained)
        for _ in range(3):  # a second step would fail if every parameter had to be used
            model.zero_grad()
            scale, bias = together.learned(model.logit_scale, None)
            together(lambda scale=scale: {"loss": scale * model["tower"](torch.ones(3, 2)).sum()})["loss"].backward()
            assert model["never"].weight.grad is None
        assert bias is None
        assert model.logit_scale.grad is not None
        later = Together(model, at_once=False)
        assert later.ddp is None
        whole = model["tower"].weight.grad.clone()
        later.exchange()
        assert torch.equal(model["tower"].weight.grad, whole / 2)  # the sum over the only process, divided by the ranks
        assert model["never"].weight.grad is None
    finally:
        dist.destroy_process_group()
