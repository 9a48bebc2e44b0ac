"""Runs open_clip's trainer several times in one process, with its own losses and with ours, and
writes down what they did.

    python open_clip_trainer.py FOLDER PLAN        PLAN: {name: {"who": WHO, "argv": [...]}}

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

import open_clip_train.data
import open_clip_train.main
import torch

import simplclip.integrations.open_clip_train
from simplclip.integrations.open_clip import use_losses
from support.models.open_clip_models import register_models


class Recorder:
    def __init__(self):
        self.steps, self.loss = [], None

    def __call__(self, module, inputs, output):
        if isinstance(output, dict) and "contrastive_loss" in output:
            self.loss = module
            self.steps.append({name: value.item() for name, value in output.items()})


def names() -> tuple:
    trainer, data = open_clip_train.main, open_clip_train.data
    # the names in open_clip 4 and in 3.3
    maker = getattr(trainer, "create_task", None) or trainer.create_loss
    return maker, trainer.create_model_and_transforms, trainer.parse_args, data.tar_file_expander


def run(entry: dict, meeting: Path) -> dict:
    recorder, argv = Recorder(), entry["argv"]
    # torchrun's store serves one process group of a process, a file serves each of them
    if "RANK" in os.environ:
        argv = [
            *argv,
            "--dist-url",
            f"file://{meeting}?rank={os.environ['RANK']}&world_size={os.environ['WORLD_SIZE']}",
        ]
    handle = torch.nn.modules.module.register_module_forward_hook(recorder)
    wrap = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda module, device_ids=None, **options: wrap(
        module, **options
    )
    try:
        before = names()
        with contextlib.ExitStack() as stack:
            if entry["who"] != "ours":
                stack.enter_context(
                    simplclip.integrations.open_clip_train._shards_of_webdataset_1()
                )
            if entry["who"] == "used":
                stack.enter_context(use_losses())
            main = (
                simplclip.integrations.open_clip_train
                if entry["who"] == "ours"
                else open_clip_train.main
            ).main
            returned = main(argv)
        assert names() == before, "main left its replacements behind"
        parameters = {name: p.tolist() for name, p in recorder.loss.named_parameters()}
        kind = type(recorder.loss)
        loss = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
        return {
            "steps": recorder.steps,
            "parameters": parameters,
            "returned": returned,
            "loss": loss,
        }
    except (Exception, SystemExit) as error:  # the error or exit is the result of a run
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        handle.remove()
        torch.nn.parallel.DistributedDataParallel = wrap
        logging.root.handlers.clear()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def main(folder: Path, plan: str) -> None:
    torch.set_num_threads(1)
    register_models(folder)
    entries = json.loads((folder / f"{plan}.json").read_text())
    results = {
        name: run(entry, folder / f"{plan}-{name}.meeting") for name, entry in entries.items()
    }
    rank = os.environ.get("RANK", "0")
    (folder / f"{plan}-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
