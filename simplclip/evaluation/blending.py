"""Weights between those of two models, and their evaluation, `simplclip evaluate --blend`.

Training on own data forgets some of what a model knew; a blend with the start may keep both
(WiSE-FT, arXiv 2109.01903).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from rich.console import Console
from torch import Tensor

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.progress import print_lines
from simplclip.evaluation.encoder import Encoder
from simplclip.evaluation.results import first_right, percent, write_json
from simplclip.evaluation.run import (
    VERSIONS,
    Settings,
    about_model,
    evaluate_split,
    open_splits,
    results_folder,
)

BLEND = "blend.json"
ALPHAS = tuple(tenths / 10 for tenths in range(11))


def blend(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Returns the weights (1 - alpha) start + alpha end, computed in float32.

    start, end: state dicts of one architecture. alpha: 0 gives the numbers of `start`, 1 those of
    `end`, to the bit; numbers that are equal in both stay. Tensors of integers are those of `end`.
    Dtypes are those of `end`. Tensors of the result may be those of the arguments.
    Raises InputError for another alpha, or if names or shapes differ.
    """
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise InputError(f"alpha: expected a number from 0 to 1, got {alpha!r}")
    shapes, others = ({name: t.shape for name, t in state.items()} for state in (start, end))
    if unlike := sorted(name for name, _ in shapes.items() ^ others.items()):
        raise InputError(f"start: expected the names and shapes of end, got others of {unlike[0]}")
    weights = {}
    for name, last in end.items():
        first = start[name].to(last.dtype)
        weights[name] = last
        if last.is_floating_point() and alpha < 1:
            sums = (1 - alpha) * first.float() + alpha * last.float()
            weights[name] = first if alpha == 0 else first.where(first == last, sums.to(last.dtype))
    return weights


def evaluate_blend(
    encoder: Encoder,
    start: tuple[str, Mapping[str, Tensor]],
    splits: Mapping[str, Any],
    settings: Settings | None = None,
    *,
    out: str | os.PathLike | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates the weights between a run's start and the run, for each of ALPHAS, on splits.

    Writes OUT/blend.json and prints a line for each; returns the content of the JSON: its "rows"
    have "alpha", "mean" (of the splits' `first_right`) and "splits", and "best" is the alpha of the
    highest mean, of equal ones the lowest. The data are read for each alpha.

    encoder: of the run; its weights change, and are the run's again at the end. start: the name and
    state dict of the weights with which the run began, by `simplclip.train.setup`. Other arguments
    and errors are those of `evaluate`; device and precision are the encoder's.
    """
    console = console or Console(quiet=not ranks.first())
    say, settings = partial(print_lines, console=console), settings or Settings()
    data, folder = open_splits(splits, settings), results_folder(out, encoder.source)
    say(f"start: {start[0]}; run: {encoder.source}, step {encoder.step}")
    end = {name: tensor.to("cpu", copy=True) for name, tensor in encoder.model.state_dict().items()}
    rows: list[dict[str, Any]] = []
    for alpha in ALPHAS:
        encoder.model.load_state_dict(blend(start[1], end, alpha))
        told = str if rows else say  # what is read and left out, once
        found, shares = {}, []
        for name, held in data.items():
            label = f"{name}, alpha {alpha}"
            found[name] = evaluate_split(encoder, held, settings, encoder.config, label, told)
            shares.append(first_right(found[name])["value"])
        rows.append({"alpha": alpha, "mean": fmean(shares), "splits": found})
        named = [*zip(data, shares), ("mean", fmean(shares))]
        line = ", ".join(f"{name} {percent(share)}" for name, share in named)
        say(f"alpha {alpha}: first answers right: {line}")
    best = max(rows, key=lambda row: row["mean"])
    results = about_model(encoder) | {"versions": VERSIONS, "start": start[0]}
    results |= {"best": best["alpha"], "rows": rows}
    ranks.on_first(write_json, folder / BLEND, results)
    say(f"best for the mean: alpha {best['alpha']}, {percent(best['mean'])}")
    say(f"wrote {folder / BLEND}")
    return results
