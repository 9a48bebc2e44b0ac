"""Writes the tables of README.md and docs/, and charts, from the result files.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    fail if a file is not what the result files say

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->` of the file that `TABLES`
names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import chart, finetune_chart, model_table
from benchmarks.cards.bound import SHOWN
from benchmarks.results_file import RESULTS, ROOT, read_csv
from simplclip.evaluation.results import Results
from simplclip.plan.time import CALIBRATION

README = "README.md"
BENCHMARKS = "docs/benchmarks.md"
PLAN = "docs/plan.md"
EXAMPLES = "docs/examples.md"
FINE_TUNING = "docs/fine-tuning.md"
OPEN_CLIP = "docs/open_clip.md"
CHART = "docs/similarity_loss.svg"
TRADE_CHART = "docs/similarity_loss_memory.svg"
FINETUNE_CHART = "docs/fine-tuning.svg"
BOTH, NONE = "forward + backward", "–"
# The sigmoid losses of the table: of the compiled ones, the fastest.
CHUNKS = "open_clip's main branch, chunk_size=1024"
SIGMOID = (
    f"simplclip|simplclip, pair matching too|open_clip.SigLipLoss|{CHUNKS}|torch.compile of "
    f"{CHUNKS}"
)
TEXTS = "COCO: 64 captions of 13.2 tokens|CC12M: 64 captions of 23.3 tokens"
PREDICTED = "contrastive|all|attention-77|block-vit-b"
EFFECTS = (
    "pair matching 1 beside contrastive|all three beside contrastive|30 % swapped, all three "
    "beside contrastive|inherited and frozen|inherited, tokens tuned|simplified blocks start from "
    "own ones|2 captions instead of 1|SAS-P instead of pre-LN blocks, equal parameters|text blocks "
    "shared"
)
Row = dict[str, str]


def number(digits: int = 0) -> Callable[[str], str]:
    return lambda value: f"{float(value):,.{digits}f}"


# Columns of result files: title in a table, and how a cell is shown. Those without values in a
# table's rows are left out.
TEXT = {name: (name, str) for name in ("objective", "shape", "dtype", "pass", "form", "call")}
COLUMNS: dict[str, tuple[str, Callable[[str], str]]] = TEXT | {
    "n": ("N", number()),
    "p50_ms": ("ms, median", lambda value: number(1 if float(value) < 100 else 0)(value)),
    "times_ours": ("times simplclip's", str),
    "samples_per_s": ("samples/s", str),
    "workers": ("workers", str),
    "images_per_s": ("images/s", str),
    "times": ("times open_clip's", str),
    "gemms": ("products", lambda value: f"{float(value):g}"),
    "gemm_share": ("share of the GEMM rate", lambda value: f"{float(value):.0%}"),
    "extra_mib": ("extra MiB", number()),
    "mib": ("MiB", number()),
    "memory_times_ours": ("MiB, times simplclip's", str),
    "saved_bytes_per_token": ("saved bytes a token", number()),
    **{f"{card} ms": (f"{card}, ms", lambda value: f"{float(value):.3g}") for card in SHOWN},
    "bound": ("bound by", str),
    "bytes": ("GB", lambda value: f"{float(value) / 1e9:.2f}"),
    "launches": ("kernels", str),
    "triton_launches": ("launches by Triton", str),
    "torch_launches": ("by torch", str),
    "host_us": ("µs of the host", str),
}


def newest(pattern: str) -> Path:
    """Returns the result file of the latest date, in which its name ends."""
    return max(RESULTS.glob(pattern), key=lambda path: path.stem[-10:])


def read(op: str, **where: str) -> tuple[Path, list[Row]]:
    """Returns the newest result file and its rows with these values, "A|B" for either."""
    path = newest(f"{op}-*.csv")
    if "passes" in where:  # column "pass"
        where["pass"] = where.pop("passes")
    values = {name: text.split("|") for name, text in where.items()}
    rows = []
    for row in read_csv(path):
        if all(row[name] in allowed for name, allowed in values.items()):
            hardware = re.sub(r"\b1 threads", "1 thread", row.get("hardware", ""))
            rows.append(row | {"hardware": hardware})
    return path, rows


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str]) -> list[str]:
    """Returns the lines of a table whose columns in `text` are text, the others figures."""
    marks = ["---" if title in text else "--:" for title in head]
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(marks)}|",
        *(f"| {' | '.join(cells)} |" for cells in rows),
    ]


def origin(path: Path, rows: list[Row], command: str = "make bench") -> str:
    """Returns how the rows were measured, with a link from a page in docs/."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows if row.get(name)))

    versions = [f"torch {values('torch')}", f"commit {values('commit')}", values("date")]
    parts = [values("hardware"), *versions]
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    return f"{', '.join(part for part in parts if part)} ({link}; `{command}`)."


