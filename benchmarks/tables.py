"""Writes the tables of README.md and docs/benchmarks.md, and the charts, from the committed result files.

    python -m benchmarks.tables            write them
    python -m benchmarks.tables --check    write nothing; fail if a file is not what the result files say

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->` of the file that `TABLES` names.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import chart
from benchmarks.bound import assumed

ALONE = "SDPA alone"  # computes one of shaped attention's three terms
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LINK = "../benchmarks/results"  # from docs/
BOTH = "forward + backward"
BUNDLED = ("similarity_loss", "steps", "batches", "loader")  # ops of a bundle of benchmarks.gpu that are in its table
# The rows of the ablation's table; the result file has all effects.
EFFECTS = (
    "pair matching 1 beside contrastive",
    "pair matching 0.3 beside the whole recipe, 400 steps",
    "all three beside contrastive",
    "30 % swapped, all three beside contrastive",
    "inherited and frozen",
    "inherited, tokens tuned",
    "simplified blocks start from own ones",
    "2 captions instead of 1",
    "SAS-P instead of pre-LN blocks, equal parameters",
    "SAS-P instead of pre-LN blocks, equal time",
    "text blocks shared",
)
# The forms of the sigmoid loss's table: of the compiled ones, the fastest.
SIGMOID = (
    "simplclip|simplclip, pair matching too|open_clip.SigLipLoss|open_clip's main branch, chunk_size=1024|"
    "torch.compile of open_clip's main branch, chunk_size=1024"
)
# The calls of the table of predicted times, at the largest size of the losses.
PREDICTED = "contrastive|sigmoid|all|attention-197|block-siclip|block-vit-b"


def newest(pattern: str) -> Path:
    """Returns the result file of the latest date, in which its name ends."""
    found = sorted(RESULTS.glob(pattern), key=lambda path: path.stem[-10:])
    if not found:
        raise FileNotFoundError(f"no result file {pattern} in {RESULTS}")
    return found[-1]


def read(op: str, **where: str) -> tuple[Path, list[dict[str, str]]]:
    """Returns the newest result file and its rows with these values, "A|B" for either; `passes` stands for column "pass"."""
    path = newest(f"{op}-*.csv")
    if "passes" in where:
        where["pass"] = where.pop("passes")
    with open(path, newline="") as file:
        return path, [row for row in csv.DictReader(file) if all(row[name] in of.split("|") for name, of in where.items())]


def link(path: Path) -> str:
    """Returns a link to a result file, from a page in docs/."""
    return f"[{path.name}]({LINK}/{path.name})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str]) -> list[str]:
    """Returns the lines of a table. The columns named in `left` are text, the others are figures."""
    marks = ["---" if title in left else "--:" for title in head]
    return [f"| {' | '.join(head)} |", f"|{'|'.join(marks)}|", *(f"| {' | '.join(cells)} |" for cells in rows)]


def source(path: Path, rows: list[dict[str, str]], what: str) -> list[str]:
    """Returns lines that say how the rows were measured."""
    first = rows[0]
    repeats = " to ".join(dict.fromkeys(sorted({row["repeats"] for row in rows if row["repeats"]}, key=int)))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return [
        "",
        f"{what}, medians of {repeats} interleaved runs; {first['hardware']}, "
        f"torch {first['torch']}, commit {commits}, {first['date']} ({link(path)}; `make bench`).",
    ]


def op_table(op: str, **where: str) -> list[str]:
    """Returns a table with a row for each row of the result file that has these values."""
    path, rows = read(op, **where)
    columns = {
        "objective": ("objective", str),
        "N": ("n", lambda value: f"{int(value):,}"),
        "shape": ("shape", str),
        "dtype": ("dtype", str),
        "pass": ("pass", str),
        "form": ("form", str),
        "ms, median": ("p50_ms", lambda value: f"{float(value):,.0f}"),
        "times simplclip's": ("times_ours", str),
        "samples/s": ("samples_per_s", str),
        "products": ("gemms", lambda value: f"{float(value):g}"),
        "of the GEMM rate": ("gemm_share", lambda value: f"{float(value):.0%}"),
        "extra MiB": ("extra_mib", lambda value: f"{float(value):,.0f}"),
        "MiB, times simplclip's": ("memory_times_ours", str),
        "saved bytes a token": ("saved_bytes_per_token", lambda value: f"{int(value):,}"),
    }
    columns = {title: column for title, column in columns.items() if any(row.get(column[0]) for row in rows)}
    left = ("objective", "shape", "dtype", "pass", "form")
    cells = [[show(row[name]) if row[name] else "" for name, show in columns.values()] for row in rows]
    what = f"Forward and backward, D = {rows[0]['d']}" if "d" in rows[0] else "On a CPU"
    return markdown(list(columns), cells, left) + source(path, rows, what)


def attention_table() -> list[str]:
    """Returns a table with a row for each case, forward and backward: our time, and the fastest other form's in our times."""
    path, rows = read("shaped_attention", passes=BOTH, dtype="bfloat16")
    cases: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault(row["shape"], {})[row["form"]] = row
    head = ("shape", "simplclip, ms", "fastest other form", "times simplclip's", "SDPA alone")
    lines = []
    for case, forms in cases.items():
        ours, alone = forms.pop("simplclip"), forms.pop(ALONE)
        best = min(forms.values(), key=lambda row: float(row["times_ours"]))
        form = best["form"].replace("of it", "of the formula").replace("of that", "of SDPA and linear terms")
        lines.append((case, f"{float(ours['p50_ms']):.1f}", form, best["times_ours"], alone["times_ours"]))
    what = "Forward and backward in bfloat16, beside the formula and SDPA with linear terms, both compiled"
    return markdown(head, lines, ("shape", "fastest other form")) + source(path, rows, what)


