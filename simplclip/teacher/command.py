"""`simplclip teacher`: loads a teacher, trains missing heads of the built-in one, writes its features and measures it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simplclip.common import hardware, plugins
from simplclip.common.errors import InputError
from simplclip.data.shards import Shards, expand
from simplclip.teacher import features, teachers


def run(
    shards: Shards,
    out: str | os.PathLike,
    *,
    name: str = teachers.BUILTIN,
    checkpoint: str | os.PathLike | None = None,
    heads_file: str | os.PathLike | None = None,
    splits: Mapping[str, str] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a teacher's features of `shards` to `out`; returns the summary of `features.write` with "teacher" and "figures".

    heads_file: heads of the built-in teacher, by default OUT.heads.safetensors. If it does not exist, heads are first trained
    and saved there: on the shards named train* if there are any, else on all shards.
    splits: name -> shards on which the teacher's retrieval is measured.
    """
    files = expand(shards)
    for split in (splits or {}).values():
        expand(split)
    place = hardware.pick_device(device)
    precision, _ = hardware.pick_precision(precision, place)
    hardware.set_threads(None)
    if name != teachers.BUILTIN and heads_file is not None:
        raise InputError(f"heads: expected none, since the teacher {name!r} has no heads, got {str(heads_file)!r}")
    if name == teachers.BUILTIN:
        if checkpoint is not None:
            raise InputError(f"checkpoint: expected heads instead for the built-in teacher, got {str(checkpoint)!r}")
        checkpoint = Path(heads_file) if heads_file else Path(out).with_name(Path(out).name + ".heads.safetensors")
        prepare = plugins.load("teachers", name).prepare
        note = prepare(files, checkpoint, seed=seed, device=place, precision=precision, progress=progress)
    teacher = teachers.load(name, checkpoint, device=place, precision=precision)
    if name == teachers.BUILTIN:
        _say(progress, note)
    summary = features.write(files, out, teacher, batch_size=batch_size, progress=progress)
    _say(progress, f"wrote {summary['path']}: {summary['samples']} samples with features of {name}, width {teacher.width}")
    figures = features.evaluate(teacher, splits or {}, batch_size=batch_size)
    for split, directions in figures.items():
        shown = (f"{direction.replace('_', ' ')} R@1 {found['R@1']['value']:.1%}" for direction, found in directions.items())
        _say(progress, f"{split}: {', '.join(shown)}")
    return summary | {"teacher": teacher.stamp(), "figures": figures}


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line)