def op_table(op: str, note: str = "", command: str = "make bench", **where: str) -> list[str]:
    """Returns a table with a row for each row of the result file that has these values.

    What all rows share is below it, after the note.
    """
    path, rows = read(op, **where)
    figures = [name for name in COLUMNS if name not in (*TEXT, "n")]
    rows = [row for row in rows if any(row.get(name) for name in figures)]
    columns = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    shared = [name for name in columns if name in TEXT and len({row[name] for row in rows}) == 1]
    columns = [name for name in columns if name not in shared]
    notes = [note, *(rows[0][name] for name in shared)]
    repeats = sorted({row["repeats"] for row in rows if row.get("repeats")}, key=int)
    if repeats:
        notes.append(f"medians of {' to '.join(repeats)} interleaved runs")
    head = [COLUMNS[name][0] for name in columns]
    cells = [[cell(name, row[name]) for name in columns] for row in rows]
    below = f"{', '.join(text for text in notes if text)}; {origin(path, rows, command)}"
    return [*markdown(head, cells, list(TEXT)), "", below]


def cell(column: str, value: str) -> str:
    _, show = COLUMNS[column]
    return show(value) if value else ""


def ablation() -> list[str]:
    """Returns a table with a row for each of EFFECTS."""
    path, rows = read("ablation", measure="R@1", split="all", effect=EFFECTS)
    lines = []
    names = ("base", "base std", "variant", "variant std", "difference", "low", "high", "p")
    for row in sorted(rows, key=lambda row: EFFECTS.split("|").index(row["effect"])):
        figure = {name: float(row[name]) for name in names}
        base = f"{figure['base']:.1f} ± {figure['base std']:.1f}"
        variant = f"{figure['variant']:.1f} ± {figure['variant std']:.1f}"
        interval = f"{figure['difference']:+.2f} ({figure['low']:+.2f} to {figure['high']:+.2f})"
        p = f"{figure['p']:.3f}"
        counts = row["variant steps"], row["seeds"]
        lines.append((row["effect"], *counts, base, variant, interval, p))
    head = ("effect", "steps", "seeds", "base", "variant", "difference, 95 % interval", "p")
    note = (
        "R@1 in per cent, the mean over `concepts` and `vendor` and both directions: mean ± "
        "standard deviation of the seeds, the paired difference, and p of the paired t-test, not "
        "corrected for the number of effects. siclip-lite0 on the built-in data"
    )
    below = f"{note}; {origin(path, rows, 'make ablation')}"
    return [*markdown(head, lines, ("effect",)), "", below]


