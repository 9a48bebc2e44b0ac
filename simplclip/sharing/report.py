"""`simplclip share`: measures the towers of a model on data, and writes tables, share.json and share.png."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.common.files import write_atomically
from simplclip.common.progress import Progress
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.loader import EmptyEpochError
from simplclip.data.pool import cores
from simplclip.data.stream import Source, Stream
from simplclip.encoder import Encoder, load
from simplclip.evaluation import source
from simplclip.models.registry import text_pool
from simplclip.models.simplify import block_sites
from simplclip.sharing.groups import Proposal, Sizes, parse_budget, propose, sizes
from simplclip.sharing.likeness import Likeness, measure
from simplclip.sharing.picture import heat_map

TOWERS = ("text", "image", "both")
KEY = "model.options.simplify_options.share"


def run(
    model: str | os.PathLike | Encoder,
    data: Any,
    *,
    checkpoint: str | os.PathLike | None = None,
    tower: str = "both",
    samples: int = 256,
    budget: str | int | None = None,
    out: str | os.PathLike = "share",
    batch_size: int = 8,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    console: Console | None = None,
) -> dict[str, Any]:
    """Compare the blocks of a pretrained model, and propose which of them may share weights when they are simplified.

    Prints a table of neighbouring blocks, writes OUT/share.json and OUT/share.png with all pairs, and returns the JSON's
    content. See `Likeness` for the measures, `propose` for the proposals.

    Args:
        model, checkpoint: as for `simplclip.load`, or an encoder. Its blocks may be simplified.
        data: what `evaluation.source` takes; of each sample the image and the first caption.
        tower: "text", "image" or "both", which leaves out a tower without two blocks that `simplify` knows.
        samples: the first ones of the data.
        budget: parameters of each tower, in the forms of `parse_budget`; percentages are of the tower as it is. None:
            no proposals.
        batch_size: samples at a time.
        workers: processes that decode images; by default one for each core, at most 8.

    Raises: InputError, also if the budget cannot be reached or the data have no captions for the text tower; the errors of
    `simplclip.load` and of `data.stream.Stream.batches`.
    """
    if tower not in TOWERS:
        raise InputError(f"tower: expected one of {TOWERS}, got {tower!r}")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    console = console or Console()
    what = source(data, captions=1)
    encoder = model if isinstance(model, Encoder) else load(model, checkpoint, device=device, precision=precision)
    plans, skipped = {}, Skipped()
    for name in ("image", "text") if tower == "both" else (tower,):
        reason = _unfit(encoder, name)
        if reason is None:
            size = sizes(encoder.model, name)
            plans[name] = size, None if budget is None else parse_budget(budget, size.now)
        elif tower == name:
            raise InputError(reason)
        else:
            console.print(f"{name} tower left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    if not plans:
        raise InputError(f"model: expected a tower with blocks to compare, got {encoder.source or encoder.name} without")
    if isinstance(budget, (int, str)) and len(plans) > 1 and "%" not in str(budget):
        raise InputError(f"budget: expected a percentage for two towers, or --tower with a number, got {budget!r}")

    workers = min(8, cores()) if workers is None else workers
    found = {}
    for name in plans:
        inputs = _images if name == "image" else _texts
        with Progress(f"{name} tower", samples) as progress:
            batches = _counted(inputs(encoder, what, samples, batch_size, workers, skipped), progress)
            found[name] = measure(encoder.model, name, batches, lambda x, name=name: encoder.features(name, x))
    folder = Path(out)
    about = {"model": encoder.source or encoder.name, "data": str(data), "unit": "nats", "towers": {}}
    for name, likeness in found.items():
        size, limit = plans[name]
        proposals = None if limit is None else propose(likeness, size, limit)
        about["towers"][name] = _record(likeness, size, limit, proposals)
        _print(console, likeness, size, limit, proposals)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "share.json"
    write_atomically(file, json.dumps(about, indent=2) + "\n")
    picture = heat_map(folder / "share.png", list(found.values()), f"How alike the blocks of {about['model']} are")
    note = f"; {skipped}" if skipped.counts else ""
    console.print(f"wrote {file} and {picture}{note}", markup=False, highlight=False, soft_wrap=True)
    return about


def _unfit(encoder: Encoder, tower: str) -> str | None:
    """Why the blocks of a tower cannot be compared, or None."""
    try:
        count = len(block_sites(encoder.model, tower))
    except (InputError, AttributeError) as error:
        return str(error)
    return None if count > 1 else f"{tower}: expected at least two blocks to compare, got {count}"


def _images(
    encoder: Encoder, what: Source, samples: int, size: int, workers: int, skipped: Skipped
) -> Iterator[tuple[Tensor, None]]:
    left = samples
    for images, _, _ in Stream(what, encoder.preprocess, size).batches(skipped, workers):
        images = images[:left]
        left -= len(images)
        if images.dtype == torch.uint8:
            images = encoder.preprocess.finish(images.to(encoder.device, non_blocking=True))
        yield images, None
        if not left:
            return


def _texts(
    encoder: Encoder, what: Source, samples: int, size: int, workers: int, skipped: Skipped
) -> Iterator[tuple[Tensor, Tensor | None]]:
    captions = itertools.islice(_captions(what, skipped), samples)
    found = False
    while part := list(itertools.islice(captions, size)):
        tokens = encoder.tokenizer(part)
        pools = text_pool(encoder.model) or "argmax"
        # Of these towers, the end of the text has the highest id, and the tokens behind it are padding.
        yield tokens, tokens.argmax(1) + 1 if pools == "argmax" else None
        found = True
    if not found:
        raise EmptyEpochError(f"{what} has no usable caption; {skipped}")


def _captions(what: Source, skipped: Skipped) -> Iterator[str]:
    for item in what.items(skipped):
        try:
            captions = what.open(item).captions
        except BrokenSample as broken:
            skipped.add(broken.args[0], what.place(item), broken.args[1])
            continue
        if captions:
            yield captions[0]
        else:
            skipped.add("missing caption", what.place(item))


def _counted(batches: Iterator[tuple[Tensor, Any]], progress: Progress) -> Iterator[tuple[Tensor, Any]]:
    for batch in batches:
        yield batch
        progress.update(len(batch[0]))


def _record(likeness: Likeness, size: Sizes, limit: int | None, proposals: list[Proposal] | None) -> dict[str, Any]:
    def rows(values: Tensor) -> list[list[float | None]]:
        return [[None if math.isnan(v) else round(v, 6) for v in line] for line in values.tolist()]

    unshared = size.total("all", [[i] for i in range(len(likeness.paths))])
    found = {
        "blocks": likeness.paths,
        "samples": likeness.samples,
        "attention_divergence": rows(likeness.attention),
        "update_cosine": rows(likeness.updates),
        "output_cosine": rows(likeness.outputs),
        "parameters": {"now": size.now, "simplified": unshared},
    }
    if proposals is None:
        return found
    shown = [
        {"what": p.what, "share": p.share(likeness.tower), "parameters": p.parameters, "fits": p.fits} for p in proposals
    ]
    return found | {"budget": limit, "proposals": shown}


def _print(console: Console, likeness: Likeness, size: Sizes, limit: int | None, proposals: list[Proposal] | None) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    title = f"{likeness.tower}: {len(likeness.paths)} blocks, {likeness.samples} samples"
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for name in ("blocks", "attention JSD (nats)", "cosine of updates", "cosine of outputs"):
        table.add_column(name, justify="left" if name == "blocks" else "right", no_wrap=True)
    for i in range(len(likeness.paths) - 1):
        values = (likeness.attention, likeness.updates, likeness.outputs)
        table.add_row(f"{i}, {i + 1}", *(f"{t[i, i + 1]:.4f}" for t in values))
    console.print(table)
    if proposals is None:
        return
    simplified = size.total("all", [[i] for i in range(len(likeness.paths))])
    say(f"{size.now:,} parameters; {simplified:,} with simplified blocks; budget {limit:,}")
    if simplified <= limit:
        say("within the budget without sharing")
        return
    for proposal in proposals:
        if not proposal.fits:
            say(f"{proposal.what}: at least {proposal.parameters:,} parameters, which is above the budget")
            continue
        share = yaml.safe_dump(proposal.share(likeness.tower), default_flow_style=True, width=10**6).strip()
        say(f"{proposal.what}: {proposal.parameters:,} parameters\n  {KEY}={share}")