def texts() -> list[str]:
    """Returns a table of padded texts and of four groups by length, in bfloat16; siclip-s0 on COCO in float32."""
    path, rows = read("texts", form="padded|four groups")
    rows = [row for row in rows if row["dtype"] == "bfloat16" or row["shape"].startswith("siclip-s0, masked, COCO")]
    cases: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["shape"], row["dtype"]), {})[row["form"]] = row
    lines = []
    for case, forms in cases.items():
        padded, cropped = forms["padded"], forms["four groups"]
        figures = [f"{float(row[name]):,.0f}" for name in ("p50_ms", "extra_mib") for row in (padded, cropped)]
        lines.append((*case, figures[0], figures[1], padded["times_ours"], *figures[2:]))
    head = ("texts", "dtype", "padded, ms", "cropped, ms", "times", "padded, extra MiB", "cropped, extra MiB")
    return markdown(head, lines, ("texts", "dtype")) + source(path, rows, "On a CPU")


def caching() -> list[str]:
    """Returns a table with a row for each form in bfloat16: time, and memory, which was measured at another batch size."""
    path, rows = read("gradient_cache", dtype="bfloat16")
    times, memory = ([row for row in rows if row[name]] for name in ("p50_ms", "extra_mib"))
    timed = {row["form"]: row for row in times}
    head = ("form", f"N = {int(times[0]['n']):,}, ms, median", "times simplclip's", f"N = {int(memory[0]['n']):,}, extra MiB")
    lines = []
    for row in memory:
        time = timed.get(row["form"])
        ms, ratio = (f"{float(time['p50_ms']):,.0f}", time["times_ours"]) if time else ("", "")
        lines.append((row["form"], ms, ratio, f"{float(row['extra_mib']):,.0f}"))
    what = f"Forward and backward of {times[0]['shape']}, bfloat16, on a CPU"
    return markdown(head, lines, ("form",)) + source(path, rows, what)


