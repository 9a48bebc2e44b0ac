"""open_clip's trainer with this library's losses against itself: each step has the same losses.

Each rank runs this file as well: test_open_clip_train.py FOLDER does the runs of its number of
ranks in FOLDER, and writes results-RANK.json: by name the class of the loss, and the losses of each
step.
"""

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import pkgutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from simplclip.common.errors import InputError
from simplclip.integrations import open_clip_train as ours
from simplclip.integrations.open_clip import use_losses
from support.data import pairs
from support.models.open_clip_models import register_models, write_models
from support.paths import ROOT
from support.ranks.launch import forked_ranks
from support.train import tiny

MISSING = [name for name in ("pandas", "fsspec") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"open_clip's trainer needs {', '.join(MISSING)}"),
]
BATCH = 8
STEPS = 6
# By number of ranks, the runs: whose losses, and options beside those of `arguments`.
RUNS = {
    1: {
        "plain": ("theirs", ""),
        "plain-ours": ("ours", ""),
        "cropped": ("ours", "--crop-texts"),
        "siglip": ("theirs", "--siglip"),
        "siglip-used": ("used", "--siglip"),
    },
    2: {
        "siglip": ("theirs", "--siglip"),
        "siglip-ours": ("ours", "--siglip"),
        "local": ("theirs", "--local-loss --gather-with-grad"),
        "local-ours": ("ours", "--local-loss --gather-with-grad"),
    },
}


def arguments(name: str, ranks: int) -> list[str]:
    """Returns the trainer's arguments. A step has the whole data, since its order is unseeded."""
    shards = f"train-{{0..{ranks - 1}}}.tar"
    options = (
        f"--model tiny --precision fp32 --device cpu --workers 0 --batch-size {BATCH} --epochs 1 "
        f"--dataset-type webdataset --train-data {shards} --aug-cfg scale=(1.0,1.0) "
        f"--train-num-samples {STEPS * BATCH * ranks} --warmup 0 --lr-scheduler const --lr 3e-3 "
        f"--log-every-n-steps 1 --logs logs --name {name}-{ranks} "
    )
    if ranks > 1:  # a file serves one group of ranks after the other, the launcher's store one
        options += f"--dist-url file://{Path.cwd()}/{name}.meeting"
        options += f"?rank={os.environ['RANK']}&world_size={ranks}"
    return options.split()


def run(who: str, argv: list[str]) -> dict:
    """Returns the class of the loss, the losses of each step, and the most tokens of a text."""
    import open_clip_train.main as trainer

    steps, kinds, lengths = [], set(), set()

    def record(module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(module, nn.Embedding):
            lengths.add(inputs[0].shape[1])
        if isinstance(output, dict) and "contrastive_loss" in output:
            steps.append({name: value.item() for name, value in output.items()})
            kinds.add(f"{type(module).__module__.partition('.')[0]}.{type(module).__name__}")

    hook = nn.modules.module.register_module_forward_hook(record)
    create_model = trainer.create_model_and_transforms
    if who == "ours":
        ours.main(argv)
        assert trainer.create_model_and_transforms is create_model
    else:
        uses = use_losses() if who == "used" else contextlib.nullcontext()
        with uses, ours.shards_of_webdataset_1():
            trainer.main(argv)
    hook.remove()
    logging.root.handlers.clear()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    (kind,) = kinds
    return {"loss": kind, "steps": steps, "tokens": max(lengths)}


def main(folder: Path) -> None:
    """Does the runs of a rank. open_clip wraps modules on a CPU in a way that torch refuses."""
    torch.set_num_threads(1)
    wrap = nn.parallel.DistributedDataParallel
    nn.parallel.DistributedDataParallel = lambda module, device_ids=None, **options: wrap(
        module, **options
    )
    register_models(folder)
    ranks = int(os.environ["WORLD_SIZE"])
    results = {}
    with contextlib.chdir(folder):
        for name, (who, options) in RUNS[ranks].items():
            results[name] = run(who, arguments(name, ranks) + options.split())
    if os.environ["RANK"] == "0":
        (folder / f"results-{ranks}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the first rank's results, by number of ranks."""
    folder = tmp_path_factory.mktemp("trainer")
    write_models(folder)
    concepts = list(itertools.product(tiny.COLOURS, tiny.SHAPES))
    for number, part in enumerate((concepts[:BATCH], concepts[BATCH : 2 * BATCH])):
        samples = []
        for colour, shape in part:
            picture = tiny.picture(tiny.COLOURS[colour], shape)
            caption = f"a {colour} {shape}".encode()
            samples.append((f"{colour}-{shape}", {"png": picture, "txt": caption}))
        pairs.write(folder / f"train-{number}.tar", samples)
    for ranks in RUNS:
        forked_ranks(__file__, folder, ranks=ranks, check=True)
    return {ranks: json.loads((folder / f"results-{ranks}.json").read_text()) for ranks in RUNS}


@pytest.mark.parametrize(
    ("ranks", "theirs", "name", "loss"),
    [
        (1, "plain", "plain-ours", "ClipLoss"),
        (1, "plain", "cropped", "ClipLoss"),
        (1, "siglip", "siglip-used", "SigLipLoss"),
        (2, "siglip", "siglip-ours", "SigLipLoss"),
        (2, "local", "local-ours", "ClipLoss"),
    ],
)
def test_each_step_has_the_losses_of_open_clip(results, ranks, theirs, name, loss):
    expected, found = results[ranks][theirs], results[ranks][name]
    assert (expected["loss"], found["loss"]) == (f"open_clip.{loss}", f"simplclip.{loss}")
    steps, before = (
        [step["contrastive_loss"] for step in result["steps"]] for result in (found, expected)
    )
    assert steps == pytest.approx(before, rel=0, abs=1e-4)
    assert found["tokens"] == (8 if name == "cropped" else 16)
    assert len(steps) == STEPS
    assert steps[-1] < 0.9 * steps[0], "nothing was learned"


def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys):
    def refuse(argv):
        raise InputError("model: expected x, got y")

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    command = pkgutil.resolve_name(scripts["simplclip-open-clip"])
    monkeypatch.setattr("open_clip_train.main.main", refuse)
    with pytest.raises(SystemExit):
        command(["--crop-texts"])
    assert capsys.readouterr().err.endswith("-open-clip: error: model: expected x, got y\n")
    monkeypatch.setitem(sys.modules, "open_clip_train.main", None)
    with pytest.raises(SystemExit):
        command([])
    assert "which open_clip's trainer needs: pip install" in capsys.readouterr().err


if __name__ == "__main__":
    main(Path(sys.argv[1]))
