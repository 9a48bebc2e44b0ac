"""Predicts step times of timm's models on cards, without one, beside those that others measured.

    python -m benchmarks.cards
        the committed steps, benchmarks/results/cards-measured.csv
    python -m benchmarks.cards --file steps.csv --mode train --layout nhwc --card rtx-3090
            [--models resnet50 ...]
        a file with the columns model, batch, size and ms
    python -m benchmarks.cards --fit
        writes simplclip/plan/rates.csv, fitted to the committed steps whose column fitted is yes;
        the steps are then predicted by this fit

The last line is a JSON object: "models" (steps), "median_error", "within_35" (the share predicted
to 35 %), "below_bound" (the share that was faster than the data sheet allows).
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from simplclip.plan import cards
from simplclip.plan.cards import CARDS, RATES, Work, step_ms
from simplclip.plan.meter import fake_device
from simplclip.plan.step import CARD

STEPS = Path(__file__).parent / "results" / "cards-measured.csv"
FITTED = Path(cards.__file__).with_name("rates.csv")
KINDS = list(RATES["rtx-3090", "infer"])
# What a rate is before any measurement, and the most that it can be.
EXPECTED = (0.85, 0.8, 0.25, 0.25, 0.1, 0.5, 0.8, 0.7, 0.65, 0.004)  # by KINDS
MOST = 9 * [1.05] + [0.05]


class Measured(NamedTuple):
    """A step that others measured on a card."""

    card: str
    mode: str  # "train" or "infer"
    layout: str  # "nchw" or "nhwc"
    model: str
    batch: int
    size: int
    ms: float


def created(name: str, size: int) -> nn.Module:
    """Returns a model on the meta device, or on the CPU if it reads values while it is made."""
    for device in ("meta", "cpu"):
        for options in ({"img_size": size}, {}):
            try:
                with torch.device(device):
                    return timm.create_model(name, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
            except (NotImplementedError, RuntimeError):
                if device == "cpu":
                    raise
                break
    raise AssertionError("unreachable")


@functools.cache
def works(mode: str, layout: str, name: str, batch: int, size: int) -> list[Work]:
    """Returns the work of a step of timm's benchmark.py, in AMP with float16.

    Training has attention of plain products, as torch 1.12 had, and SGD with momentum.
    """
    training = mode == "train"
    set_fused_attn(not training)
    model = created(name, size).train(training)
    form = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    model = model.to(memory_format=form).requires_grad_(training)
    parameters = sum(weight.numel() for weight in model.parameters())
    with fake_device([model], CARD) as meter, torch.autocast("cuda", torch.float16):
        images = torch.empty(batch, 3, size, size, device=CARD).contiguous(memory_format=form)
        counted = meter.count(lambda: model(images))
    update = Work("bytes", 0, 20 * parameters * training, half=False, runs=0)
    return [*counted.works, update]


def least_ms(work: Work, card: str) -> float:
    """Returns a bound by the data sheet: a clock a tenth higher, bytes that stay in the cache."""
    products, moved = work.least_ms(CARDS[card])
    cached = 2 * (CARDS[card].l2 << 20) / CARDS[card].bandwidth / 1e6
    longest = max(products / 1.1, moved - cached, 2e-3)
    return longest * (3 if work.runs else 1)


def summary(steps: list[Measured]) -> dict[str, float]:
    """Returns how well the steps are predicted; those whose model cannot run are left out."""
    errors, below = [], 0
    for step in steps:
        try:
            found = works(*step[1:6])
        except Exception as error:  # of any kind, from code of the model
            print(f"{step.model}: not counted: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        likely = step_ms(found, step.card)
        print(*step, round(likely, 2), sep=",")
        errors.append(abs(likely / step.ms - 1))
        below += step.ms < sum(least_ms(work, step.card) for work in found)
    return {
        "models": len(errors),
        "median_error": round(statistics.median(errors), 4),
        "within_35": round(statistics.mean(error <= 0.35 for error in errors), 4),
        "below_bound": round(below / len(errors), 4),
    }


def fit(steps: list[Measured]) -> dict[str, float]:
    """Returns the rates of a card and mode, by kind, with the smallest |log(predicted / ms)|.

    They stay near EXPECTED unless steps say otherwise.
    """
    rows = []
    for number, step in enumerate(steps):
        for work in works(*step[1:6]):
            times = 3 if step.mode == "train" and work.runs else 1
            kinds = KINDS.index(work.kind), KINDS.index(work.traffic)
            rows.append([number, *kinds, work.nchw, *work.least_ms(CARDS[step.card]), times])
    table = torch.tensor(rows, dtype=torch.float64)
    row, rate, traffic = table[:, :3].long().unbind(1)
    is_nchw, products, moved, times = table[:, 3:].unbind(1)
    measured = torch.tensor([step.ms for step in steps], dtype=torch.float64)
    most = torch.tensor(MOST, dtype=torch.float64)
    expected = (torch.tensor(EXPECTED, dtype=torch.float64) / most).logit()
    free = expected.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05)
    for number in range(700):
        optimizer.param_groups[0]["lr"] = 0.05 if number < 470 else 0.01
        constants = most * free.sigmoid()
        layout = torch.where(is_nchw > 0, constants[KINDS.index("nchw")], 1.0)
        longest = torch.maximum(products / constants[rate] / layout, moved / constants[traffic])
        ms = times * torch.maximum(longest, constants[KINDS.index("launch")])
        errors = (torch.zeros_like(measured).index_add(0, row, ms) / measured).log()
        loss = (1 + (errors / 0.1) ** 2).sqrt().mean() + 0.02 * ((free - expected) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {kind: round(rate, 4) for kind, rate in zip(KINDS, (most * free.sigmoid()).tolist())}


def fit_all(steps: list[Measured]) -> None:
    """Fits the rates of each card and mode of rates.csv, uses them and writes the file.

    Without measured training, a card loses in it what an RTX 3090 loses.
    """
    for card, mode in RATES:
        found = [step for step in steps if (step.card, step.mode) == (card, mode)]
        RATES[card, mode] = fit(found) if found else {}
    fast, slow = RATES["rtx-3090", "infer"], RATES["rtx-3090", "train"]
    for (card, _), rates in RATES.items():
        if not rates:
            for kind, rate in RATES[card, "infer"].items():
                rates[kind] = round(rate * slow[kind] / fast[kind], 4)
    with open(FITTED, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["card", "mode", *KINDS])
        writer.writerows([*key, *row.values()] for key, row in RATES.items())


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=STEPS)
    parser.add_argument("--mode", choices=("train", "infer"))
    parser.add_argument("--layout", choices=("nchw", "nhwc"))
    parser.add_argument("--card", choices=CARDS)
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args(words)
    if options.fit:
        fit_all(steps_of(STEPS, {}, lambda row: row["fitted"] == "yes"))
    given = {name: getattr(options, name) for name in ("card", "mode", "layout")}
    wanted = options.models
    steps = steps_of(options.file, given, lambda row: not wanted or row["model"] in wanted)
    print(json.dumps(summary(steps)))


def steps_of(
    path: Path, given: dict[str, str], keep: Callable[[dict[str, str]], bool]
) -> list[Measured]:
    """Returns the steps of the rows of a file that `keep` keeps; given: columns that it lacks."""
    with open(path, newline="") as file:
        rows = [{**given, **row} for row in csv.DictReader(file) if keep(row)]
    return [
        Measured(
            *(row[name] for name in ("card", "mode", "layout", "model")),
            int(row["batch"]),
            int(row["size"]),
            float(row["ms"]),
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