def ablation() -> list[str]:
    """Returns a table with a row for each of EFFECTS: R@1 of base and variant, and the paired difference."""
    path, rows = read("ablation", measure="R@1", split="all")
    effects = {row["effect"]: row for row in rows}
    head = ("effect", "steps", "seeds", "base", "variant", "difference, 95 % interval", "p")
    lines = []
    for row in (effects[name] for name in EFFECTS):
        base, variant = (f"{float(row[s]):.1f} ± {float(row[f'{s} std']):.1f}" for s in ("base", "variant"))
        low, high = float(row["low"]), float(row["high"])
        difference = f"{float(row['difference']):+.2f} ({low:+.2f} to {high:+.2f})"
        p = f"{float(row['p']):.3f}"
        lines.append((row["effect"], row["variant steps"], row["seeds"], base, variant, difference, p))
    first = rows[0]
    return [
        *markdown(head, lines, ("effect",)),
        "",
        "R@1 in per cent, the mean over `concepts` and `vendor` and both directions: mean ± standard deviation of the seeds, "
        "the paired difference, and p of the paired t-test, not corrected for the number of effects. "
        f"siclip-lite0 on the built-in data; {first['hardware']}, torch {first['torch']}, commit {first['commit']}, "
        f"{first['date']} ({link(path)}, [drawn]({LINK}/{path.stem}.png): {len(rows)} effects; `make ablation`).",
    ]


def demo() -> list[str]:
    path = newest("demo-*.json")
    result = json.loads(path.read_text())
    head = ("held out", "find", "R@1", "R@5", "R@10", "chance of R@5")
    lines = []
    for split, entry in result["splits"].items():
        for direction, among in (("image_to_text", "texts"), ("text_to_image", "images")):
            recalls = [f"{entry[direction][f'R@{k}']['value']:.1%}" for k in (1, 5, 10)]
            find = "an image's caption" if among == "texts" else "a caption's images"
            chance = f"{entry[direction]['R@5']['chance']:.2%}"
            lines.append((split, f"{find}, among {entry[among]:,}", *recalls, chance))
    return [
        *markdown(head, lines, ("held out", "find")),
        "",
        f"{result['model']}, {result['step']} steps, one seed, "
        f"{result['samples_per_second']:.0f} samples/s; "
        f"{result['hardware']}, torch {result['torch']}, commit {result['commit']}, {result['date']} "
        f"(`{path.relative_to(ROOT)}`). "
        "`concepts` are drawings of things that training never saw, `vendor` a third vendor's drawings of things it did.",
    ]


def plan(name: str) -> list[str]:
    """Returns a table of the pairs of a step that fit the card: in one graph, beside open_clip's, and by gradient caching."""
    path = newest(f"plan-{name}-*.json")
    result = json.loads(path.read_text())
    theirs, what = result["open_clip"]["batch_size"], result["open_clip"]["what"].removeprefix("open_clip:")
    head = ("model", "in one graph", "times open_clip's", "by gradient caching", "at a time")
    lines = [(f"open_clip: {what}", f"{theirs:,}", "1.0", "", "")]
    for case, made in result["plans"].items():
        one, cached = (row for row in made["rows"] if row["what"].startswith("largest"))
        whole = f"{one['batch_size']:,}", f"{one['batch_size'] / theirs:.1f}"
        more = " or more" * cached["at_least"]
        lines.append((f"{name}, {case}", *whole, f"{cached['batch_size']:,}{more}", str(cached["micro_batch"])))
    first = next(iter(result["plans"].values()))
    gib = 2**30
    return [
        *markdown(head, lines, ("model",)),
        "",
        f"Pairs of a training step in {first['usable'] / gib:.2f} GiB of the {first['memory'] / gib:.0f} of an RTX 3090, "
        f"{first['precision']}; CLIP and relational distillation from stored features of width {result['teacher_width']} "
        f"where nothing else is said. Predicted up to 5 %, not measured: no GPU was there. Torch {result['torch']}, "
        f"commit {result['commit']}, {result['date']} ({link(path)}; `make plan`).",
    ]


