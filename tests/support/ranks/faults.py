"""Runs the command line on a rank that may meet a fault, or that stands for a node of its own.

faults.py FAULTS WORDS...    FAULTS: JSON, list of [attempt of torchrun, rank, step, signal]
faults.py node WORDS...      each rank is alone on its node; those after the first start in an
                                 empty folder
"""

import json
import os
import signal
import sys
import tempfile
from typing import Any

import torch

from simplclip.commands.main import main
from simplclip.train import loop

RANK = int(os.environ["RANK"])
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
train_step = loop.train_step


def faulty_step(state: Any, batches: Any) -> Any:
    for attempt, rank, step, name in json.loads(sys.argv[1]):
        if (attempt, rank, step) == (ATTEMPT, RANK, state.step + 1):
            os.kill(os.getpid(), getattr(signal, name))
    return train_step(state, batches)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # by which torch knows torchrun's processes, also those of forked_ranks
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    if sys.argv[1] == "node":
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(RANK)}
        if RANK:
            os.chdir(tempfile.mkdtemp(dir="."))
    else:
        loop.train_step = faulty_step
    main(sys.argv[2:])
