"""The teacher called "builtin", which `simplclip.teacher` finds by an entry point."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simplclip.demo import heads, teacher


def load(path: str | os.PathLike) -> tuple[teacher.BuiltinTeacher, teacher.Transform, Callable]:
    """The teacher with the heads of a file, its transform and tokenizer. Raises the errors of `load_heads`."""
    return teacher.BuiltinTeacher(teacher.load_heads(path)), teacher.Transform(), teacher.tokenizer()


def prepare(files: list[str], heads_file: Path, **options: Any) -> str:
    """Train heads on `files` and save them, unless `heads_file` exists. Returns a line that describes it.

    If there are files named train*, only these are used. options: as for `heads.train`.
    """
    if heads_file.exists():
        return f"The built-in teacher uses the heads of {heads_file}"
    mine = [file for file in files if re.match(r"train\b|train[-_.\d]", Path(file).name)] or files
    trained, count = heads.train(mine, **options)
    teacher.save_heads(trained, heads_file)
    return f"Trained the built-in teacher's heads on {count} pairs of {len(mine)} shards: {heads_file}"
