"""Several ranks of torchrun train as one process does, on the same samples in the same order."""

import functools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import rank_train
import runs
import tiny
import torch
from paths import PYTHONPATH, SUPPORT

from simplclip.train import checkpoint

DISTILLED = ["loss.relational_weight=1", "loss.interactive_weight=0.5", "loss.feature_weight=10", "loss.projection=true"]
CASES = {
    "contrastive": [],
    "sigmoid": ["loss.base=sigmoid"],
    # The plane and the projections are not used in each step.
    "distilled": [*DISTILLED, "loss.pm_weight={value: 1, start: 1}", "loss.feature_weight={value: 10, until: 2}"],
    "captions": ["data.captions_per_image=2", "optim.ema=0.5"],
    "sigmoid cached": ["loss.base=sigmoid", *DISTILLED, "data.micro_batch=6"],
    "distilled cached": [*DISTILLED, "loss.pm_weight={value: 1, start: 1}", "data.micro_batch=6"],
    "captions cached": ["data.captions_per_image=2", "data.micro_batch={image: 6, text: 5}"],
    "workers": ["data.workers=2", "data.micro_batch=6"],
}
STOP = {"changes": ["data.workers=2"], "fault": ["SIGTERM", 1, 2]}


def entry(folder, name, steps, changes, **options):
    always = [
        f"run.out={folder / name.replace(' ', '-')}",
        f"run.steps={steps}",
        "data.batch_size=12",
        "model.freeze_norms=true",
    ]
    return {"changes": [*always, *changes], "teacher": 16, **options}


def torchrun(folder: Path, plan: str, entries: dict, ranks: int, ok: bool = True):
    """What each rank did, or without `ok` what torchrun said."""
    (folder / f"{plan}.json").write_text(json.dumps(entries))
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(SUPPORT / "rank_train.py"), str(folder), plan]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if not ok:
        return run.stderr
    assert run.returncode == 0, run.stderr[-5000:]
    return [json.loads((folder / f"{plan}-{rank}.json").read_text()) for rank in range(ranks)]


def write_data(folder):
    """Four shards of 24 samples, of which the first to the third have one, two and three in a row that are broken."""
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
    """What so many ranks did, in one start of them."""

    @functools.cache
    def start(ranks, steps):
        place = folder / f"{ranks}"
        place.mkdir()
        (place / "data").symlink_to(folder / "data")
        shards = f"data.train={folder / 'data' / 'train-{0..3}.tar'}"
        plan = {name: entry(place, name, steps, [shards, *changes]) for name, changes in CASES.items()}
        plan["stopped"] = entry(place, "stopped", steps, [shards, *STOP["changes"]], fault=STOP["fault"])
        plan["not finite"] = entry(place, "not finite", steps, [shards], fault=["not finite", 1, 2])
        if ranks > 1:
            return torchrun(place, "plan", plan, ranks)
        done = {}
        for name in (*CASES, "stopped"):
            done[name] = rank_train.observed(tiny.settings(place, *plan[name]["changes"], teacher=16))
        return [done]

    return start


def equal(folder, name, got, expected, ranks):
    assert [rank[name]["error"] for rank in (*got, *expected)] == [None] * (ranks + 1)
    steps = [sorted(i for rank in got for i in rank[name]["ids"][step]) for step in range(len(expected[0][name]["ids"]))]
    assert steps == [sorted(ids) for ids in expected[0][name]["ids"]]
    assert all(rank[name]["weights"] == got[0][name]["weights"] for rank in got)
    where = name.replace(" ", "-")
    one, several = (checkpoint.load(folder / n / where) for n in ("1", str(ranks)))
    for part in ("model", "loss", *(["ema"] if "ema" in one else [])):
        assert one[part].keys() == several[part].keys()
        ours, theirs = (torch.cat([t.double().flatten() for t in state[part].values()]) for state in (several, one))
        assert (ours - theirs).norm() < 1e-6 * theirs.norm(), part
    for ours, theirs in zip(runs.rows(folder / str(ranks) / where), runs.rows(folder / "1" / where)):
        for key in ours:
            assert float(ours[key]) == pytest.approx(float(theirs[key]), rel=1e-6, abs=1e-7), (ours["step"], key)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_process(folder, of_ranks, ranks, name):
    equal(folder, name, of_ranks(ranks, 3), of_ranks(1, 3), ranks)
