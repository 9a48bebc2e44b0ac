"""Trains the runs of a plan under torchrun, several runs in one start, and writes down what each
rank did.

    training.py FOLDER PLAN

PLAN: {name: {"changes": [...], "resume": false, "fault": [kind, rank, step, place],
              "second": [folder, changes]}}

Each rank takes its part of the batches of one loader, so that a step of all ranks has the pairs of
a step of one process. The fault, "not finite" or a signal, happens to this rank in this step, or at
the place "evaluation" in the evaluation after it. Each rank writes the results of `observed` by
name to FOLDER/PLAN-RANK.json. "second": the second rank runs in this folder, as on a node of its
own, with these further changes.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from simplclip import data
from simplclip.models.crop import TextCrop
from simplclip.train import evaluate, log, loop
from simplclip.train.config import Config
from simplclip.train.config import load as load_config


def meet_fault(kind: str, state: Any) -> None:
    if kind == "not finite":
        state.model.logit_scale.data.fill_(float("nan"))
    else:
        os.kill(os.getpid(), getattr(signal, kind))


class Parts:
    """A rank's parts of a loader's batches, which are `ranks` times as large."""

    def __init__(self, rank: int, ranks: int, batch_size: int, **options: Any) -> None:
        self.rank = rank
        self.size = batch_size
        self.loader = Loader(rank=0, world_size=1, batch_size=ranks * batch_size, **options)

    def __iter__(self) -> Iterator[dict]:
        rows = slice(self.rank * self.size, (self.rank + 1) * self.size)
        for batch in self.loader:
            yield {name: value[rows] for name, value in batch.items()}

    def state_dict(self) -> dict:
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        return self.loader.state_dict() | {"rank": self.rank, "world_size": world_size}

    def load_state_dict(self, state: dict) -> None:
        self.loader.load_state_dict(state | {"rank": 0, "world_size": 1})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


Loader, write_curves = data.Loader, log.write_curves


def observed(config: Config, fault: list | None = None, **options: Any) -> dict:
    """Runs a config; returns groups, sizes of texts' micro-batches, weights, seed and error."""
    rank = int(os.environ.get("RANK", 0))
    groups: list[list[int]] = []
    text_counts: list[list[int]] = []
    last_state: list[Any] = []
    error = None
    train_step, split = loop.train_step, TextCrop.split
    features = evaluate._Encoder.features

    def recording_split(crop: TextCrop, text: Tensor, tokens: int) -> list[Tensor]:
        crop.multiple = 1  # at a multiple of 8 all captions would have the same length
        rows = split(crop, text, tokens * 2 // (2 + rank))  # simulates longer texts on later ranks
        text_counts.append([len(part) for part in rows])
        return rows

    def recording_step(state: Any, batches: list[dict]) -> Any:
        if fault and fault[1:] == [rank, state.step + 1, "step"]:
            meet_fault(fault[0], state)
        groups.append(torch.cat([batch["group"] for batch in batches]).tolist())
        last_state[:] = [state]
        return train_step(state, batches)

    def recording_features(towers: Any, *inputs: Any) -> Tensor:
        state = last_state[0]
        if fault and fault[1:] == [rank, state.step, "evaluation"]:
            meet_fault(fault[0], state)
        return features(towers, *inputs)

    def parts(shards: Any, *, rank: int, world_size: int, **options: Any) -> Parts:
        return Parts(rank, world_size, shards=shards, **options)

    loop.train_step = recording_step
    log.write_curves = lambda out: None
    TextCrop.split = recording_split
    evaluate._Encoder.features = recording_features
    loop.data.Loader = parts
    try:
        with open(f"{config.run.out}-{rank}.txt", "w") as text:
            loop.run(config, console=Console(file=text, width=200), **options)
    except (Exception, SystemExit) as failed:
        error = f"{type(failed).__name__}: {failed}"
    finally:
        loop.train_step = train_step
        log.write_curves = write_curves
        TextCrop.split = split
        evaluate._Encoder.features = features
        loop.data.Loader = Loader
    weights = []
    if last_state:
        weights = [p.detach().sum().item() for p in last_state[0].model.parameters()]
    return {
        "groups": groups,
        "cut": text_counts,
        "weights": weights,
        "error": error,
        "seed": torch.initial_seed(),
    }


def main(folder: Path, plan: str) -> None:
    torch.set_num_threads(1)
    entries = json.loads((folder / f"{plan}.json").read_text())
    dist.init_process_group("gloo")  # torchrun's store serves only one process group in a process
    results = {}
    for name, entry in entries.items():
        place, changes = entry.get("second", (".", [])) if os.environ["RANK"] == "1" else (".", [])
        with contextlib.chdir(folder / place):
            config = load_config(folder / "config.yaml", [*entry["changes"], *changes])
            resume = entry.get("resume", False)
            results[name] = observed(config, entry.get("fault"), resume=resume)
    (folder / f"{plan}-{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
