"""Runs open_clip's trainer several times in one process, with its own losses and with ours.

    open_clip_trainer.py FOLDER PLAN        PLAN: {name: {"who": WHO, "argv": [...]}}

WHO is "theirs" for open_clip's trainer, "ours" for simplclip-open-clip, and "used" for open_clip's
trainer under use_losses.

open_clip's trainer lacks two things here. It gives DistributedDataParallel device_ids, which torch
refuses for modules on a CPU; this file mends that for all. It reads shards by webdataset 0.2.86
only, which "ours" mends itself.

Each rank writes FOLDER/PLAN-RANK.json: by run the losses of each step, and the loss's parameters at
the end, or the error.
"""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import open_clip_train.data
import open_clip_train.main
import torch
from torch import nn

from simplclip.integrations import open_clip_train as ours
from simplclip.integrations.open_clip import use_losses
from support.models.open_clip_models import register_models


class Recorder:
    """A hook of modules that keeps the loss, and its values in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.loss: nn.Module | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, dict) and "contrastive_loss" in output:
            self.loss = module
            self.steps.append({name: value.item() for name, value in output.items()})


def replaceable() -> tuple:
    """Returns the functions that simplclip-open-clip replaces while it runs."""
    trainer, data = open_clip_train.main, open_clip_train.data
    # the names in open_clip 4 and in 3.3
    maker = getattr(trainer, "create_task", None) or trainer.create_loss
    return maker, trainer.create_model_and_transforms, trainer.parse_args, data.tar_file_expander


def run(entry: dict, meeting: Path) -> dict:
    """Runs an entry of a plan. meeting: a file by which ranks find each other."""
    recorder, argv = Recorder(), entry["argv"]
    # torchrun's store serves one process group of a process, a file serves each of them
    if "RANK" in os.environ:
        ranks = f"rank={os.environ['RANK']}&world_size={os.environ['WORLD_SIZE']}"
        argv = [*argv, "--dist-url", f"file://{meeting}?{ranks}"]
    handle = nn.modules.module.register_module_forward_hook(recorder)
    wrap = nn.parallel.DistributedDataParallel

    def wrapped(module: nn.Module, device_ids: Any = None, **options: Any) -> nn.Module:
        return wrap(module, **options)

    nn.parallel.DistributedDataParallel = wrapped
    try:
        before = replaceable()
        with contextlib.ExitStack() as stack:
            if entry["who"] == "ours":
                main = ours.main
            else:
                main = open_clip_train.main.main
                stack.enter_context(ours._shards_of_webdataset_1())
            if entry["who"] == "used":
                stack.enter_context(use_losses())
            returned = main(argv)
        assert replaceable() == before, "main left its replacements behind"
        parameters = {name: p.tolist() for name, p in recorder.loss.named_parameters()}
        kind = type(recorder.loss)
        loss = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        results = {"steps": recorder.steps, "parameters": parameters}
        return results | {"returned": returned, "loss": loss}
    except (Exception, SystemExit) as error:  # the error or exit is the result of a run
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        handle.remove()
        nn.parallel.DistributedDataParallel = wrap
        logging.root.handlers.clear()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def main(folder: Path, plan: str) -> None:
    torch.set_num_threads(1)
    register_models(folder)
    entries = json.loads((folder / f"{plan}.json").read_text())
    results = {}
    for name, entry in entries.items():
        results[name] = run(entry, folder / f"{plan}-{name}.meeting")
    rank = os.environ.get("RANK", "0")
    (folder / f"{plan}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
