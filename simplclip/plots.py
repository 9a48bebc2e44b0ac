"""Pictures: curves of training, queries with what a model finds for them, what each part adds, and the memory of a step."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simplclip import checkpoint

if TYPE_CHECKING:
    from simplclip.evaluate import Split
    from simplclip.plan import Plan

INK, MUTED, GRID = "#1b1f24", "#6e7781", "#e6e8eb"
RIGHT, FRAME = "#1a9850", "#d0d7de"
KIND_COLOURS = ("#495057", "#0b6bcb", "#74c0fc", "#adb5bd", "#d9480f", "#7048e8", "#ffc078", "#c2255c")
COLOURS = ("#0b6bcb", "#d9480f", "#7048e8", "#2b8a3e", "#c2255c")


def curves(run: str | Path) -> Path | None:
    """RUN/curves.png from RUN/metrics.csv: loss and its terms, learning rate, scale and gradient norm.

    None where no row has been logged yet.
    """
    run = Path(run)
    path = run / "metrics.csv"
    rows = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    if not rows:
        return None
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    step = columns["step"]
    terms = [name for name in columns if name.endswith("_loss")]
    figure = _figure(11, 6.4)
    axes = figure.subplots(
        2,
        2,
        gridspec_kw={"hspace": 0.34, "wspace": 0.14, "left": 0.055, "right": 0.98, "top": 0.86, "bottom": 0.085},
    )
    panels = [
        ("Loss", ["loss", *terms]),
        ("Learning rate", ["lr"]),
        ("Logit scale", ["logit_scale"]),
        ("Gradient norm before clipping", ["grad_norm"]),
    ]
    for axis, (title, names) in zip(axes.flat, panels):
        for colour, name in zip(COLOURS, names):
            values = columns[name]
            noisy = len(values) > 20 and name not in ("lr", "logit_scale")
            if noisy:
                axis.plot(step, values, color=colour, alpha=0.22, linewidth=0.8)
                values = _smooth(values)
            label = name.removesuffix("_loss").replace("_", " ")
            axis.plot(step, values, color=colour, linewidth=1.8, label=f"{label}: {values[-1]:.3g}")
        _style(axis, title)
        axis.set_xlim(0, max(step[-1], 1))
        axis.set_ylim(0, 1.08 * max(columns[name].max() for name in names) or 1)
        axis.yaxis.set_major_formatter("{x:.3g}")
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    for axis in axes[1]:
        axis.set_xlabel("step", color=MUTED)
    figure.suptitle(run.name, color=INK, fontsize=14, fontweight="bold", x=0.055, y=0.965, ha="left")
    return _write(figure, run / "curves.png")


def contact_sheet(
    path: str | Path, split: Split, title: str, subtitles: tuple[str, str] = ("", ""), rows: int = 8, top: int = 5
) -> Path:
    """A picture of `rows` captions with their `top` nearest images, and as many images with their nearest captions.

    split: encoded. The queries are drawn at random with a fixed seed. Right answers (same group) are framed green.
    subtitles: a line for either half, e.g. its figures.
    """
    pick = np.random.default_rng(0)
    top_images, top_texts = min(top, len(split.data)), min(top, len(split.captions))
    texts = np.sort(pick.permutation(len(split.captions))[:rows])
    images = np.sort(pick.permutation(len(split.data))[:rows])
    height = max(len(texts), len(images))
    gap, tile, label, caption = 0.14, 1.0, 2.3, 3.9
    right = label + top * (tile + gap) + 0.6
    width = right + tile + gap + caption + 0.1
    figure = _figure(width, height * (tile + gap) + 1.3)
    axis = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axis.set_xlim(0, width)
    axis.set_ylim(height * (tile + gap), -1.25)
    axis.set_aspect("equal", adjustable="box")
    axis.axis("off")
    axis.text(0, -1.1, title, fontsize=15, fontweight="bold", color=INK, va="center")
    axis.add_patch(Rectangle((width - 1.55, -1.19), 0.18, 0.18, fill=False, edgecolor=RIGHT, linewidth=2.5))
    axis.text(width - 1.25, -1.1, "right answer", fontsize=10, color=MUTED, va="center")
    for x, head, line in (
        (0, "Caption → nearest images", subtitles[0]),
        (right, "Image → nearest captions", subtitles[1]),
    ):
        axis.text(x, -0.62, head, fontsize=12, color=INK, va="center")
        axis.text(x, -0.3, line, fontsize=10, color=MUTED, va="center")

    def show(image: int, x: float, y: float, hit: bool = False) -> None:
        axis.imshow(split.data.picture(image), extent=(x, x + tile, y + tile, y), interpolation="bilinear", zorder=1)
        axis.add_patch(
            Rectangle(
                (x, y),
                tile,
                tile,
                fill=False,
                edgecolor=RIGHT if hit else FRAME,
                linewidth=3.5 if hit else 0.8,
                zorder=2,
            )
        )

    for row, query in enumerate(texts):
        y = row * (tile + gap)
        axis.text(
            label - 0.2,
            y + tile / 2,
            _wrapped(split.captions[query], 22, 4),
            fontsize=10.5,
            color=INK,
            ha="right",
            va="center",
        )
        near = (split.image_features @ split.text_features[query]).topk(top_images).indices.tolist()
        for column, image in enumerate(near):
            hit = bool(split.data.groups[image] == split.caption_groups[query])
            show(image, label + column * (tile + gap), y, hit)
    for row, query in enumerate(images):
        y = row * (tile + gap)
        show(query, right, y)
        near = (split.text_features @ split.image_features[query]).topk(top_texts)
        for place, (text, similarity) in enumerate(zip(near.indices.tolist(), near.values.tolist())):
            hit = bool(split.caption_groups[text] == split.data.groups[query])
            line, x = y + (place + 0.5) * tile / top, right + tile + gap
            if hit:
                axis.add_patch(
                    Rectangle(
                        (x, line - 0.43 * tile / top),
                        caption,
                        0.86 * tile / top,
                        fill=False,
                        edgecolor=RIGHT,
                        linewidth=2,
                    )
                )
            axis.text(
                x + 0.1,
                line,
                _wrapped(split.captions[text], 46, 1),
                fontsize=9,
                va="center",
                color=INK if hit else MUTED,
                fontweight="bold" if hit else "normal",
            )
            axis.text(x + caption - 0.1, line, f"{similarity:.2f}", fontsize=8, color=MUTED, ha="right", va="center")
    return _write(figure, Path(path))


def ablation(path: str | Path, rows: Sequence[Mapping[str, Any]], title: str) -> Path:
    """A panel for each split: R@1 by variant and start, the mean over seeds with their standard deviation as error bar.

    rows: with "variant", "start", "seed", "split", "direction" and "R@1"; a seed's figure is the mean of both directions.
    """
    splits, variants, starts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("split", "variant", "start"))
    figure = _figure(5.2 * len(splits) + 1.6, 4.6)
    axes = figure.subplots(
        1, len(splits), squeeze=False, gridspec_kw={"left": 0.06, "right": 0.985, "top": 0.8, "bottom": 0.2}
    )
    for axis, split in zip(axes[0], splits):
        for place, (colour, start) in enumerate(zip(COLOURS, starts)):
            means, errors = zip(*(_mean_of_seeds(rows, split, variant, start) for variant in variants))
            x = np.arange(len(variants)) + (place - (len(starts) - 1) / 2) * 0.4
            bars = axis.bar(x, means, 0.36, yerr=errors, color=colour, ecolor=INK, capsize=3, label=start)
            axis.bar_label(bars, [f"{mean:.1f}" for mean in means], padding=2, fontsize=8, color=INK)
        _style(axis, f"held-out {split}")
        axis.set_xticks(range(len(variants)), [textwrap.fill(variant, 13) for variant in variants], fontsize=8)
        axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
        axis.set_ylabel("R@1, %", color=MUTED)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=10, labelcolor=INK, loc="upper right", ncols=len(names))
    figure.suptitle(
        f"{title}; bars: standard deviation", color=INK, fontsize=13, fontweight="bold", x=0.06, y=0.95, ha="left"
    )
    return _write(figure, Path(path))


def memory(path: str | Path, plan: Plan) -> Path:
    """Live memory over the second step as configured, by kind; and the peak over the batch, with what the card has."""
    gib = 2**30
    figure = _figure(13, 4.8)
    step, batch = figure.subplots(
        1, 2, gridspec_kw={"wspace": 0.16, "left": 0.055, "right": 0.985, "top": 0.8, "bottom": 0.12}
    )
    kinds, live, phases = plan.usage.timeline()
    step.stackplot(range(len(live[0])), np.array(live) / gib, labels=kinds, colors=KIND_COLOURS[: len(kinds)], linewidth=0)
    for (first, name), (last, _) in zip(phases, [*phases[1:], (len(live[0]), "")]):
        if last - first > len(live[0]) / 12:
            at = {"transform": step.get_xaxis_transform(), "ha": "center"}
            step.text((first + last) / 2, 1.02, name, fontsize=8, color=MUTED, **at)
        step.axvline(first, color=FRAME, linewidth=0.5)
    _style(step, "")
    step.set_xlim(0, len(live[0]))
    step.set_xlabel("allocations and frees of the step as configured", color=MUTED)
    step.set_ylabel("GiB", color=MUTED)
    step.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", reverse=True)

    for colour, answer in zip(COLOURS, [a for a in plan.answers if a.peaks]):
        peaks = np.array(sorted(answer.peaks.items()))
        label = f"{answer.what}: {answer.batch_size:,}"
        batch.plot(peaks[:, 0], peaks[:, 1] / gib, "o-", color=colour, markersize=3.5, linewidth=1.5, label=label)
    batch.axhline(plan.budget.usable / gib, color=INK, linewidth=1, linestyle="--")
    batch.text(0.99, plan.budget.usable / gib, "usable", fontsize=9, color=INK, ha="right", va="bottom",
               transform=batch.get_yaxis_transform())  # fmt: skip
    _style(batch, "Peak by pairs of a step")
    batch.set_xscale("log")
    batch.set_yscale("log")
    batch.set_ylim(top=8 * plan.budget.usable / gib)
    batch.yaxis.set_major_formatter("{x:g}")
    if batch.get_legend_handles_labels()[0]:
        batch.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    title = f"{plan.model}, {plan.precision}, {plan.budget.memory / gib:.0f} GiB"
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.055, y=0.96, ha="left")
    return _write(figure, Path(path))


def _mean_of_seeds(rows: Sequence[Mapping[str, Any]], split: str, variant: str, start: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, per cent."""
    mine = [row for row in rows if (row["split"], row["variant"], row["start"]) == (split, variant, start)]
    seeds = dict.fromkeys(row["seed"] for row in mine)
    figures = [100 * np.mean([row["R@1"] for row in mine if row["seed"] == seed]) for seed in seeds]
    return float(np.mean(figures)), float(np.std(figures, ddof=1)) if len(figures) > 1 else 0.0


def _wrapped(text: str, width: int, lines: int) -> str:
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …").replace("$", r"\$")


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the run, shorter at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axis, title: str) -> None:
    axis.set_title(title, loc="left", color=INK, fontsize=11)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=MUTED, length=0, labelsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def _write(figure: Figure, path: Path) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    checkpoint.write_atomically(path, image.getvalue())
    return path
