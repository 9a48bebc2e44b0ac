"""open_clip's trainer with this library's losses against itself.

Equal arguments, also those of docs/losses.md, give equal losses; learned parameters are trained and
resumed.

Runs share a process (distributed runs two processes), see open_clip_plan.py; the tests read their
results.
"""

import pkgutil
import re
import shlex
import sys
import tomllib
from argparse import Namespace

import open_clip
import pytest
import torch

from simplclip import losses
from simplclip.common.errors import InputError
from simplclip.integrations import open_clip_train as openclip_train
from simplclip.models.weights import needs_quick_gelu
from support.ops.calls import recorded_calls
from support.paths import ROOT
from support.train.open_clip_plan import STEPS, Plan, coca, needs_trainer, prepare, teacher

pytestmark = pytest.mark.long


OPEN_CLIP_4 = hasattr(open_clip, "create_task")
STRATEGIES = ("task", "model", "step")  # what open_clip 4 compiles
DOCUMENTED = 6  # steps of a documented command
# Options that a command of docs/losses.md adds to the first; open_clip's loss and this library's;
# the names of the losses.
COMMANDS = {
    "clip": ("", "ClipLoss", "ClipPMLoss", ["contrastive_loss"]),
    "siglip": ("--siglip", "SigLipLoss", "SigLipLoss", ["contrastive_loss"]),
    "coca": ("--pretrained", "CoCaLoss", "CoCaLoss", ["contrastive_loss", "caption_loss"]),
    "distilled": (
        "--distill-model --distill-pretrained",
        "DistillClipLoss",
        "WIKDLoss",
        ["contrastive_loss", "distill_loss"],
    ),
    "clip-accumulated": ("--accum-freq", "ClipLoss", "ClipPMLoss", ["contrastive_loss"]),
}  # fmt: skip
QUICK = [key for key in COMMANDS if key != "clip-accumulated"]  # in the suite; make prove takes all


