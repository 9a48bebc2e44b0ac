"""Several torchrun ranks train like one process on the same pairs, with equal weights on each."""

import functools
import json
import subprocess
import time

import pytest
import torch
import yaml

from simplclip import models
from simplclip.common import ranks
from simplclip.models.trained import read_checkpoint
from simplclip.train import loop
from simplclip.train.config import ConfigError
from support.paths import ROOT
from support.ranks import training
from support.ranks.launch import ENVIRONMENT, TORCHRUN, forked_ranks, torchrun
from support.train import runs, tiny

pytestmark = pytest.mark.long


DISTILLED = ["loss.relational_weight=1", "loss.interactive_weight=0.5", "loss.feature_weight=10"]
PLANE = "loss.pm_weight={value: 1, start: 1}"
CACHED = ["data.batch_size=60", "data.micro_batch=6"]
EVALUATED = ["eval.every=3", "eval.splits={held: DATA}"]
SMALL = "vision_cfg: {layers: 1, width: 32, head_width: 16, patch_size: 8, image_size: 16}"
SMALL += ", text_cfg: {layers: 1, width: 32, heads: 2}, embed_dim: 16"
NAME = "open_clip:ViT-B-32"
ADAPTED = f"model={{name: '{NAME}', options: {{{SMALL}}}, checkpoint: WEIGHTS, lora: {{rank: 4}}}}"
CASES = {
    # Some steps do not use the plane and the projections.
    "distilled": [*DISTILLED, PLANE, "loss.feature_weight={value: 10, until: 2}"],
    "captions": ["data.captions_per_image=2", "optim.ema=0.5", *EVALUATED],
    "captions cached": ["data.captions_per_image=2", *CACHED, "data.micro_batch=3"],
}
FAULTS = {
    "stopped": (["SIGTERM", 1, 2, "step"], []),
    "not finite": (["not finite", 1, 2, "step"], []),
}


def entry(folder, name, changes, **options):
    out = f"run.out={folder / name.replace(' ', '-')}"
    always = ["run.steps=3", "data.batch_size=12", "optim.lr=1e-4"]
    return {"changes": [out, *always, *changes], **options}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for number in range(4):
        tiny.write_shard(folder / "data" / f"train-{number}.tar", teacher=16)
    # two batches, of which each rank encodes one
    tiny.write_shard(folder / "data" / "held.tar", copies=3)
    tiny.write_config(folder, teacher=16)
    torch.save(
        models.create(NAME, **yaml.safe_load(f"{{{SMALL}}}")).state_dict(), folder / "weights.pt"
    )
    return folder


def replaced(change, files):
    for word, file in files.items():
        change = change.replace(word, str(file))
    return change


def data_of(folder, changes=()):
    files = {"DATA": folder / "data" / "held.tar", "WEIGHTS": folder / "weights.pt"}
    return [
        f"data.train={folder / 'data' / 'train-{0..3}.tar'}",
        *(replaced(change, files) for change in changes),
    ]


@pytest.fixture(scope="module")
def results(folder):
    """Returns the results of one process and of two ranks."""
    started = {}

    def of(cases):
        if (key := tuple(cases)) not in started:
            runs_of_two = {name: (None, changes) for name, changes in cases.items()} | FAULTS
            plan = {
                name: entry(folder / "two", name, data_of(folder, changes), fault=fault)
                for name, (fault, changes) in runs_of_two.items()
            }
            for place in ("one", "two"):
                (folder / place).mkdir(exist_ok=True)
            (folder / "plan.json").write_text(json.dumps(plan))
            forked_ranks("training.py", folder, "plan", check=True, timeout=3600)
            two = [json.loads((folder / f"plan-{rank}.json").read_text()) for rank in (0, 1)]
            one = {}
            for name, changes in cases.items():
                settings = entry(folder / "one", name, data_of(folder, changes))["changes"]
                one[name] = training.observed(tiny.settings(folder, *settings, teacher=16))
            started[key] = one, two
        return started[key]

    return of


