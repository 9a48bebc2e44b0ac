"""open_clip's trainer with our losses against itself: the same arguments, the same losses, checkpoints for one another.

Runs share a process (two for the distributed ones), see trainer_runs.py; the tests read what they wrote.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from argparse import Namespace

import pytest
import tiny
import torch
from paths import PYTHONPATH, SUPPORT

from simplclip import losses
from simplclip.integrations import open_clip_train as openclip_train

MISSING = [name for name in ("pandas", "fsspec", "open_clip_train") if importlib.util.find_spec(name) is None]
needs_trainer = pytest.mark.skipif(bool(MISSING), reason=f"open_clip's trainer needs {', '.join(MISSING)}")
BATCH, STEPS = 8, 10


def write_shard(path, number):
    names = [(colour, shape) for colour in tiny.COLOURS for shape in tiny.SHAPES][BATCH * number : BATCH * (number + 1)]
    with tarfile.open(path, "w") as tar:
        for colour, shape in names:
            picture = tiny.picture(tiny.COLOURS[colour], shape)
            for suffix, content in (("png", picture), ("txt", f"a {colour} {shape}".encode())):
                member = tarfile.TarInfo(f"{colour}-{shape}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


class Plan:
    """Runs by name, each in a folder of logs of its own unless `name` says whose it continues."""

    def __init__(self, folder, ranks=1):
        self.folder, self.ranks, self.entries, self.results = folder, ranks, {}, []

    def add(self, key, who, *argv, name=None, data="one", epochs=1, help=("ddp", "shards")):
        # A batch is all there is, whole pictures, so that open_clip's unseeded shuffling changes no loss.
        shards, samples = {"one": ("train-0.tar", BATCH), "two": ("train-{0..1}.tar", 2 * BATCH)}[data]
        argv = [
            "--model", "tiny", "--precision", "fp32", "--device", "cpu", "--workers", "0", "--batch-size", str(BATCH),
            "--dataset-type", "webdataset", "--train-data", str(self.folder / shards),
            "--train-num-samples", str(STEPS * samples), "--aug-cfg", "scale=(1.0,1.0)",
            "--epochs", str(epochs), "--lr", "1e-3", "--warmup", "0", "--lr-scheduler", "const",
            "--log-every-n-steps", "1", "--logs", str(self.folder / "logs"), "--name", name or key, *map(str, argv),
        ]  # fmt: skip
        self.entries[key] = {"who": who, "argv": argv, "help": list(help)}

    def both(self, key, *argv, **options):
        for who in ("theirs", "ours"):
            self.add(f"{key}-{who}", who, *argv, **options)

    def run(self, plan):
        (self.folder / f"{plan}.json").write_text(json.dumps(self.entries))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"] if self.ranks > 1 else []
        paths = [PYTHONPATH, *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, *launch, str(SUPPORT / "trainer_runs.py"), str(self.folder), plan],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        files = [self.folder / f"{plan}-{rank}.json" for rank in range(self.ranks)]
        assert all(file.exists() for file in files), done.stderr[-3000:]
        self.results = [json.loads(file.read_text()) for file in files]
        return self

    def __getitem__(self, key):
        """Rank 0's result of a run that did not fail."""
        result = self.results[0][key]
        assert "error" not in result, (key, result["error"])
        return result

    def checkpoint(self, run, epoch=1, suffix=".pt"):
        file = self.folder / "logs" / run / "checkpoints" / f"epoch_{epoch}{suffix}"
        return torch.load(file, map_location="cpu", weights_only=True)


