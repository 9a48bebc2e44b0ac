"""Runs commands under torchrun, several in one start, or in one process, and writes down the output of each command.

rank_commands.py FOLDER PLAN        PLAN: a file with {name: arguments}; each rank writes FOLDER/said-RANK.json
"""

import json
import os
import sys
from pathlib import Path

import captioners
import open_clip
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from simplclip.commands.main import app


def said(folder: Path, plan: dict[str, list[str]]) -> dict[str, list]:
    """Runs commands in this folder. Returns by name their exit code and output, and the error of a failed command."""
    open_clip.add_model_config(folder.parent / f"{captioners.NAME}.json")
    before = os.getcwd()
    os.chdir(folder)
    try:
        results = {name: CliRunner().invoke(app, arguments) for name, arguments in plan.items()}
    finally:
        os.chdir(before)
    return {
        name: [result.exit_code, (result.stderr.splitlines() or [""])[-1] if result.exit_code else result.stdout]
        for name, result in results.items()
    }


def main(folder: Path, plan: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group()
    found = said(folder, json.loads(Path(plan).read_text()))
    (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
