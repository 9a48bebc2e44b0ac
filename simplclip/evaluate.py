"""`simplclip evaluate`: evaluates a checkpoint on named splits; writes a table, evaluation.json and contact sheets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import simplclip
from simplclip import data, models
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.common.files import locked, write_atomically
from simplclip.evaluation import KS, contact_sheet, encode, load_splits, retrieval, zero_shot
from simplclip.train.state import load_model


def run(
    checkpoint: str | Path,
    splits: Mapping[str, str | list[str]] | None = None,
    *,
    out: str | Path | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    skip_missing: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate `checkpoint` on `splits` (name -> shards; None: eval.splits of its config).

    Writes OUT/evaluation.json and OUT/evaluation-<split>.png (out=None: the checkpoint's folder), prints a table and returns
    the content of the JSON. Splits that were evaluated earlier stay in the JSON, each with the checkpoint, model, step and
    precision of its evaluation. skip_missing: skip splits whose shards do not exist, with a note; if no split is left, the
    JSON is not written.
    Raises: FileNotFoundError, CheckpointError (not a checkpoint, or of another architecture), ValueError (also if
    evaluation.json is another file).
    """
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    place = hardware.pick_device(device)
    precision, _ = hardware.pick_precision(precision, place)
    model, config, state = load_model(checkpoint, place)
    hardware.set_threads(config.run.threads)
    folder = Path(out) if out else (Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent)
    splits = dict(splits or config.eval.splits)
    if not splits:
        raise InputError(
            "data: expected at least one split (--data name=shards), got none, and the checkpoint's config has no eval.splits"
        )
    for name, shards in [*splits.items()] if skip_missing else ():
        try:
            data.expand(shards)
        except ValueError as error:
            say(f"skipped {name}: {error}")
            del splits[name]
    loaded = load_splits(splits, config.model.name, config.model.image_size)

    file = folder / "evaluation.json"
    _earlier(file)  # raises its error before the work
    folder.mkdir(parents=True, exist_ok=True)
    results, tokenizer = {}, models.tokenizer(config.model.name)
    made_by = {"checkpoint": str(checkpoint), "model": config.model.name, "step": state["step"], "precision": precision}
    for name, split in loaded.items():
        encode(model, split, batch_size or config.eval.batch_size, place, precision)
        classes = zero_shot(model, split, tokenizer, templates or config.eval.templates, place, precision)
        say(f"{name}: {split.data.report()}")
        sheet, figures = folder / f"evaluation-{name}.png", retrieval(split)
        among = {"text_to_image": len(split.data), "image_to_text": len(split.captions)}
        lines = tuple(_in_words(figures[direction], number) for direction, number in among.items())
        contact_sheet(sheet, split, f"{config.model.name}, step {state['step']}: {name}", lines)
        results[name] = {"images": len(split.data.images), "texts": len(split.captions), **figures}
        results[name] |= {"zero_shot": classes, "contact_sheet": str(sheet), **made_by}
    versions = {"simplclip": simplclip.__version__, "torch": torch.__version__}
    answer = {**made_by, "versions": versions, "splits": results}
    if not results:
        say(f"nothing was evaluated; {file} is not written")
        return answer
    with locked(folder):
        whole = {**answer, "splits": _earlier(file) | results}
        write_atomically(file, json.dumps(whole, indent=2) + "\n")
    console.print(table(answer))
    for path in [file, *(r["contact_sheet"] for r in results.values())]:
        say(f"wrote {path}")
    return answer


def _earlier(file: Path) -> dict[str, Any]:
    """The splits of an evaluation.json, each with its checkpoint, model, step and precision. Raises InputError."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
        shared = {key: found[key] for key in ("checkpoint", "model", "step", "precision")}
        return {name: shared | split for name, split in found["splits"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InputError(
            f"out: expected no evaluation.json, or one to add splits to, got {file}, which is another file: move it"
        ) from None


def table(results: Mapping[str, Any]) -> Table:
    """The figures of `run` in per cent with their chance, for a terminal of 80 columns."""
    shown = Table(title=f"{results['model']}, step {results['step']}", caption="share found among the first k (chance)")
    for name in ("split", "among"):
        shown.add_column(name, no_wrap=True)
    for k in KS:
        shown.add_column(f"@{k}", justify="right", no_wrap=True)
    for name, result in results["splits"].items():
        for direction, among in (("image_to_text", "texts"), ("text_to_image", "images")):
            shown.add_row(name, f"{result[among]} {among}", *(_cell(result[direction][f"R@{k}"]) for k in KS))
        if classes := result["zero_shot"]:
            task = f"{len(classes['classes'])} classes"
            shown.add_row(name, task, _cell(classes["top1"]), _cell(classes["top5"]), "")
        shown.add_section()
    return shown


def _cell(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.1%} [dim]({figure['chance']:.1%})[/dim]"


def _in_words(figures: Mapping[str, Mapping[str, float]], among: int) -> str:
    found = "   ".join(f"{k} {v['value']:.1%}" for k, v in figures.items())
    chance = ", ".join(f"{100 * v['chance']:.1f}" for v in figures.values())
    return f"{found}   of {among} (chance {chance}%)"