def assert_same_run(plan, key, keys=("contrastive_loss",)):
    """The first step's losses within 1e-4, the last's and the trained weights within what ten steps of AdamW make of it."""
    theirs, ours = plan[f"{key}-theirs"]["steps"], plan[f"{key}-ours"]["steps"]
    assert len(theirs) == len(ours) >= STEPS
    assert list(theirs[0]) == list(ours[0]) == list(keys)
    for name in keys:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4)
        assert ours[-1][name] == pytest.approx(theirs[-1][name], rel=1e-3)
    assert theirs[-1]["contrastive_loss"] < 0.99 * theirs[0]["contrastive_loss"], "nothing was learned"
    before, after = (plan.checkpoint(f"{key}-{who}")["state_dict"] for who in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        if not name.endswith("attn.in_proj_bias"):  # keys' biases have no gradient but rounding, of which AdamW makes steps
            assert (after[name] - before[name]).norm() <= 1e-3 * before[name].norm(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    for number in (0, 1):
        write_shard(folder / f"train-{number}.tar", number)
    import trainer_runs

    trainer_runs.register_models(folder)
    trainer_runs.write_teachers(folder)
    return folder


def teacher(folder, name="tiny"):
    return "--distill-model", name, "--distill-pretrained", folder / f"{name}.bin"


@pytest.fixture(scope="module")
def single(folder):
    plan = Plan(folder)
    synthetic = ("--dataset-type", "synthetic", "--train-num-samples", STEPS * BATCH)
    plan.add("shards-without-help", "theirs", help=())
    plan.both("plain")
    plan.both("local", "--local-loss", "--gather-with-grad")
    plan.both("accumulated", "--accum-freq", 2, data="two")
    plan.both("synthetic", *synthetic)
    plan.both("distilled", *teacher(folder))
    # Resuming: what two epochs in one go give, and one epoch and then another; then open_clip's trainer with the same.
    plan.add("twice", "ours", epochs=2)
    plan.add("once", "ours")
    plan.add("once-more", "ours", "--resume", "latest", name="once", epochs=2)
    plan.add("theirs-from-ours", "theirs", "--resume", folder / "logs/once/checkpoints/epoch_1.pt", epochs=2)
    matching = ("--pm-weight", 0.5, "--pm-negatives", "hard")
    plan.add("pm-twice", "ours", *matching, epochs=2)
    plan.add("pm-once", "ours", *matching)
    plan.add("pm-once-more", "ours", *matching, "--resume", "latest", name="pm-once", epochs=2)
    plan.add("pm-dropped", "theirs", "--resume", folder / "logs/pm-once/checkpoints/epoch_1.pt", epochs=2)
    resume = ("--resume", folder / "logs/once/checkpoints/epoch_1.pt")
    plan.add("pm-without-file", "ours", *matching, *resume, epochs=2)
    plan.add("pm-fresh", "ours", *matching, *resume, "--fresh-loss-parameters", epochs=2)
    plan.add("pm-other", "ours", "--pm-weight", 1, "--pm-plane", "hadamard", "--resume", "latest", name="pm-once", epochs=3)
    plan.add("pm-clip", "ours", *matching, "--grad-clip-norm", 1, "--pm-plane", "hadamard")
    plan.add("pm-latest", "ours", *matching, "--save-most-recent", "--save-frequency", 0, epochs=5)
    plan.add(
        "pm-latest-more", "ours", *matching, "--save-most-recent", "--save-frequency", 0, "--resume", "latest",
        name="pm-latest", epochs=6,
    )  # fmt: skip
    plan.both("half", "--precision", "amp_bf16")
    plan.both("scaled", "--precision", "amp")  # float16 and a GradScaler, open_clip's default
    plan.add("pm-scaled", "ours", *matching, "--precision", "amp")
    wide = ("--feature-weight", 1, "--interactive-weight", 0.5, *teacher(folder, "tiny-wide"), "--pm-weight", 1)
    plan.add("wide", "ours", *wide)
    plan.add("wide-more", "ours", *wide, "--resume", "latest", name="wide", epochs=2)
    return plan.run("single")


@pytest.fixture(scope="module")
def double(folder):
    plan = Plan(folder, ranks=2)
    plan.add("no-help-theirs", "theirs", help=("shards",))
    plan.add("no-help-ours", "ours", help=())
    plan.both("two", data="two")
    plan.both("two-local", "--local-loss", "--gather-with-grad", data="two")
    plan.both("two-distilled", "--local-loss", "--gather-with-grad", *teacher(folder), data="two")
    plan.both("two-accumulated", "--local-loss", "--gather-with-grad", "--accum-freq", 2, data="two")
    plan.add("two-pm", "ours", "--local-loss", "--gather-with-grad", "--pm-weight", 1, data="two")
    plan.add("two-pm-more", "ours", "--pm-weight", 1, "--resume", "latest", name="two-pm", data="two", epochs=2)
    wide = ("--feature-weight", 1, *teacher(folder, "tiny-wide"))
    plan.add("two-wide", "ours", *wide, data="two")
    return plan.run("double")


@pytest.mark.slow
@needs_trainer
@pytest.mark.parametrize("key", ["plain", "local", "accumulated"])
def test_losses_and_weights_are_open_clips(single, key):
    assert_same_run(single, key)
    assert single[f"{key}-ours"]["loss"] == "ClipPMLoss"
    assert single[f"{key}-ours"]["parameters"] == {}


@needs_trainer
@pytest.mark.parametrize("key", ["half", "scaled"])
def test_mixed_precision(single, key):
    theirs, ours = (single[f"{key}-{who}"]["steps"] for who in ("theirs", "ours"))
    for step in (0, -1):
        assert ours[step]["contrastive_loss"] == pytest.approx(theirs[step]["contrastive_loss"], rel=2e-2)
    plane = single["pm-scaled"]["parameters"]["plane_weight"]
    assert plane == pytest.approx(single["pm-once"]["parameters"]["plane_weight"], rel=1e-3)
    assert plane != losses.ClipPMLoss.INITIAL_WEIGHT


@needs_trainer
def test_synthetic_data(single):
    """Equal pairs: the loss is log N, whatever the model."""
    for who in ("theirs", "ours"):
        steps = single[f"synthetic-{who}"]["steps"]
        assert [step["contrastive_loss"] for step in steps] == pytest.approx([torch.tensor(BATCH).log().item()] * STEPS)


@needs_trainer
def test_distillation_is_open_clips(single):
    assert_same_run(single, "distilled", ("contrastive_loss", "distill_loss"))
    assert single["distilled-ours"]["loss"] == "WIKDLoss"


@needs_trainer
def test_open_clip_alone_stops_at_the_end_of_a_shard(single):
    """Why ours reads shards by a function of its own with webdataset 1.0: theirs asks for webdataset <= 0.2.86."""
    import webdataset

    if int(webdataset.__version__.split(".")[0]) < 1:
        pytest.skip(f"webdataset {webdataset.__version__} has no such marker")
    assert single.results[0]["shards-without-help"]["error"] == "KeyError: 'fname'"


@needs_trainer
def test_checkpoints_resume_here_and_in_open_clips_trainer(single):
    whole, second = single["twice"]["steps"], single["once-more"]["steps"]
    theirs = single["theirs-from-ours"]["steps"]
    assert len(whole) == 2 * STEPS
    assert len(second) == len(theirs) == STEPS
    for steps in (second, theirs):
        for ours, expected in zip(steps, whole[STEPS:]):
            assert ours["contrastive_loss"] == pytest.approx(expected["contrastive_loss"], rel=1e-3)
    assert set(single.checkpoint("once")) == set(single.checkpoint("plain-theirs"))


@needs_trainer
def test_learned_parameters_are_trained_and_resumed(single):
    start = {"plane_weight": losses.ClipPMLoss.INITIAL_WEIGHT, "plane_bias": losses.ClipPMLoss.INITIAL_BIAS}
    whole, second = single["pm-twice"], single["pm-once-more"]
    for name, value in start.items():
        assert abs(whole["parameters"][name] - value) > 1e-3, "not trained"
        assert second["parameters"][name] == pytest.approx(whole["parameters"][name], rel=1e-4)
    for ours, expected in zip(second["steps"], whole["steps"][STEPS:]):
        assert ours == pytest.approx(expected, rel=1e-3)
    one, two = (single.checkpoint("pm-twice", epoch, ".loss") for epoch in (1, 2))
    assert (one["epoch"], two["epoch"]) == (1, 2)
    again = single.checkpoint("pm-once", 2, ".loss")
    for name in start:
        assert two["loss"][name].item() == pytest.approx(whole["parameters"][name])
        for key, value in two["optimizer"][name].items():
            torch.testing.assert_close(again["optimizer"][name][key], value, rtol=1e-2, atol=1e-6)
        assert two["optimizer"][name]["step"] == 2 * STEPS


@needs_trainer
def test_a_checkpoint_with_learned_parameters_is_one_of_open_clips(single):
    with_plane, without = single.checkpoint("pm-once"), single.checkpoint("once")
    assert with_plane.keys() == without.keys()
    for part in ("state", "param_groups"):
        assert len(with_plane["optimizer"][part]) == len(without["optimizer"][part])
    assert len(single["pm-dropped"]["steps"]) == STEPS


@needs_trainer
def test_a_checkpoint_without_learned_parameters_is_an_error_unless_asked_for(single):
    error = single.results[0]["pm-without-file"]["error"]
    assert "expected the learned parameters of the loss in" in error
    assert error.endswith("epoch_1.loss, got no such file; --fresh-loss-parameters initialises them")
    assert len(single["pm-fresh"]["steps"]) == STEPS
    error = single.results[0]["pm-other"]["error"]
    assert "epoch_2.loss: expected parameters {'plane_weight': (16,)" in error


@needs_trainer
def test_files_of_learned_parameters_go_with_their_checkpoints(single):
    folder = single.folder / "logs" / "pm-latest" / "checkpoints"
    assert len(single["pm-latest-more"]["steps"]) == STEPS
    names = {file.name for file in folder.iterdir()}
    # --save-frequency 0 still saves the last epoch, 5 and then 6, under its number.
    assert names == {"epoch_latest.pt", "epoch_5.pt", "epoch_6.pt", "epoch_5.loss", "epoch_6.loss"}
    assert len(single["pm-clip"]["parameters"]["plane_weight"]) == 16


@needs_trainer
def test_projections_to_a_wider_teacher_are_learned_and_resumed(single):
    steps = single["wide"]["steps"] + single["wide-more"]["steps"]
    assert {"contrastive_loss", "distill_loss", "interactive_loss", "feature_loss", "pair_matching_loss"} == set(steps[0])
    assert steps[-1]["feature_loss"] < steps[STEPS]["feature_loss"] < steps[0]["feature_loss"]
    saved = single.checkpoint("wide", 1, ".loss")
    assert saved["optimizer"].keys() == saved["loss"].keys() == single["wide"]["parameters"].keys()


@pytest.mark.slow
@needs_trainer
def test_open_clip_alone_cannot_wrap_a_model_on_a_cpu(double):
    """DistributedDataParallel(model, device_ids=[device]) with a CPU module: the same error without us and with us."""
    for who in ("theirs", "ours"):
        error = double.results[0][f"no-help-{who}"]["error"]
        assert error.startswith("ValueError: DistributedDataParallel device_ids and output_device arguments only work with")


@needs_trainer
@pytest.mark.parametrize("key", ["two", "two-local", "two-accumulated"])
def test_two_ranks_are_open_clips(double, key):
    assert_same_run(double, key)


@needs_trainer
def test_distillation_on_two_ranks_is_open_clips(double):
    assert_same_run(double, "two-distilled", ("contrastive_loss", "distill_loss"))


@needs_trainer
def test_two_ranks_learn_one_plane(double):
    for key in ("two-pm", "two-pm-more"):
        first, second = (result[key]["parameters"] for result in double.results)
        assert first == second
        assert first["plane_weight"] != losses.ClipPMLoss.INITIAL_WEIGHT
    assert double.checkpoint("two-pm", 2, ".loss")["optimizer"]["plane_bias"]["step"] == 2 * STEPS


@needs_trainer
def test_two_ranks_start_from_one_draw_of_the_projections(double):
    first, second = (result["two-wide"]["parameters"] for result in double.results)
    assert first == second


def make_parameters(loss, **changes):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    args = Namespace(world_size=1, distributed=False, accum_freq=1, horovod=False, wd=0.2, opt="sgd")
    for name, value in changes.items():
        setattr(args, name, value)
    return openclip_train.LossParameters(loss, optimizer, args), optimizer


def test_groups_follow_open_clips_rule_of_weight_decay():
    loss = torch.nn.Linear(4, 2)
    parameters, optimizer = make_parameters(loss)
    bias, weight = optimizer.param_groups[1:]
    assert (bias["weight_decay"], weight["weight_decay"]) == (0, 0.2)
    assert bias["params"] == [loss.bias]
    assert weight["params"] == [loss.weight]
    assert (bias["lr"], bias["momentum"]) == (1, 0.5)
    parameters.set_apart()
    assert len(optimizer.state_dict()["param_groups"]) == 1


def test_accumulated_passes_count_once():
    loss = torch.nn.Linear(4, 2)
    make_parameters(loss, accum_freq=3)
    x = torch.randn(5, 4)
    for _ in range(3):
        loss(x).sum().backward()
    torch.testing.assert_close(loss.weight.grad, x.sum(0).expand(2, 4))


def test_what_cannot_be_trained_is_an_error():
    with pytest.raises(ValueError, match="--horovod: expected a loss without learned parameters"):
        make_parameters(torch.nn.Linear(4, 2), horovod=True)


@needs_trainer
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--siglip"], "--siglip: SigLIP's loss is not replaced by simplclip's losses"),
        (["--model", "coca_ViT-B-32"], "--model coca_ViT-B-32: CoCa's loss is not replaced"),
        (["--feature-weight", "1"], "--feature-weight: expected a teacher (--distill-model"),
        (["--interactive", "kl", "--distill-model", "x"], "--interactive: expected a teacher ("),
        (["--pm-weight", "-1"], "--pm-weight: expected a weight of 0 or more, got -1"),
        (["--pm-plane", "affine"], "--pm-plane: invalid choice: 'affine'"),
        (["--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        openclip_train.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@needs_trainer
def test_help_shows_ours_and_then_open_clips(capsys):
    with pytest.raises(SystemExit) as stop:
        openclip_train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.index("--pm-weight") < text.index("--train-data")


def test_without_the_trainer_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    with pytest.raises(SystemExit):
        openclip_train.main([])
    assert "open_clip's trainer does not load" in capsys.readouterr().err