def demo() -> list[str]:
    path = newest("demo-*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    head = ("held out", "find", "R@1", "R@5", "R@10", "chance of R@5")
    lines = []
    for split, entry in Results.model_validate(result).splits.items():
        for figures, find in (
            (entry.retrieval.image_to_text, f"an image's caption, among {entry.texts:,}"),
            (entry.retrieval.text_to_image, f"a caption's images, among {entry.images:,}"),
        ):
            recalls = [f"{figure.value:.1%}" for figure in figures.values()]
            lines.append((split, find, *recalls, f"{figures['R@5'].chance:.2%}"))
    return [
        *markdown(head, lines, ("held out", "find")),
        "",
        f"{result['model']}, {result['step']} steps, one seed, {result['samples_per_second']:.0f} "
        f"samples/s; {result['hardware']}, torch {result['torch']}, commit {result['commit']}, "
        f"{result['date']} (`{path.relative_to(ROOT)}`). `concepts` are drawings of things that "
        "training never saw, `vendor` a third vendor's drawings of things it did.",
    ]


def figures() -> list[str]:
    """Returns the README's table: figures beside an eager and a compiled baseline."""
    lines = []
    for title, (op, where), baselines, shown in FIGURES:
        _, rows = read(op, **where)
        by_form = {row["form"]: row for row in rows}
        cells = []
        for form, label in {"simplclip": "", **baselines}.items():
            row = by_form[form]
            values = [
                show.format(float(row[column])) for column, show in shown.items() if row[column]
            ]
            cells.append(label + ", ".join(values))
        cells += [NONE] * (3 - len(cells))
        ours = by_form["simplclip"]
        clock = " (processor time)" if ", 1 thread of" in ours["hardware"] else ""
        where = f"{ours['hardware']}{clock}; {ours['date']}, {ours['commit']}"
        lines.append((title, *cells, where))
    baselines = ("eager baseline", "chunked or compiled baseline")
    measured = "forward and backward on a CPU, medians ([more](docs/benchmarks.md))"
    head = (measured, "simplclip", *baselines, "hardware; date, commit")
    return markdown(head, lines, head)


def hours() -> list[str]:
    """Returns a table of ten epochs on a card."""
    path, rows = read("plan-hours")
    columns = [name for name in rows[0] if name.endswith((" pairs", " images/s", " hours"))]
    head = ["ten epochs of 12.4 million pairs"]
    for name in columns:
        card, figure = name.split(" ")
        head.append(f"{card.removeprefix('rtx-')}: {figure}")
    lines = []
    for row in rows:
        lines.append((row["form"], *(f"{float(row[name]):,.0f}" for name in columns)))
    note = (
        "Predicted: no step of these ran on a card ([how well](#how-well)). pairs: the largest "
        "batch in one graph, in bf16. siclip models train with two captions an image and a "
        "teacher's stored features, the others with one caption. open_clip's trainer trains all "
        "weights of the whole model"
    )
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    return [*markdown(head, lines, head[:1]), "", f"{note} ({link}; `make plan`)."]


def hours_of_cards() -> list[str]:
    """Returns the README's sentence: the hours of siclip-s0 on three cards."""
    path, (row,) = read("plan-hours", form="siclip-s0, as configured")
    cards = [(name[4:-6], float(row[name])) for name in row if name.endswith(" hours")]
    hours = ", ".join(f"{hours:.0f} h on an RTX {card}" for card, hours in cards)
    link = f"[predicted](benchmarks/results/{path.name})"
    return [f"siclip-s0, ten epochs of 12.4 M pairs: {link}, not measured, to take {hours}."]


def likely() -> list[str]:
    """Returns a table of the likely milliseconds of losses and steps."""
    path, rows = read("plan-likely")
    lines = []
    for row in [row for row in rows if ": shaped_attention" not in row["form"]]:
        cells = [number(1)(float(row["bytes"]) / 1e9), number()(row["launches"])]
        times = (float(row[f"{card} ms"]) for card in SHOWN)
        lines.append((row["form"], *cells, *(number(1 if ms < 100 else 0)(ms) for ms in times)))
    cards = (f"{card.removeprefix('rtx-')}, ms" for card in SHOWN)
    head = ("bf16, forward and backward", "GB", "launches", *cards)
    note = "Predicted, nothing of it ran on a card. Steps are in one graph"
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    return [*markdown(head, lines, head[:1]), "", f"{note} ({link}; `make plan`)."]


def machine_code() -> list[str]:
    """Returns a table of the share that each kernel's machine code allows, by architecture."""
    path, rows = read("machine-code", D="512|64")
    cells: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: int(row["sm"])):
        cells.setdefault(row["kernel"], []).append(f"{float(row['share']):.2f}, {row['bound']}")
    head = ("kernel", *(f"sm_{sm}" for sm in dict.fromkeys(sorted(int(r["sm"]) for r in rows))))
    lines = [(name, *shares) for name, shares in cells.items()]
    note = (
        "Predicted shares of the data sheet's rate in bfloat16 at D = 512 (attention: 77 tokens, "
        "K = 64), and what bounds them"
    )
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    command = "PYTHONPATH=tests python -m benchmarks.machine_code --write"
    return [*markdown(head, lines, head), "", f"{note} ({link}; `{command}`)."]


