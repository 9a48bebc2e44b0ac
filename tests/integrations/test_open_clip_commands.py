"""The commands of docs/losses.md for open_clip's trainer, with a tiny model: each step's losses are open_clip's own."""

import re
import shlex

import pytest
from paths import ROOT
from trainer_plan import Plan, coca, needs_trainer, prepare, teacher

from simplclip import losses

STEPS, FEW = 20, 6
# What a command of docs/losses.md adds to its first one, open_clip's loss and ours, and the names of its values.
COMMANDS = {
    "clip": ("", "ClipLoss", "ClipPMLoss", ["contrastive_loss"]),
    "siglip": ("--siglip", "SigLipLoss", "SigLipLoss", ["contrastive_loss"]),
    "coca": ("--pretrained", "CoCaLoss", "CoCaLoss", ["contrastive_loss", "caption_loss"]),
    "distilled": (
        "--distill-model --distill-pretrained", "DistillClipLoss", "WIKDLoss", ["contrastive_loss", "distill_loss"]
    ),
    "clip-accumulated": ("--accum-freq", "ClipLoss", "ClipPMLoss", ["contrastive_loss"]),
    "siglip-accumulated": ("--siglip --accum-freq", "SigLipLoss", "SigLipLoss", ["contrastive_loss"]),
}  # fmt: skip


def documented(added: str) -> list[str]:
    """The arguments of this command in docs/losses.md."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "docs" / "losses.md").read_text())
    commands = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("simplclip-open-clip ")]
    options = [{word for word in command if word.startswith("--")} for command in commands]
    return commands[options.index(options[0] | set(added.split()))]


@pytest.fixture(scope="module")
def documented_runs(tmp_path_factory):
    """Their model, data and sizes are replaced by arguments that follow them."""
    folder = prepare(tmp_path_factory.mktemp("commands"))
    plan, options = Plan(folder), {"steps": STEPS}
    tiny = {"coca": coca(folder), "distilled": teacher(folder)}
    for key, (added, *_) in COMMANDS.items():
        data = "two" if "--accum-freq" in added else "one"
        plan.both(key, *tiny.get(key, ()), command=documented(added), data=data, **options)
    plan.add("matching", "ours", command=documented("--siglip --pm-weight"), **options)
    # What the page does not show.
    plan.both("coca-accumulated", *coca(folder), "--accum-freq", 2, data="two", steps=FEW)
    plan.both("half", "--siglip", "--precision", "amp_bf16", **options)
    plan.add("siglip-used", "used", "--siglip", **options)
    plan.add("coca-used", "used", *coca(folder), **options)
    return plan.run("commands")


def assert_same_steps(theirs, ours, passes=STEPS, rel=0.0, abs=1e-4):
    assert len(theirs["steps"]) == len(ours["steps"]) == passes
    for step, (mine, other) in enumerate(zip(ours["steps"], theirs["steps"])):
        assert mine == pytest.approx(other, rel=rel, abs=abs), step
    assert ours["steps"][-1]["contrastive_loss"] < 0.9 * ours["steps"][0]["contrastive_loss"], "nothing was learned"


@needs_trainer
@pytest.mark.parametrize("key", COMMANDS)
def test_each_step_of_a_command_is_open_clips(documented_runs, key):
    theirs, ours = (documented_runs[f"{key}-{who}"] for who in ("theirs", "ours"))
    _, kind, replaced, names = COMMANDS[key]
    assert (theirs["loss"], ours["loss"]) == (f"open_clip.{kind}", f"simplclip.{replaced}")
    assert list(ours["steps"][0]) == list(theirs["steps"][0]) == names
    assert_same_steps(theirs, ours, passes=STEPS * (2 if key.endswith("accumulated") else 1))


@needs_trainer
def test_coca_accumulates(documented_runs):
    theirs, ours = (documented_runs[f"coca-accumulated-{who}"] for who in ("theirs", "ours"))
    assert ours["loss"] == "simplclip.CoCaLoss"
    assert_same_steps(theirs, ours, passes=2 * FEW)


@needs_trainer
def test_siglip_in_bfloat16(documented_runs):
    """open_clip computes its logits, their losses and the sum of these in bfloat16; simplclip sums in float32."""
    theirs, ours = (documented_runs[f"half-{who}"] for who in ("theirs", "ours"))
    assert_same_steps(theirs, ours, rel=2**-6, abs=0)


@needs_trainer
@pytest.mark.parametrize("key", ["siglip", "coca"])
def test_use_losses_serves_open_clips_trainer(documented_runs, key):
    used = documented_runs[f"{key}-used"]
    assert used["loss"] == f"simplclip.{COMMANDS[key][2]}"
    assert_same_steps(documented_runs[f"{key}-theirs"], used)


@needs_trainer
def test_pair_matching_is_learned_beside_siglip(documented_runs):
    run, plain = documented_runs["matching"], documented_runs["siglip-ours"]
    assert list(run["steps"][0]) == ["contrastive_loss", "pair_matching_loss"]
    assert run["steps"][0]["contrastive_loss"] == pytest.approx(plain["steps"][0]["contrastive_loss"], abs=1e-4)
    assert abs(run["parameters"]["plane_bias"] - losses.SigLipLoss.INITIAL_BIAS) > 1e-3, "not trained"
    saved = documented_runs.checkpoint("matching", suffix=".loss")
    assert saved["loss"].keys() == run["parameters"].keys() == {"plane_weight", "plane_bias"}
    assert saved["optimizer"]["plane_bias"]["step"] == STEPS
