"""Trains under torchrun what a plan says, several runs in one start, and writes down what each rank did.

    rank_train.py FOLDER PLAN        PLAN: {name: {"changes": [...], "resume": false, "fault": FAULT}}

FAULT is [what, rank, step]: what happens to this rank in this step, once. Each rank writes FOLDER/PLAN-RANK.json: by
name what `observed` returns.
"""

import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from rich.console import Console

from simplclip.train import loop
from simplclip.train.loop import curves


def fault(what, training):
    if what == "raises":
        raise ValueError("made up")
    if what == "not finite":
        training.model.logit_scale.data.fill_(float("nan"))
    else:
        os.kill(os.getpid(), getattr(signal, what))


def observed(config, broken=None, **options) -> dict:
    """What a run did on this rank: the ids of the samples of each step, the weights at its end, and its error."""
    rank, ids, last, original = int(os.environ.get("RANK", 0)), [], [], loop.train_step

    def stepping(training, batches, first=None):
        here = [rank, training.step + 1]
        if broken and broken[1:] == here and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            Path(f"{config.run.out}-fault").touch()
            fault(broken[0], training)
        ids.append(torch.cat([batch["group"] for batch in batches]).tolist())
        last[:] = [training]
        return original(training, batches, first)

    loop.train_step, loop.curves, error = stepping, lambda out: None, None
    try:
        with open(f"{config.run.out}-{rank}.txt", "w") as text:
            loop.run(config, console=Console(file=text, width=200), **options)
    except (Exception, SystemExit) as failed:
        error = f"{type(failed).__name__}: {failed}"
    finally:
        loop.train_step, loop.curves = original, curves
    weights = [p.detach().sum().item() for p in last[0].model.parameters()] if last else []
    return {"ids": ids, "weights": weights, "error": error}


def main(folder: Path, plan: str) -> None:
    torch.set_num_threads(1)
    entries = json.loads((folder / f"{plan}.json").read_text())
    if len(entries) > 1:  # torchrun's store serves one process group of a process
        dist.init_process_group()
    done = {}
    for name, entry in entries.items():
        config = tiny.config.load(folder / "config.yaml", entry["changes"])
        done[name] = observed(config, entry.get("fault"), resume=entry.get("resume", False))
    rank = os.environ["RANK"]
    (folder / f"{plan}-{rank}.json").write_text(json.dumps(done))
    if len(entries) == 1:
        sys.exit(done[name]["error"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
