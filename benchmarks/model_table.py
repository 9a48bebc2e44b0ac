"""The table of what works with open_clip's models, from the result file of open_clip_models."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.results_file import RESULTS, read_csv

# A column of the result file -> its title.
COLUMNS = {
    "crop_texts": "crop_texts",
    "simplify_text": "simplify, text",
    "simplify_image": "simplify, image",
    "gradient_cache": "gradient_cache",
    "fold": "fold",
    "plan": "plan",
}
# A family of models that behave alike -> a pattern of their names; the first that fits counts.
FAMILIES = {
    "ViTs of CLIP and OpenCLIP": r"ViT-\w+-\d+(?!.*(SigLIP|CLIPA))",
    "CLIPA": r".*CLIPA",
    "SigLIP, SigLIP 2": r".*SigLIP(?!.*naflex)",
    "SigLIP 2 with NaFlex": r".*SigLIP2-naflex",
    "ResNet": r"RN",
    "ConvNeXt": r"convnext",
    "Swin": r"swin",
    "timm's ViT, relative positions": r"vit_relpos",
    "timm's ViT": r"vit_",
    "EVA, Perception Encoder": r"EVA|PE-Core",
    "ViTamin": r"ViTamin",
    "MobileCLIP-B": r"MobileCLIP2?-B",
    "MobileCLIP2-L-14": r"MobileCLIP2-L",
    "MobileCLIP-S": r"MobileCLIP",
    "CoCa": r"coca_(?!roberta)",
    "CoCa with RoBERTa": r"coca_roberta",
    "Hugging Face's text towers, mean pooled": r"roberta|xlm|mt5",
    "Hugging Face's text towers, first token": r"nllb|gte",
    "NaFlex ViT": r"naflex_ViT",
    "ViT with a modern text tower": r"moderntext-ViT",
    "NaFlex ViT with a modern text tower": r"moderntext-naflex",
    "CLAP (audio)": r"CLAP-|naflexclap",
    "GenLIP, GenLAP (write captions)": r"naflexgenl",
}
NOT_TRIED = "not tried"
Row = dict[str, str]


def family_of(model: str) -> str:
    """Returns the family of a model; ValueError without any."""
    for family, pattern in FAMILIES.items():
        if re.match(pattern, model):
            return family
    raise ValueError(f"model: expected a name that FAMILIES describes, got {model}")


def outcome(cell: str) -> str:
    """Returns "works", "nothing to fold", "refused" or "not tried"."""
    if cell in ("works", "nothing to fold"):
        return cell
    return NOT_TRIED if cell.startswith(NOT_TRIED) else "refused"


def reason(cell: str) -> str:
    """Returns what an error says that it got, without names in the model."""
    if cell.startswith(NOT_TRIED):
        return cell.removeprefix(f"{NOT_TRIED}: ")
    text = cell.partition(", got ")[2] or cell
    text = re.sub(r"'[^']*',? ?", "", text)
    return re.split(r": | \((?!GenL|CLAP)", text)[0].strip()


def lines() -> list[str]:
    """Returns a line for each family, or two where versions or models of it differ, and notes."""
    path = max(RESULTS.glob("open-clip-models-*.csv"), key=lambda path: path.stem[-10:])
    rows = read_csv(path)
    versions = sorted({row["open_clip"] for row in rows})
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[family_of(row["model"]), *(outcome(row[name]) for name in COLUMNS)].append(row)
    reasons: dict[str, int] = {}
    table = []
    for (family, *outcomes), alike in sorted(groups.items(), key=lambda item: _place(item[0])):
        counts = [str(sum(row["open_clip"] == each for row in alike)) for each in versions]
        cells = [_cell(alike, *pair, reasons) for pair in zip(COLUMNS, outcomes)]
        table.append(f"| {' | '.join([family, *counts, *cells])} |")
    counts = [str(sum(row["open_clip"] == each for row in rows)) for each in versions]
    head = ["models", *versions, *COLUMNS.values()]
    marks = ["---", *["--:"] * len(versions), *["---"] * len(COLUMNS)]
    commits = ", ".join(sorted({f"torch {row['torch']}, commit {row['commit']}" for row in rows}))
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join(marks)}|",
        *table,
        f"| all | {' | '.join(counts)} | {' | '.join([''] * len(COLUMNS))} |",
        "",
        "The error names the reason:",
        "",
        *(f"- [{number}] {text}" for text, number in reasons.items()),
        "",
        f"{commits}, {rows[0]['date']} ([{path.name}](../benchmarks/results/{path.name}); "
        "`python -m benchmarks.open_clip_models`).",
    ]


def _place(key: Sequence[str]) -> tuple:
    """Returns by what lines are sorted: families in their order."""
    return list(FAMILIES).index(key[0]), *key[1:]


def _cell(alike: Sequence[Row], name: str, result: str, reasons: dict[str, int]) -> str:
    """Returns a cell for models that behave alike; numbers its reason in `reasons`."""
    if result in ("works", "nothing to fold"):
        return result
    text = " or ".join(dict.fromkeys(reason(row[name]) for row in alike))
    text = f"{COLUMNS[name]}: {text}" if result == "refused" else text
    return f"{result} [{reasons.setdefault(text, len(reasons) + 1)}]"