def documented(added: str) -> list[str]:
    """Returns the arguments of this command in docs/losses.md."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "docs" / "losses.md").read_text())
    lines = [line for line in text.splitlines() if line.startswith("simplclip-open-clip ")]
    commands = [shlex.split(line)[1:] for line in lines]
    options = [set(re.findall(r"(?<=\s)--\S+", line)) for line in lines]
    return commands[options.index(options[0] | set(added.split()))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("trainer"))


def assert_same_run(plan, key, keys=("contrastive_loss",)):
    """Compares runs: losses of the first step within 1e-4, the end within the drift of AdamW."""
    theirs, ours = plan[f"{key}-theirs"]["steps"], plan[f"{key}-ours"]["steps"]
    assert len(theirs) == len(ours) >= STEPS
    assert list(theirs[0]) == list(ours[0]) == list(keys)
    for name in keys:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4)
        assert ours[-1][name] == pytest.approx(theirs[-1][name], rel=1e-3)
    assert theirs[-1]["contrastive_loss"] < 0.99 * theirs[0]["contrastive_loss"], (
        "nothing was learned"
    )
    before, after = (plan.checkpoint(f"{key}-{who}")["state_dict"] for who in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        # AdamW makes steps of rounding: keys' biases have no gradient
        if not name.endswith("attn.in_proj_bias"):
            assert (after[name] - before[name]).norm() <= 1e-3 * before[name].norm(), name


@pytest.fixture(scope="module")
def single(folder, request):
    plan, prove = Plan(folder), request.config.getoption("--prove")
    plan.both("plain")
    # Resuming: two epochs in one run equal one epoch and then another. open_clip's trainer resumes
    # a run without a plane.
    matching = ("--pm-weight", 0.5)
    plan.add("pm-twice", "ours", *matching, epochs=2)
    plan.add("pm-once", "ours", *matching)
    plan.more("pm-once", *matching)
    former = folder / "logs/plain-ours/checkpoints/epoch_1.pt"
    plan.add("theirs-from-ours", "theirs", "--resume", former, epochs=2)
    if prove:
        plan.add("pm-clip", "ours", *matching, "--grad-clip-norm", 1, "--pm-plane", "hadamard")
    # float16 and a GradScaler, as open_clip's default has them
    plan.both("scaled", "--precision", "amp")
    plan.add("pm-scaled", "ours", *matching, "--precision", "amp")
    wide = ("--feature-weight", 1, "--interactive-weight", 0.5, "--pm-weight", 1)
    wide += teacher(folder, "tiny-wide")
    plan.add("wide", "ours", *wide)
    plan.more("wide", *wide)
    # Commands of the docs. Arguments that follow replace their model, data and sizes.
    options = {"steps": DOCUMENTED, "lr": "3e-3"}
    tiny = {"coca": coca(folder), "distilled": teacher(folder)}
    for key in COMMANDS if prove else QUICK:
        added = COMMANDS[key][0]
        data = "two" if "--accum-freq" in added else "one"
        plan.both(key, *tiny.get(key, ()), command=documented(added), data=data, **options)
    plan.add("matching", "ours", command=documented("--siglip --pm-weight"), **options)
    plan.add("cropped", "ours", command=documented("--crop-texts"), **options)
    plan.add("siglip-used", "used", "--siglip", **options)
    if OPEN_CLIP_4:
        compiled = ("--torchcompile", "--torchcompile-backend", "aot_eager")
        for strategy in STRATEGIES:
            plan.both(f"compiled-{strategy}", *compiled, "--torchcompile-strategy", strategy)
        plan.add("compiled-used", "used", *compiled)
    return plan.run("single")


@pytest.fixture(scope="module")
def double(folder, request):
    plan = Plan(folder, ranks=2)
    if request.config.getoption("--prove"):
        plan.both("two-local", "--local-loss", "--gather-with-grad", data="two")
    plan.both("two-siglip", "--siglip", data="two")
    plan.add("two-pm", "ours", "--local-loss", "--gather-with-grad", "--pm-weight", 1, data="two")
    plan.more("two-pm", "--pm-weight", 1, data="two")
    plan.add("two-wide", "ours", "--feature-weight", 1, *teacher(folder, "tiny-wide"), data="two")
    return plan.run("double")


@pytest.mark.slow
@needs_trainer
@pytest.mark.skipif(not OPEN_CLIP_4, reason="open_clip 3.3 has no ways of compiling a step")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_open_clip_4_compiles_the_losses(strategy, single):
    assert_same_run(single, f"compiled-{strategy}")
    if strategy == "task":
        used, ours = (single[f"compiled-{name}"]["steps"] for name in ("used", "task-ours"))
        for step, expected in zip(used, ours, strict=True):
            assert step == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@needs_trainer
@pytest.mark.parametrize(
    ("plan", "key"),
    [
        ("single", "plain"),
        pytest.param("double", "two-local", marks=pytest.mark.prove),
        ("double", "two-siglip"),
    ],
)
def test_losses_and_weights_are_open_clips(plan, key, request):
    plan = request.getfixturevalue(plan)
    assert_same_run(plan, key)
    kind = "SigLipLoss" if "siglip" in key else "ClipPMLoss"
    assert plan[f"{key}-ours"]["loss"] == f"simplclip.{kind}"
    assert plan[f"{key}-ours"]["parameters"] == {}


@pytest.mark.slow
@needs_trainer
def test_mixed_precision(single):
    theirs, ours = (single[f"scaled-{who}"]["steps"] for who in ("theirs", "ours"))
    for step in (0, -1):
        assert ours[step]["contrastive_loss"] == pytest.approx(
            theirs[step]["contrastive_loss"], rel=2e-2
        )
    plane = single["pm-scaled"]["parameters"]["plane_weight"]
    assert plane == pytest.approx(single["pm-once"]["parameters"]["plane_weight"], rel=1e-3)
    assert plane != losses.ClipPMLoss.INITIAL_WEIGHT


@pytest.mark.slow
@needs_trainer
def test_learned_parameters_are_trained_and_resumed(single, request):
    plane = losses.ClipPMLoss
    start = {"plane_weight": plane.INITIAL_WEIGHT, "plane_bias": plane.INITIAL_BIAS}
    whole, second = single["pm-twice"], single["pm-once-more"]
    assert (len(whole["steps"]), len(second["steps"])) == (2 * STEPS, STEPS)
    for name, value in start.items():
        assert abs(whole["parameters"][name] - value) > 1e-4, "not trained"
        assert second["parameters"][name] == pytest.approx(whole["parameters"][name], rel=1e-4)
    for ours, expected in zip(second["steps"], whole["steps"][STEPS:]):
        assert ours == pytest.approx(expected, rel=1e-3)
    last, again = single.checkpoint("pm-twice", 2), single.checkpoint("pm-once", 2)
    for name in start:
        assert last["state_dict"][f"simplclip_loss.{name}"].item() == pytest.approx(
            whole["parameters"][name]
        )
    assert last["optimizer"]["param_groups"] == again["optimizer"]["param_groups"]
    assert len(last["optimizer"]["state"]) == len(
        single.checkpoint("plain-ours")["optimizer"]["state"]
    ) + len(start)
    if request.config.getoption("--prove"):
        assert len(single["pm-clip"]["parameters"]["plane_weight"]) == 16


@pytest.mark.slow
@needs_trainer
def test_open_clips_trainer_resumes_a_run_without_learned_parameters(single):
    ours, theirs = single.checkpoint("plain-ours"), single.checkpoint("plain-theirs")
    assert ours.keys() == theirs.keys()
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    steps = single["theirs-from-ours"]["steps"]
    assert len(steps) == STEPS
    assert steps[0]["contrastive_loss"] < single["plain-theirs"]["steps"][0]["contrastive_loss"]


@pytest.mark.slow
@needs_trainer
def test_projections_to_a_wider_teacher_are_learned_and_resumed(single):
    steps = single["wide"]["steps"] + single["wide-more"]["steps"]
    names = ("contrastive", "distill", "interactive", "feature", "pair_matching")
    assert steps[0].keys() == {f"{name}_loss" for name in names}
    assert steps[-1]["feature_loss"] < steps[STEPS]["feature_loss"] < steps[0]["feature_loss"]
    saved = {name for name in single.checkpoint("wide")["state_dict"] if "simplclip_loss" in name}
    assert saved == {f"simplclip_loss.{name}" for name in single["wide"]["parameters"]}


def assert_same_steps(theirs, ours, passes=DOCUMENTED):
    assert len(theirs["steps"]) == len(ours["steps"]) == passes
    for step, (mine, other) in enumerate(zip(ours["steps"], theirs["steps"])):
        assert mine == pytest.approx(other, rel=0, abs=1e-4), step
    assert ours["steps"][-1]["contrastive_loss"] < 0.9 * ours["steps"][0]["contrastive_loss"], (
        "nothing was learned"
    )


@pytest.mark.slow
@needs_trainer
@pytest.mark.parametrize("key", [*QUICK, pytest.param("clip-accumulated", marks=pytest.mark.prove)])
def test_each_step_of_a_command_is_open_clips(single, key):
    theirs, ours = (single[f"{key}-{who}"] for who in ("theirs", "ours"))
    _, kind, replaced, names = COMMANDS[key]
    assert (theirs["loss"], ours["loss"]) == (f"open_clip.{kind}", f"simplclip.{replaced}")
    assert list(ours["steps"][0]) == list(theirs["steps"][0]) == names
    assert_same_steps(theirs, ours, passes=DOCUMENTED * (2 if key.endswith("accumulated") else 1))


@pytest.mark.slow
@needs_trainer
def test_cropped_texts_give_the_same_steps(single):
    assert_same_steps(single["clip-theirs"], single["cropped"])


@pytest.mark.slow
@needs_trainer
def test_use_losses_serves_open_clips_trainer(single):
    assert single["siglip-used"]["loss"] == "simplclip.SigLipLoss"
    assert_same_steps(single["siglip-theirs"], single["siglip-used"])


@pytest.mark.slow
@needs_trainer
def test_pair_matching_is_learned_beside_siglip(single):
    run, plain = single["matching"], single["siglip-ours"]
    assert list(run["steps"][0]) == ["contrastive_loss", "pair_matching_loss"]
    assert run["steps"][0]["contrastive_loss"] == pytest.approx(
        plain["steps"][0]["contrastive_loss"], abs=1e-4
    )
    assert abs(run["parameters"]["plane_bias"] - losses.SigLipLoss.INITIAL_BIAS) > 1e-3, (
        "not trained"
    )
    assert run["parameters"].keys() == {"plane_weight", "plane_bias"}


@pytest.mark.slow
@needs_trainer
def test_two_ranks_learn_one_plane_and_start_from_one_draw_of_the_projections(double):
    for key in ("two-pm", "two-pm-more", "two-wide"):
        first, second = (result[key]["parameters"] for result in double.results)
        assert first == second
        assert first.get("plane_weight") != losses.ClipPMLoss.INITIAL_WEIGHT


def test_accumulated_passes_count_once():
    loss, model = torch.nn.Linear(4, 2), torch.nn.Module()
    openclip_train._attach(loss, model, Namespace(accum_freq=3))
    assert model.simplclip_loss is loss
    x = torch.randn(5, 4)
    for _ in range(3):
        loss(x).sum().backward()
    torch.testing.assert_close(loss.weight.grad, x.sum(0).expand(2, 4))


def test_losses_that_do_not_go_with_the_trainer_are_refused():
    with pytest.raises(InputError, match="--fsdp: expected a loss without learned parameters"):
        openclip_train._attach(
            torch.nn.Linear(4, 2), torch.nn.Module(), Namespace(accum_freq=1, fsdp=True)
        )
    options, args = openclip_train.parser().parse_args([]), Namespace(model="genlip", device="cpu")
    with pytest.raises(
        InputError, match="--model genlip: expected open_clip's .* got CrossEntropyLoss, which"
    ):
        openclip_train.replacement(options, args, torch.nn.CrossEntropyLoss())


@pytest.mark.parametrize("role", ["", "distill-"])
def test_the_documented_models_have_the_activation_of_their_weights(role):
    """open_clip only warns, and computes other features."""
    text = (ROOT / "docs" / "losses.md").read_text()
    pairs = re.findall(rf"--{role}model (\S+).*? --{role}pretrained (\S+)", text)
    assert pairs
    assert not [pair for pair in pairs if needs_quick_gelu(*pair)]


def test_models_that_are_named_with_a_slash_have_their_widths():
    """As open_clip takes them: ViT-B/32 is ViT-B-32."""
    words = ["--interactive-weight", "1", "--pm-weight", "1", "--pm-plane", "hadamard"]
    args = Namespace(model="ViT-B/32", distill_model="ViT-L/14", device="meta")
    options = openclip_train.parser().parse_args(words)
    loss = openclip_train.replacement(options, args, open_clip.loss.DistillClipLoss())
    assert (loss.embed_dim, loss.image_projection.shape) == (512, (768, 512))


def test_sigmoid_and_pair_matching_have_one_sweep(monkeypatch):
    """The trainer adds the terms up; the first one carries the gradient of the sum."""
    calls, loss = recorded_calls(monkeypatch), openclip_train.OneSweepSigLipLoss(pm_weight=1.0)
    features = torch.nn.functional.normalize(torch.randn(2, 6, 8), dim=-1).requires_grad_()
    terms = loss(*features, torch.tensor(10.0), torch.tensor(-10.0), output_dict=True)
    sum(terms.values()).backward()
    assert [name for name, _ in calls] == ["similarity_sigmoid"]


TEACHER = ("--distill-model", "tiny", "--distill-pretrained", "tiny.bin")


@needs_trainer
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--siglip", *TEACHER],
            "--siglip: expected no --distill-model, since open_clip's distillation takes no logit "
            "bias",
        ),
        (["--siglip", "--pm-plane", "hadamard"], "--pm-plane: expected scalar, since --siglip"),
        (
            ["--model", "coca_ViT-B-32", "--pm-weight", "1"],
            "--pm-weight: expected 0, since CoCa's loss has no pair matching",
        ),
        (
            ["--model", "coca_ViT-B-32", "--pm-plane", "hadamard"],
            "--pm-plane: expected scalar, since CoCa's loss has no pair matching",
        ),
        (["--pm-plane", "hadamard"], "--pm-plane: expected --pm-weight above 0, got 0"),
        (
            ["--pm-plane", "hadamard", *TEACHER],
            "--pm-plane: expected --pm-weight above 0, got 0",
        ),
        (
            ["--interactive", "kl", *TEACHER],
            "--interactive: expected --interactive-weight above 0, got 0",
        ),
        (
            ["--siglip", "--feature-weight", "1"],
            "--feature-weight: expected a teacher (--distill-model",
        ),
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
def test_a_command_ends_in_one_line_if_the_user_can_mend_it(monkeypatch, capsys):
    def main(argv):
        raise InputError("--model x: expected y, got z")

    monkeypatch.setattr(sys, "argv", ["simplclip-open-clip"])
    monkeypatch.setattr("open_clip_train.main.main", main)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    command = pkgutil.resolve_name(scripts["simplclip-open-clip"])
    with pytest.raises(SystemExit) as stop:
        command()
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "simplclip-open-clip: error: --model x: expected y, got z"
    monkeypatch.setenv("SIMPLCLIP_DEBUG", "1")
    with pytest.raises(InputError):
        command()


def test_without_the_trainer_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    with pytest.raises(SystemExit):
        openclip_train.main([])
    assert "open_clip's trainer does not load" in capsys.readouterr().err
