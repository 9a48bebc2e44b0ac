"""Trains the runs of a plan under torchrun, several runs in one start, and writes down what each rank did.

    rank_train.py FOLDER PLAN        PLAN: {name: {"changes": [...], "resume": false, "fault": FAULT}}

FAULT is [what, rank, step]: what happens to this rank in this step, once; or ["kills", n]: in each of n attempts chance picks
a rank and a moment for a kill. Each rank writes the results of `observed` by name to FOLDER/PLAN-RANK.json and, during a run,
the attempt, step and ids of each step to OUT-RANK.jsonl.
"""

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch.nn import SyncBatchNorm

from simplclip import memory
from simplclip.models.crop import TextCrop
from simplclip.ops import distributed
from simplclip.train import loop, together
from simplclip.train.loop import curves

ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def fault(what, training):
    if what == "raises":
        raise ValueError("made up")
    if what == "not finite":
        training.model.logit_scale.data.fill_(float("nan"))
    else:
        os.kill(os.getpid(), getattr(signal, what))


def killed(attempts, rank, steps):
    """Kills this process if chance picks its rank and step. steps: number of steps that this attempt has begun."""
    rng = random.Random(ATTEMPT)
    victim, after, seconds = rng.randrange(int(os.environ["WORLD_SIZE"])), rng.randint(1, 5), rng.uniform(0, 0.2)
    if attempts > ATTEMPT and (rank, steps) == (victim, after):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def observed(config, broken=None, **options) -> dict:
    """Runs a config, and returns for this rank: the ids of the samples of each step, the numbers of texts in micro-batches,
    the weights at the end, and the error."""
    rank, ids, last, original = int(os.environ.get("RANK", 0)), [], [], loop.train_step
    cut, split = [], TextCrop.split

    def splitting(crop, text, tokens):
        crop.multiple = 1  # at a multiple of 8 all captions would have the same length
        rows = split(crop, text, tokens * 2 // (2 + rank))  # simulates longer texts on later ranks
        cut.append([len(some) for some in rows])
        return rows

    def stepping(training, batches, first=None):
        here = [rank, training.step + 1]
        if broken and broken[1:] == here and ATTEMPT == 0:
            Path(f"{config.run.out}-fault").touch()
            fault(broken[0], training)
        ids.append(torch.cat([batch["group"] for batch in batches]).tolist())
        with open(f"{config.run.out}-{rank}.jsonl", "a") as lines:
            lines.write(json.dumps([ATTEMPT, training.step, ids[-1]]) + "\n")
        if broken and broken[0] == "kills":
            killed(broken[1], rank, len(ids))
        last[:] = [training]
        return original(training, batches, first)

    loop.train_step, loop.curves, TextCrop.split, error = stepping, lambda out: None, splitting, None
    try:
        with open(f"{config.run.out}-{rank}.txt", "w") as text:
            loop.run(config, console=Console(file=text, width=200), planner=memory, **options)
    except (Exception, SystemExit) as failed:
        error = f"{type(failed).__name__}: {failed}"
    finally:
        loop.train_step, loop.curves, TextCrop.split = original, curves, split
    weights = [p.detach().sum().item() for p in last[0].model.parameters()] if last else []
    return {"ids": ids, "cut": cut, "weights": weights, "error": error}


def of_all_ranks(norm, x):
    """Computes SyncBatchNorm as on cards; torch has no SyncBatchNorm for CPUs."""
    whole = distributed.gather(x, dist.group.WORLD)
    norm.num_batches_tracked.add_(1)
    statistics = norm.running_mean, norm.running_var
    found = F.batch_norm(whole, *statistics, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    return found.chunk(dist.get_world_size())[dist.get_rank()].clone()


def main(folder: Path, plan: str) -> None:
    torch.set_num_threads(1)
    SyncBatchNorm.forward, together.SYNCHRONISED = of_all_ranks, ("cpu",)
    entries = json.loads((folder / f"{plan}.json").read_text())
    if len(entries) > 1:  # torchrun's store serves only one process group in a process
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
