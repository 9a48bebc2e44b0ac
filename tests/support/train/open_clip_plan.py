"""A plan of runs of open_clip's trainer, in one process or in two, and the results of the runs.

ranks/open_clip_trainer.py runs them.
"""

import importlib.util
import json

import pytest
import torch

from support.data import pairs
from support.ranks.launch import forked_ranks
from support.train import tiny

MISSING = [
    name
    for name in ("pandas", "fsspec", "open_clip_train")
    if importlib.util.find_spec(name) is None
]
needs_trainer = pytest.mark.skipif(
    bool(MISSING), reason=f"open_clip's trainer needs {', '.join(MISSING)}"
)
BATCH, STEPS = 8, 10


def write_shard(path, number):
    names = [(colour, shape) for colour in tiny.COLOURS for shape in tiny.SHAPES][
        BATCH * number : BATCH * (number + 1)
    ]
    picture = lambda colour, shape: tiny.picture(tiny.COLOURS[colour], shape)  # noqa: E731
    pairs.write(
        path, [(f"{c}-{s}", {"png": picture(c, s), "txt": f"a {c} {s}".encode()}) for c, s in names]
    )


class Plan:
    """Runs by name. Each has a folder of logs of its own, unless `name` names a run to continue."""

    def __init__(self, folder, ranks=1):
        self.folder = folder
        self.ranks = ranks
        self.entries = {}
        self.results = []

    def add(
        self, key, who, *argv, name=None, data="one", epochs=1, steps=STEPS, lr="1e-3", command=()
    ):
        # A batch holds all samples as whole pictures, so that open_clip's unseeded shuffling
        # changes no loss.
        shards, samples = {"one": ("train-0.tar", BATCH), "two": ("train-{0..1}.tar", 2 * BATCH)}[
            data
        ]
        argv = [
            *command,
            "--model",
            "tiny",
            "--precision",
            "fp32",
            "--device",
            "cpu",
            "--workers",
            "0",
            "--batch-size",
            str(BATCH),
            "--dataset-type",
            "webdataset",
            "--train-data",
            str(self.folder / shards),
            "--train-num-samples",
            str(steps * samples),
            "--aug-cfg",
            "scale=(1.0,1.0)",
            "--epochs",
            str(epochs),
            "--lr",
            lr,
            "--warmup",
            "0",
            "--lr-scheduler",
            "const",
            "--log-every-n-steps",
            "1",
            "--logs",
            str(self.folder / "logs"),
            "--name",
            name or key,
            *map(str, argv),
        ]
        self.entries[key] = {"who": who, "argv": argv}

    def both(self, key, *argv, **options):
        for who in ("theirs", "ours"):
            self.add(f"{key}-{who}", who, *argv, **options)

    def more(self, key, *argv, epochs=2, **options):
        """Adds a run of this library that continues the run `key`."""
        self.add(
            f"{key}-more", "ours", *argv, "--resume", "latest", name=key, epochs=epochs, **options
        )

    def run(self, plan):
        (self.folder / f"{plan}.json").write_text(json.dumps(self.entries))
        done = forked_ranks("open_clip_trainer.py", self.folder, plan, ranks=self.ranks)
        files = [self.folder / f"{plan}-{rank}.json" for rank in range(self.ranks)]
        assert all(file.exists() for file in files), done.stderr[-3000:]
        self.results = [json.loads(file.read_text()) for file in files]
        return self

    def __getitem__(self, key):
        """Returns rank 0's result of a run, which must not have failed."""
        result = self.results[0][key]
        assert "error" not in result, (key, result["error"])
        return result

    def checkpoint(self, run, epoch=1):
        file = self.folder / "logs" / run / "checkpoints" / f"epoch_{epoch}.pt"
        return torch.load(file, map_location="cpu", weights_only=True)


def prepare(folder):
    """Writes shards and models."""
    for number in (0, 1):
        write_shard(folder / f"train-{number}.tar", number)
    from support.models.open_clip_models import write_models

    write_models(folder)
    return folder


def teacher(folder, name="tiny"):
    return "--distill-model", name, "--distill-pretrained", folder / f"{name}.bin"


def coca(folder):
    return "--model", "tiny-coca", "--pretrained", folder / "tiny-coca.bin"