def peers() -> list[str]:
    """Returns a table of what others measured beside what the model says."""
    path, rows = read("peers-predicted")
    lines = []
    for row in rows:
        shares = (f"{float(row[name]):.2f}" for name in ("measured", "predicted"))
        size = f"{int(row['size']):,}"
        source = row["source"]
        if source.startswith("https"):
            source = f"[Triton {source.rpartition('/')[2]}]({source})"
        name = f"memeff's loss, D = {row['D']}" if row["kernel"] == "memeff" else "matmul"
        lines.append((name, row["card"], size, *shares, row["measured/predicted"], source))
    head = ("kernel", "card", "N", "measured", "predicted", "ratio", "source")
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    note = (
        f"The geometric mean of the ratios is {CALIBRATION}. Shares of the data sheet's rate; "
        "matmul is that of Triton's tutorial in float16, memeff's loss has five products in "
        "bfloat16"
    )
    return [*markdown(head, lines, ("kernel", "card", "source")), "", f"{note} ({link})."]


def finetune() -> list[str]:
    """Returns a table with a row for each form of fine-tuning, of the emoji of the part test."""
    path, rows = finetune_rows()
    rows = [row for row in rows if not row["form"].startswith("blends of")]
    lines = []
    for row in rows:
        recalls = []
        for name in ("new", "old", "both"):
            mean, low, high = (float(row[f"{name}{end}"]) for end in ("", " low", " high"))
            recalls.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
        rate = f"{float(row['lr']):g}" if row["lr"] else NONE
        costs = [f"{float(row[name]):,.0f}" if row[name] else NONE for name in ("mib", "ms")]
        trained = f"{float(row['trained']) / 1e6:.1f} M" if row["trained"] else NONE
        lines.append((row["form"], rate, *recalls, trained, *costs))
    recalls = [f"{domain}: R@1, %" for domain in ("new", "old", "mean of both")]
    head = ("form", "learning rate", *recalls, "trained", "MiB", "ms a step")
    alphas = next(row["alpha"] for row in rows if row["form"].startswith("best blend"))
    note = (
        f"R@1 of the part test, the mean of both directions, and of {rows[0]['seeds']} seeds with "
        f"its 95 % interval (Student's t). Alphas of the best blends: {alphas}. MiB: the peak of a "
        "step of 64 pairs, predicted; ms: processor time of such a step"
    )
    return [*markdown(head, lines, ("form",)), "", f"{note}; {origin(path, rows, 'make finetune')}"]


def finetune_rows() -> tuple[Path, list[Row]]:
    path = newest("finetune-*.csv")
    return path, [row for row in read_csv(path) if row["part"] == "test"]


def finetune_costs() -> list[str]:
    """Returns a table of what ways to fine-tune ViT-B-32 take of a card, as predicted."""
    path, rows = read("plan-finetune")
    lines = []
    for row in rows:
        trained = f"{float(row['trained']) / 1e6:.1f} M"
        figures = [number()(row[name]) for name in ("images_per_s", "most_pairs")]
        memory = [f"{float(row[name]):.1f} GiB" for name in ("gib of few", "gib")]
        lines.append((row["form"], trained, *memory, *figures))
    head = ("ViT-B-32", "trained", "32 pairs", "256 pairs", "images/s", "largest batch")
    note = "Predicted for an RTX 3090 with 24 GB in bf16, captions of 23 tokens; no step ran on one"
    link = f"[{path.name}](../benchmarks/results/{path.name})"
    return [*markdown(head, lines, head[:1]), "", f"{note} ({link}; `make plan`)."]


