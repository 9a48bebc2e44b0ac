"""A plan of runs of open_clip's trainer, in one process or in two, and the results of the runs.

ranks/open_clip_trainer.py runs them.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from support.data import pairs
from support.models.open_clip_models import write_models
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
BATCH = 8
STEPS = 6
DATA = {"one": ("train-0.tar", BATCH), "two": ("train-{0..1}.tar", 2 * BATCH)}
OPTIONS: dict[str, object] = {
    "--model": "tiny",
    "--precision": "fp32",
    "--device": "cpu",
    "--workers": 0,
    "--batch-size": BATCH,
    "--dataset-type": "webdataset",
    "--aug-cfg": "scale=(1.0,1.0)",
    "--warmup": 0,
    "--lr-scheduler": "const",
    "--log-every-n-steps": 1,
}


def write_shard(path: Path, number: int) -> None:
    """Writes a batch of the concepts of `tiny`."""
    concepts = list(itertools.product(tiny.COLOURS, tiny.SHAPES))
    samples = []
    for colour, shape in concepts[BATCH * number : BATCH * (number + 1)]:
        picture = tiny.picture(tiny.COLOURS[colour], shape)
        caption = f"a {colour} {shape}".encode()
        samples.append((f"{colour}-{shape}", {"png": picture, "txt": caption}))
    pairs.write(path, samples)


class Plan:
    """Runs by name. Each has a folder of logs of its own, unless `name` names a run to continue."""

    def __init__(self, folder: Path, ranks: int = 1) -> None:
        self.folder = folder
        self.ranks = ranks
        self.entries: dict[str, dict] = {}
        self.results: list[dict] = []

    def add(
        self,
        key: str,
        who: str,
        *argv: object,
        name: str | None = None,
        data: str = "one",
        epochs: int = 1,
        steps: int = STEPS,
        lr: str = "1e-3",
        command: Sequence[str] = (),
    ) -> None:
        """Adds a run. who: whose losses. argv: after the options below, command: before them."""
        # A batch holds all samples as whole pictures, so that open_clip's unseeded shuffling
        # changes no loss.
        shards, samples = DATA[data]
        options = OPTIONS | {
            "--train-data": self.folder / shards,
            "--train-num-samples": steps * samples,
            "--epochs": epochs,
            "--lr": lr,
            "--logs": self.folder / "logs",
            "--name": name or key,
        }
        words = [*command, *itertools.chain.from_iterable(options.items()), *argv]
        self.entries[key] = {"who": who, "argv": [str(word) for word in words]}

    def both(self, key: str, *argv: object, **options: Any) -> None:
        for who in ("theirs", "ours"):
            self.add(f"{key}-{who}", who, *argv, **options)

    def more(self, key: str, *argv: object, epochs: int = 2, **options: Any) -> None:
        """Adds a run of this library that continues the run `key`."""
        argv = (*argv, "--resume", "latest")
        self.add(f"{key}-more", "ours", *argv, name=key, epochs=epochs, **options)

    def run(self, plan: str) -> Plan:
        (self.folder / f"{plan}.json").write_text(json.dumps(self.entries))
        process = forked_ranks("open_clip_trainer.py", self.folder, plan, ranks=self.ranks)
        files = [self.folder / f"{plan}-{rank}.json" for rank in range(self.ranks)]
        assert all(file.exists() for file in files), process.stderr[-3000:]
        self.results = [json.loads(file.read_text()) for file in files]
        return self

    def __getitem__(self, key: str) -> dict:
        """Returns rank 0's result of a run, which must not have failed."""
        result = self.results[0][key]
        assert "error" not in result, (key, result["error"])
        return result

    def checkpoint(self, run: str, epoch: int = 1) -> dict:
        file = self.folder / "logs" / run / "checkpoints" / f"epoch_{epoch}.pt"
        return torch.load(file, map_location="cpu", weights_only=True)


def prepare(folder: Path) -> Path:
    """Writes shards and models."""
    for number in (0, 1):
        write_shard(folder / f"train-{number}.tar", number)
    write_models(folder)
    return folder


def teacher(folder: Path, name: str = "tiny") -> tuple:
    return "--distill-model", name, "--distill-pretrained", folder / f"{name}.bin"


def coca(folder: Path) -> tuple:
    return "--model", "tiny-coca", "--pretrained", folder / "tiny-coca.bin"