def predicted() -> list[str]:
    """Returns a table with a row for each call: first and last milliseconds by card, and the first card's bounds.

    Leaves out calls that are not in PREDICTED. The result file has all calls.
    """
    path, rows = read("bound_calls", passes=BOTH, dtype="bfloat16", call=PREDICTED)
    rows = [row for row in rows if not row["shape"].startswith(("N=4096 ", "N=32768 "))]
    cards = list(dict.fromkeys(row["card"] for row in rows))
    cases: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for row in rows:
        cases.setdefault((row["call"], row["shape"]), {}).setdefault(row["card"], []).append(row)
    head = ["call", "size", *(f"{card}, ms" for card in cards), "bound by", "of peak", "GB", "kernels"]
    lines = []

    def change(found: list[dict[str, str]], name: str, show) -> str:
        return " → ".join(dict.fromkeys(show(float(row[name])) for row in (found[0], found[-1])))

    for (call, size), by_card in cases.items():
        first = by_card[cards[0]]
        ms = [change(by_card[card], "predicted_ms", lambda ms: f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}") for card in cards]
        cells = [call, size, *ms, first[-1]["pipe"], change(first, "share_of_peak", lambda share: f"{share:.0%}")]
        cells.append(change(first, "bytes", lambda count: f"{count / 1e9:,.2f}"))
        cells.append(change(first, "launches", lambda count: f"{count:,.0f}"))
        lines.append(cells)
    stated = "; ".join(f"{card} {product} TFLOP/s, {memory} TB/s and {cache} TB/s"
                       for card, (product, memory, cache) in assumed.SUSTAINED.items() if card in cards)  # fmt: skip
    marks = ", ".join(dict.fromkeys(f"{row['label']} {row['commit']}, {row['date']}" for row in rows))
    return [
        *markdown(head, lines, ("call", "size", "bound by")),
        "",
        f"Predicted, never measured: forward and backward in bfloat16. What bounds a call, its share of the card's peak, the "
        f"bytes of memory (without operands of products and blocks of a gradient, which the file has) and the kernels, "
        f"torch's too, are of {cards[0]}. Assumed: cuBLAS, memory and cache reach {stated}; "
        f"{'; '.join(assumed.ASSUMPTIONS[1:])}. "
        f"Torch {rows[-1]['torch']}, Triton {rows[-1]['triton']}, commits: {marks} ({link(path)}, kernels in "
        f"{link(newest('bound_kernels-*.csv'))}; `python -m benchmarks.bound --label after`).",
    ]


def of_bundle(path: Path) -> list[str]:
    """Returns a table of a bundle's figures in bfloat16: losses, steps, largest batches and the loader."""
    with open(path, newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["op"] in BUNDLED and row["dtype"] in ("bfloat16", "") and row["form"]
        ]
    rows = [row for row in rows if not row.get("note")]
    head = ("what", "form", "ms, median", "times ours", "samples/s", "MiB", "planned MiB", "largest batch", "planned")
    names = ("case", "form", "p50_ms", "times_ours", "samples_per_s", "mib", "predicted_mib", "pairs", "predicted_pairs")
    lines = markdown(head, [[row.get(name) or "" for name in names] for row in rows], head[:2])
    first = rows[0]
    told = f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, {first['date']}"
    return [*lines, "", f"{told} ([{path.parent.name}]({LINK}/{path.parent.name}); `python -m benchmarks.gpu`)."]


def card() -> list[str]:
    """Returns the table of the newest bundle that a card has measured."""
    bundles = [path for path in RESULTS.glob("*/rows.csv") if " threads of " not in path.read_text()]
    if not bundles:
        return ["No card has measured anything yet: this table is made from what `python -m benchmarks.gpu` writes."]
    return of_bundle(max(bundles, key=lambda path: path.parent.name[-10:]))


def figures() -> list[str]:
    """Returns the README's table: a loss, a block and a training step, each beside the form that it replaces."""

    def of_forms(op: str, *forms: str, **where: str) -> list[dict[str, str]]:
        rows = {row["form"]: row for row in read(op, **where)[1]}
        return [rows[form] for form in forms]

    def hardware(row: dict[str, str]) -> str:
        return f"{row['hardware']}; {row['date']}"

    dense, compiled = "open_clip.ClipLoss", "torch.compile, one product"
    loss = of_forms("similarity_loss", "simplclip", dense, compiled, objective="contrastive", n="16384", dtype="float32")
    shape = "B=64 L=77 C=512 causal"
    block = of_forms("simplified_block", "simplclip", "open_clip's block", shape=shape, dtype="bfloat16", passes=BOTH)
    plain = "plain torch blocks, dense losses"
    step = of_forms("training", "simplclip", plain, objective="contrastive, pair matching", n="1024", dtype="bfloat16")
    seconds = [f"{float(row['p50_ms']) / 1000:.1f} s, {float(row['extra_mib']):,.0f} MiB" for row in loss]
    tokens = [f"{float(row['p50_ms']):,.0f} ms, {int(row['saved_bytes_per_token']):,} bytes" for row in block]
    samples = [f"{int(row['samples_per_s']):,} samples/s, {float(row['extra_mib']):,.0f} MiB" for row in step]
    of_loss = f"Contrastive loss of {int(loss[0]['n']):,} pairs, D = {loss[0]['d']}, float32: time, "
    in_place = f"`{dense}`: {seconds[1]}; the loss with one product by `torch.compile`: {seconds[2]}"
    of_block = f"One block of CLIP's text tower, {shape}, bfloat16: time, bytes kept per token for backward"
    of_step = f"Training step of {step[0]['shape']}, {int(step[0]['n']):,} pairs, {step[0]['objective']}, bfloat16: "
    head = ("measured", "simplclip", "in its place", "hardware")
    lines = [
        (f"{of_loss}memory beside the features", seconds[0], in_place, hardware(loss[0])),
        (of_block, tokens[0], f"open_clip's block: {tokens[1]}", hardware(block[0])),
        (f"{of_step}throughput, memory beside the weights", samples[0], f"{plain}: {samples[1]}", hardware(step[0])),
    ]
    return [
        *markdown(head, lines, head),
        "",
        "Forward and backward, medians of interleaved runs on a CPU. Written by `make tables` from `benchmarks/results`.",
    ]


README, BENCHMARKS = "README.md", "docs/benchmarks.md"
CHARTS = {"docs/similarity_loss.svg": chart.SIMILARITY, "docs/sigmoid_loss.svg": chart.SIGMOID}
TABLES = {
    README: {"figures": figures, "demo": demo},
    BENCHMARKS: {
        "similarity_loss": lambda: op_table("similarity_loss", n="8192", dtype="float32"),
        "sigmoid_loss": lambda: op_table("sigmoid_loss", n="16384", objective="sigmoid", dtype="bfloat16", form=SIGMOID),
        "simplified_block": lambda: op_table("simplified_block", passes=BOTH, dtype="bfloat16"),
        "shaped_attention": attention_table,
        "siclip_s0_step": lambda: op_table("siclip_s0_step", dtype="bfloat16"),
        "texts": texts,
        "towers": lambda: op_table("towers", shape="both: 64 texts, 8 images", dtype="bfloat16"),
        "gradient_cache": caching,
        "plan": lambda: plan("siclip-s0"),
        "card": card,
        "predicted": predicted,
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
    for name, drawn in CHARTS.items():
        path, rows = read(drawn.op)
        files[name] = chart.draw(drawn, rows, str(path.relative_to(ROOT)))
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in files.items() if not (ROOT / name).exists() or (ROOT / name).read_text() != text]
        sys.exit(f"{', '.join(stale)}: not what the result files say; run make tables" if stale else 0)
    for name, text in files.items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    main()