# Rows of the README's table: title; op and rows of its result file; an eager and a compiled
# baseline, with how the table calls them; columns and units.
FIGURES: tuple[tuple[str, tuple[str, dict[str, str]], dict[str, str], dict[str, str]], ...] = (
    (
        "Contrastive loss of 16,384 pairs, D = 512, float32: time, memory beside the features",
        ("similarity_loss", {"objective": "contrastive", "n": "16384", "dtype": "float32"}),
        {
            "open_clip.ClipLoss": "open_clip.ClipLoss: ",
            "torch's linear_cross_entropy in chunks": "torch's linear_cross_entropy in chunks: ",
        },
        {"p50_ms": "{:,.0f} ms", "extra_mib": "{:,.0f} MiB"},
    ),
    (
        "A block of CLIP's text tower, B=64 L=77 C=512 causal, bfloat16: time, bytes kept for "
        "backward per token",
        ("simplified_block", {"passes": BOTH, "dtype": "bfloat16"}),
        {
            "open_clip's block": "open_clip's block: ",
            "torch.compile of that": "open_clip's block: ",
        },
        {"p50_ms": "{:,.0f} ms", "saved_bytes_per_token": "{:,.0f} bytes"},
    ),
    (
        "Training step of siclip-tiny, a small model: 1,024 pairs, contrastive and the paper's "
        "pair matching loss, bfloat16: rate, memory beside the weights",
        ("training", {"objective": "contrastive, pair matching", "n": "1024", "dtype": "bfloat16"}),
        {"plain torch blocks, dense losses": "plain torch blocks, N×N losses: "},
        {"samples_per_s": "{:,.0f} samples/s", "extra_mib": "{:,.0f} MiB"},
    ),
)
CPU = "On a CPU"
LOSS = "Forward and backward, D = 512"
TABLES: dict[str, dict[str, Callable[[], list[str]]]] = {
    README: {"figures": figures, "hours": hours_of_cards},
    EXAMPLES: {"demo": demo},
    PLAN: {"hours": hours, "likely": likely},
    FINE_TUNING: {"finetune": finetune, "finetune-costs": finetune_costs},
    OPEN_CLIP: {"models": model_table.lines},
    BENCHMARKS: {
        "similarity_loss": partial(op_table, "similarity_loss", LOSS, n="8192", dtype="float32"),
        "sigmoid_loss": partial(
            op_table,
            "sigmoid_loss",
            LOSS,
            **{"n": "16384", "objective": "sigmoid", "dtype": "bfloat16", "form": SIGMOID},
        ),
        "simplified_block": partial(
            op_table, "simplified_block", CPU, passes=BOTH, dtype="bfloat16"
        ),
        "steps": partial(op_table, "steps", CPU, dtype="bfloat16"),
        "texts": partial(
            op_table, "texts", CPU, form="padded|four groups", dtype="bfloat16", shape=TEXTS
        ),
        "loader": partial(
            op_table, "loader", "512-pixel JPEGs to 256 pixels", "python -m benchmarks.loader"
        ),
        "predicted": partial(
            op_table, "bound-predicted", "", "python -m benchmarks.cards --call all", call=PREDICTED
        ),
        "machine-code": machine_code,
        "peers": peers,
        "launches": partial(
            op_table, "launches", "Forward and backward, bfloat16", "python -m benchmarks.launches"
        ),
        "ablation": ablation,
    },
}


def written(name: str) -> str:
    """Returns the text of the file `name`, with its tables made from the result files."""
    text = (ROOT / name).read_text()
    for table, make in TABLES[name].items():
        pattern = re.compile(rf"(<!-- table: {table} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{name}: expected one place <!-- table: {table} --> ... <!-- end -->")
        lines = "\n".join(make())
        text = pattern.sub(lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text)
    return text


def main() -> None:
    files = {name: written(name) for name in TABLES}
    path, rows = read("similarity_loss")
    files[CHART] = chart.draw(rows, str(path.relative_to(ROOT)))
    files[TRADE_CHART] = chart.draw_trade(rows, str(path.relative_to(ROOT)))
    path, rows = finetune_rows()
    files[FINETUNE_CHART] = finetune_chart.draw(rows, str(path.relative_to(ROOT)))
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in files.items() if (ROOT / name).read_text() != text]
        if stale:
            sys.exit(f"{', '.join(stale)}: not what the result files say; run make tables")
        sys.exit(0)
    for name, text in files.items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    main()
