"""Measures a tower of a model on data; prints a table, and writes share.json and share.png."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.common.files import write_atomically
from simplclip.common.plotting import new_figure, style, write
from simplclip.common.progress import Progress
from simplclip.data import HeldOut, held_out
from simplclip.data.broken import Skipped
from simplclip.evaluation.encoder import Encoder, load
from simplclip.models.registry import text_pool
from simplclip.models.simplify import block_sites, count_parameters
from simplclip.sharing.blocks import divergences, parse_budget, propose


def run(
    model: str | os.PathLike | Encoder,
    data: Any,
    *,
    tower: str = "text",
    samples: int = 256,
    budget: str | None = None,
    out: str | os.PathLike = "share",
    device: str = "auto",
) -> dict[str, Any]:
    """Print and write how alike the blocks of a tower are, and which of them may share weights; return what share.json has.

    Args:
        model: as for `simplclip.load`, or an encoder. Its blocks may be simplified.
        data: what `data.held_out` takes; of the first `samples` the image or the first caption.
        tower: "text" or "image".
        budget: parameters of the tower, as `parse_budget` takes them. None: no proposals.

    Raises: InputError; the errors of `simplclip.load` and of `data.HeldOut.batches`.
    """
    if tower not in ("text", "image"):
        raise InputError(f"tower: expected text or image, got {tower!r}")
    split = held_out(data, captions=1)
    encoder = model if isinstance(model, Encoder) else load(model, device=device)
    paths, size = [site.path for site in block_sites(encoder.model, tower)], count_parameters(encoder.model)[tower]
    limit = None if budget is None else parse_budget(budget, size)
    with Progress(f"{tower} tower", samples) as progress:
        batches = _batches(encoder, tower, split, samples, progress)
        found = divergences(encoder.model, tower, batches, lambda inputs: encoder.features(tower, inputs))
    rows = [[None if value != value else value for value in row] for row in found.tolist()]  # JSON has no NaN
    about = {"model": encoder.source or encoder.name, "data": str(data), "samples": progress.done, "tower": tower}
    about |= {"blocks": paths, "parameters": size, "attention_divergence": rows}
    about["proposals"] = [] if limit is None else propose(encoder.model, tower, found, limit)
    _print(about, found)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "share.json", json.dumps(about, indent=2) + "\n")
    _heat_map(folder / "share.png", found, f"{about['model']}, {tower}: divergence of attention maps (nats)")
    print(f"wrote {folder / 'share.json'} and {folder / 'share.png'}")
    return about


def _batches(
    encoder: Encoder, tower: str, split: HeldOut, samples: int, progress: Progress
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The inputs of a tower for the first samples, and how many of their first tokens count (None: all)."""
    pool = text_pool(encoder.model) or "argmax"
    for images, _, found in split.batches(encoder.preprocess, 8, Skipped()):
        left = samples - progress.done
        if tower == "image":
            inputs = images[:left]
            yield encoder.preprocess.finish(inputs.to(encoder.device)) if inputs.dtype == torch.uint8 else inputs, None
        elif captions := [sample.captions[0] for sample in found if sample.captions][:left]:
            inputs = encoder.tokenizer(captions)
            # Where a tower pools by argmax, the end of a text has the highest id, and the tokens behind it are padding.
            yield inputs, inputs.argmax(1) + 1 if pool == "argmax" else None
        else:
            continue
        progress.update(len(inputs))
        if progress.done == samples:
            return


def _print(about: dict[str, Any], divergence: Tensor) -> None:
    print(f"{about['tower']}: {len(about['blocks'])} blocks, {about['samples']} samples, {about['parameters']:,} parameters")
    print("blocks    divergence of attention maps (nats)")
    for i, value in enumerate(divergence.diagonal(1).tolist()):
        print(f"{f'{i}, {i + 1}':<10}{value:.4f}")
    for proposal in about["proposals"]:
        share = yaml.safe_dump(proposal["share"], default_flow_style=True, width=10**6).strip()
        print(f"{proposal['what']}: {proposal['parameters']:,} parameters\n  model.options.simplify_options.share={share}")


def _heat_map(path: Path, divergence: Tensor, title: str) -> None:
    """A PNG with all pairs of blocks, from bright (alike) to dark."""
    figure, values = new_figure(6.4, 5.4), divergence.numpy()
    axis = figure.subplots()
    # Maps of trained blocks diverge far less than the ln 2 that is possible, so the scale ends at the highest value.
    image = axis.imshow(values, cmap="viridis_r", vmin=0.0, vmax=max(0.02, np.nanmax(values)))
    style(axis, title)
    axis.grid(False)
    axis.set(xticks=range(len(values)), yticks=range(len(values)))
    figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03).outline.set_visible(False)
    figure.tight_layout()
    write(figure, path)
