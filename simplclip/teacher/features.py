"""`simplclip teacher`: writes a teacher's features into shards, and measures its retrieval."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simplclip import evaluation
from simplclip.common import hardware, plugins
from simplclip.common.errors import InputError
from simplclip.data.rewrite import rewrite
from simplclip.data.shards import TEACHER, Opened, Shards, expand
from simplclip.encoder import BUILTIN, Encoder, load


def write(
    shards: Shards, out: str | os.PathLike, teacher: Encoder, *, batch_size: int = 64, progress: bool = True
) -> dict[str, Any]:
    """Write `shards` to the folder `out` with a teacher.npy in each sample, and the teacher in meta.json.

    teacher.npy is float16 [1 + C, D̂] with normalised rows: the image's features, then those of its C captions in the order of
    `shards.captions_of`. See `data.rewrite.rewrite` for errors, continuation after a crash and the returned dict.

    batch_size: number of samples, and of captions, encoded at a time.
    """

    def process(samples: list[Opened]) -> list[dict[str, bytes]]:
        images = teacher.encode_image([sample.image for sample in samples], batch_size).half().cpu().numpy()
        captions = [caption for sample in samples for caption in sample.captions]
        texts = teacher.encode_text(captions, batch_size).half().cpu().numpy()
        ends = np.cumsum([len(sample.captions) for sample in samples])[:-1]
        return [
            {TEACHER: _npy(np.concatenate([image[None], rows]))}
            for image, rows in zip(images, np.split(texts, ends), strict=True)
        ]

    return rewrite(
        shards, out, process, stamp={"teacher": teacher.stamp()}, batch_size=batch_size, progress=progress, title="teacher"
    )


def _npy(rows: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, rows, allow_pickle=False)
    return file.getvalue()


def evaluate(
    teacher: Encoder, splits: Mapping[str, str | list[str]], *, batch_size: int = 64
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Retrieval of a teacher on splits (name -> shards): the results of `evaluation.metrics.retrieval` by name."""
    figures = {}
    for name, shards in splits.items():
        split = evaluation.Split(evaluation.source(shards), teacher.tokenizer, teacher.preprocess)
        evaluation.encode(teacher.model, split, batch_size, teacher.device, teacher.precision, who=teacher.name)
        figures[name] = evaluation.retrieval(split, teacher.device) or {}
    return figures


def run(
    shards: Shards,
    out: str | os.PathLike,
    *,
    name: str = BUILTIN,
    checkpoint: str | os.PathLike | None = None,
    heads_file: str | os.PathLike | None = None,
    splits: Mapping[str, str] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a teacher's features of `shards` to `out`; returns the summary of `write` with "teacher" and "figures".

    heads_file: heads of the built-in teacher, by default OUT.heads.safetensors. If it does not exist, heads are first trained
    and saved there: on the shards named train* if there are any, else on all shards.
    splits: name -> shards on which the teacher's retrieval is measured.
    """
    files = expand(shards)
    for split in (splits or {}).values():
        evaluation.source(split)  # raises its error before the work
    place = hardware.pick_device(device)
    precision, _ = hardware.pick_precision(precision, place)
    hardware.set_threads(None)
    say = print if progress else lambda line: None
    if name == BUILTIN:
        if checkpoint is not None:
            raise InputError(f"checkpoint: expected heads instead for the built-in teacher, got {str(checkpoint)!r}")
        checkpoint = Path(heads_file) if heads_file else Path(out).with_name(Path(out).name + ".heads.safetensors")
        prepare = plugins.load("teachers", name).prepare
        note = prepare(files, checkpoint, seed=seed, device=place, precision=precision, progress=progress)
    elif heads_file is not None:
        raise InputError(f"heads: expected none, since the teacher {name!r} has no heads, got {str(heads_file)!r}")
    teacher = load(name, checkpoint, device=place, precision=precision)
    if name == BUILTIN:
        say(note)
    summary = write(files, out, teacher, batch_size=batch_size, progress=progress)
    say(f"wrote {summary['path']}: {summary['samples']} samples with features of {name}, width {teacher.width}")
    figures = evaluate(teacher, splits or {}, batch_size=batch_size)
    for split, directions in figures.items():
        shown = (f"{direction.replace('_', ' ')} R@1 {found['R@1']['value']:.1%}" for direction, found in directions.items())
        say(f"{split}: {', '.join(shown)}")
    return summary | {"teacher": teacher.stamp(), "figures": figures}