def same(run, whole, near):
    """Checks that losses and weights are those of another run, up to rounding."""
    state, expected = read_checkpoint(run / "last.pt"), read_checkpoint(whole / "last.pt")
    for part in ("model", "loss", *(["ema"] if "ema" in expected else [])):
        weights = [
            torch.cat([torch.zeros(1), *(t.flatten() for t in saved[part].values())])
            for saved in (state, expected)
        ]
        assert (weights[0] - weights[1]).norm() <= near * weights[1].norm(), part
    if (whole / "evaluation.csv").exists():
        evaluations = [runs.rows(place, "evaluation.csv") for place in (run, whole)]
        losses = [[float(row.pop("loss")) for row in of_run] for of_run in evaluations]
        assert evaluations[0] == evaluations[1]
        assert losses[0] == pytest.approx(losses[1], rel=5 * near)
        assert (run / "best.pt").exists()
    assert len(runs.rows(run)) == len(runs.rows(whole)) == expected["step"]
    for row, expected_row in zip(runs.rows(run), runs.rows(whole)):
        for key in expected_row:
            close = pytest.approx(float(expected_row[key]), rel=near if key == "loss" else 5 * near)
            assert float(row[key]) == close, (key, row["step"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process(folder, results, name):
    one, two = results(CASES)
    assert [rank[name]["error"] for rank in (one, *two)] == [None] * 3
    for step in range(3):
        assert sorted(group for rank in two for group in rank[name]["groups"][step]) == sorted(
            one[name]["groups"][step]
        )
    assert two[0][name]["weights"] == two[1][name]["weights"]
    place = name.replace(" ", "-")
    same(folder / "two" / place, folder / "one" / place, 5e-3 if "bf16" in name else 1e-6)
    assert not (folder / "two" / f"{place}-1.txt").read_text(), "only the first rank prints"


@pytest.mark.slow
def test_each_rank_cuts_its_texts_by_tokens(results):
    """The ranks may have different numbers of micro-batches."""
    first, second = (rank["captions cached"]["cut"] for rank in results(CASES)[1])
    assert len(first) == len(second) == 3
    for few, many in zip(first, second):
        assert sum(few) == sum(many) == 60
        assert len(few) < len(many) < 10  # 6 texts of full length would need this many


def check_interrupted(results, name, step):
    first, second = (rank[name]["error"] for rank in results(CASES)[1])
    saved = f"saved step {step} of 3"
    assert first.startswith(f"Interrupted: signal to another rank: {saved}")
    assert second.startswith(f"Interrupted: SIGTERM: {saved}")


@pytest.mark.slow
def test_a_signal_to_any_rank_saves_once_and_one_process_goes_on(folder, results):
    check_interrupted(results, "stopped", step=2)
    state = read_checkpoint(folder / "two" / "stopped")
    assert state["step"] == 2
    assert [data["rank"] for data in state["data"]] == [0, 1]
    config = tiny.settings(
        folder, *entry(folder / "two", "stopped", data_of(folder))["changes"], teacher=16
    )
    text = runs.go(config, resume=True)
    assert "or eval.hold_out were others: the epoch starts again" in text
    assert read_checkpoint(folder / "two" / "stopped")["step"] == 3


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_stops_all(results):
    first, second = results(CASES)[1]
    assert first["not finite"]["error"].startswith("TrainingError: step 2: not finite: loss=nan")
    assert "Step 1 is saved in" in first["not finite"]["error"]
    assert second["not finite"]["error"].startswith("TrainingError: step 2: not finite")


@pytest.mark.slow
def test_the_command_trains_and_a_wrong_setting_is_one_line(folder, request, monkeypatch):
    """By torchrun with --prove."""
    words = command(folder, folder / "command", "run.steps=2")
    if request.config.getoption("--prove"):
        program = [*TORCHRUN, "--nproc-per-node=2", "-m", "simplclip", *words]
        call = functools.partial(
            subprocess.run, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
        )
        trained = call(program)
    else:
        # by which torch knows torchrun's processes
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "forked")
        trained = forked_ranks(ROOT / "simplclip" / "__main__.py", *words)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert trained.stdout.count("done       step 2 in") == 1
    assert len({data["rank"] for data in read_checkpoint(folder / "command")["data"]}) == 2


DROPOUT = ["model.options.vision_cfg.patch_dropout=0.5", "run.save_every=1"]


@pytest.mark.slow
def test_ranks_resume_to_the_bit_with_dropout(folder):
    """Each rank draws from a generator of its own."""
    changes = [*data_of(folder), *DROPOUT]
    plan = {name: entry(folder, name, changes) for name in ("undisturbed", "drawn")}
    plan["drawn"]["fault"] = ["SIGTERM", 1, 1, "step"]
    plan["resumed"] = entry(folder, "drawn", changes, resume=True)
    (folder / "dropout.json").write_text(json.dumps(plan))
    forked_ranks("training.py", folder, "dropout", check=True)
    both = [json.loads((folder / f"dropout-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0]["undisturbed"]["seed"] != both[1]["undisturbed"]["seed"]
    for results in both:
        assert results["resumed"]["error"] is None
        assert [len(results[name]["groups"]) for name in plan] == [3, 1, 2]
        assert results["resumed"]["weights"] == results["undisturbed"]["weights"]
    assert runs.bits(runs.state_of(folder / "drawn")) == runs.bits(
        runs.state_of(folder / "undisturbed")
    )


def command(folder, out, *changes):
    """Returns the words of a run of 6 steps of two ranks."""
    always = [f"run.out={out}", *data_of(folder), "run.steps=6", "data.batch_size=12", *DROPOUT]
    sets = [word for change in (*always, *changes) for word in ("--set", change)]
    return ["train", folder / "config.yaml", *sets, "--resume"]


@pytest.fixture(scope="module")
def trained(folder):
    """Returns the folder of an undisturbed run of `command`."""
    done = forked_ranks("faults.py", "[]", *command(folder, folder / "trained"))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "trained"


@pytest.mark.prove
def test_restarted_ranks_end_as_if_none_had_died(folder, trained):
    """`torchrun --max-restarts`: the ranks, killed (-9) twice, find each other anew."""
    faults = [[0, 1, 3, "SIGKILL"], [1, 0, 5, "SIGKILL"]]
    continued = [f"resume     continuing from step {step}" for step in (2, 4)]
    words = command(folder, folder / "killed")
    done = torchrun(
        "faults.py", json.dumps(faults), *words, options=["--max-restarts=2"], check=True
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if "continuing from" in line] == continued
    assert runs.bits(runs.state_of(folder / "killed")) == runs.bits(runs.state_of(trained))
    assert runs.rows(folder / "killed") == runs.rows(trained)


@pytest.mark.slow
def test_a_rank_that_vanishes_ends_the_others_in_time(folder):
    """It stops without a word, as by a cut cable."""
    words = command(folder, folder / "vanished", "run.timeout_minutes=0.05")
    began = time.monotonic()
    done = forked_ranks("faults.py", '[[0, 1, 3, "SIGSTOP"]]', *words, timeout=100)
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if line.startswith("simplclip: "))
    assert "after step 2: another rank has ended, or does not answer within run.timeout" in line
    assert "Step 2 is saved" in line
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 100


def test_ranks_that_do_not_divide_the_batch(tmp_path, monkeypatch):
    for count, batch, micro in ((5, 12, 6), (2, 12, 4)):
        monkeypatch.setattr(ranks, "count", lambda count=count: count)
        with pytest.raises(
            ConfigError, match=f"data.batch_size: expected a multiple of {count} ranks and of"
        ):
            loop._micro_batch_size_and_count(
                tiny.settings(tmp_path, f"data.batch_size={batch}", f"data.micro_batch={micro}")
            )
    for micro in (6, 12):
        config = tiny.settings(tmp_path, "data.batch_size=12", f"data.micro_batch={micro}")
        assert loop._micro_batch_size_and_count(config) == (6, 1)
