"""Zero-shot evaluation of a checkpoint: retrieval both ways and classification, each figure beside its chance.

run               checkpoint and named splits -> tables, JSON, contact sheets
load_model        rebuilds the model of a checkpoint
retrieval         R@k from features, group-aware, chunk by chunk
zero_shot         accuracy over the labels of a split, by open_clip's classifier
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip import build_zero_shot_classifier
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import simplclip
from simplclip import checkpoint as checkpoints
from simplclip import config as configs
from simplclip import data, hardware, models, plots

KS = (1, 5, 10)
_CHUNK_BYTES = 64 * 2**20


@dataclass
class Split:
    """A held-out split in memory, and after `encode` its features.

    Identical captions of one group (a concept drawn by several vendors) are one candidate: m <= n captions.
    """

    data: data.EvalSet  # images [n, 3, S, S], groups int64 [n], ...
    captions: list[str]  # m
    tokens: Tensor  # int64 [m, L]
    caption_groups: Tensor  # int64 [m]
    image_features: Tensor | None = None  # float32 [n, D]
    text_features: Tensor | None = None  # float32 [m, D]

    @classmethod
    def of(cls, found: data.EvalSet) -> Split:
        first: dict[tuple[int, str], int] = {}
        for i, key in enumerate(zip(found.groups.tolist(), found.captions)):
            first.setdefault(key, i)
        rows = list(first.values())
        return cls(found, [found.captions[i] for i in rows], found.text[rows], found.groups[rows])


def run(
    checkpoint: str | Path,
    splits: Mapping[str, str | list[str]] | None = None,
    *,
    out: str | Path | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    skip_missing: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate `checkpoint` on `splits` (name -> shards; None: eval.splits of its config).

    Writes OUT/evaluation.json and OUT/evaluation-<split>.png (OUT: None for the checkpoint's folder), prints one table
    and returns what the JSON got. Splits that were evaluated before stay in the JSON as they were, each with the checkpoint,
    model, step and precision that it was evaluated with. skip_missing leaves out splits whose shards do not exist, and says
    so; where none is left, the JSON is not written.
    Errors: FileNotFoundError, CheckpointError (no checkpoint, or of another architecture), ValueError (also for an
    evaluation.json that is none).
    """
    console = console or Console()
    place = hardware.pick_device(device)
    precision, _ = hardware.pick_precision(precision, place)
    model, config, state = load_model(checkpoint, place)
    hardware.set_threads(threads or config.run.threads)
    folder = Path(out) if out else (Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent)
    splits = dict(splits or config.eval.splits)
    if not splits:
        raise ValueError(
            "data: expected at least one split (--data name=shards), came none, and the checkpoint's config "
            "has no eval.splits"
        )
    loaded, missing = load_splits(splits, config, skip_missing)
    for name, reason in missing.items():
        console.print(f"left out {name}: {reason}", markup=False, highlight=False, soft_wrap=True)

    file = folder / "evaluation.json"
    _earlier(file)  # what cannot be added to is told before the work
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    made_by = {"checkpoint": str(checkpoint), "model": config.model.name, "step": state["step"], "precision": precision}
    for name, split in loaded.items():
        encode(model, split, batch_size or config.eval.batch_size, place, precision)
        classes = zero_shot(
            model, split, models.tokenizer(config.model.name), templates or config.eval.templates, place, precision
        )
        console.print(f"{name}: {split.data.report()}", markup=False, highlight=False, soft_wrap=True)
        sheet = folder / f"evaluation-{name}.png"
        figures = retrieval(split)
        plots.contact_sheet(
            sheet,
            split,
            f"{config.model.name}, step {state['step']}: {name}",
            (
                _in_words(figures["text_to_image"], len(split.data)),
                _in_words(figures["image_to_text"], len(split.captions)),
            ),
        )
        results[name] = {
            "images": len(split.data.images),
            "texts": len(split.captions),
            **figures,
            "zero_shot": classes,
            "contact_sheet": str(sheet),
            **made_by,
        }
    answer = {
        **made_by,
        "versions": {"simplclip": simplclip.__version__, "torch": torch.__version__},
        "splits": results,
    }
    if not results:
        console.print(f"nothing was evaluated; {file} is not written", markup=False, highlight=False, soft_wrap=True)
        return answer
    with checkpoints.locked(folder):
        whole = {**answer, "splits": _earlier(file) | results}
        checkpoints.write_atomically(file, json.dumps(whole, indent=2) + "\n")
    console.print(table(answer))
    for path in [file, *(r["contact_sheet"] for r in results.values())]:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    return answer


def _earlier(file: Path) -> dict[str, Any]:
    """The splits of an evaluation.json, each with what it was evaluated with. Errors: ValueError."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
        shared = {key: found[key] for key in ("checkpoint", "model", "step", "precision")}
        return {name: shared | split for name, split in found["splits"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"out: expected an evaluation to add splits to, or none, came {file}, which is none: move it"
        ) from None


def build_model(config: configs.Config) -> nn.Module:
    """The model that `config` names, with random weights. Errors: ConfigError for options it does not take."""
    try:
        return models.create(config.model.name, **config.model.options)
    except TypeError as error:
        raise configs.ConfigError(
            f"model.options: {config.model.name} does not take {config.model.options}: {error}"
        ) from error


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, configs.Config, dict[str, Any]]:
    """Model in eval mode, config and raw state of a checkpoint. Errors: FileNotFoundError, CheckpointError."""
    state = checkpoints.load(path)
    config = configs.from_dict(state["config"])
    model = build_model(config)
    try:
        model.load_state_dict(state["model"], strict=True)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise checkpoints.CheckpointError(
            f"{path}: its weights do not fit the architecture {config.model.name!r} of its config: {' '.join(reasons)[:300]}"
        ) from None
    return model.to(device).eval(), config, state


def load_splits(
    splits: Mapping[str, str | list[str]], config: configs.Config, skip_missing: bool = False
) -> tuple[dict[str, Split], dict[str, str]]:
    """Read splits for the model of `config`. Returns them by name, and the reasons of those left out."""
    loaded, missing = {}, {}
    tokenizer = models.tokenizer(config.model.name)
    transform = models.transforms(config.model.name, train=False, image_size=config.model.image_size)
    for name, shards in splits.items():
        if skip_missing:
            try:
                data.expand(shards)
            except ValueError as error:
                missing[name] = str(error)
                continue
        loaded[name] = Split.of(data.load_eval(shards, tokenizer, transform))
    return loaded, missing


@torch.no_grad()
def encode(model: nn.Module, split: Split, batch_size: int, device: torch.device, precision: str) -> None:
    """Fill in the features of a split: normalised, float32, on `device`."""
    with hardware.autocast(precision, device):
        for name, encoder, inputs in (
            ("image_features", model.encode_image, split.data.images),
            ("text_features", model.encode_text, split.tokens),
        ):
            parts = [encoder(part.to(device), normalize=True).float() for part in inputs.split(batch_size)]
            features = torch.cat(parts)
            if not features.isfinite().all():
                raise ValueError(f"checkpoint: the model gives {name.replace('_', ' ')} that are not finite")
            setattr(split, name, features)


def retrieval(split: Split, ks: Sequence[int] = KS) -> dict[str, dict[str, dict[str, float]]]:
    """R@k of an encoded split both ways: direction -> "R@k" -> {"value", "chance"}, as shares of 1."""
    x, y = split.image_features, split.text_features
    x_groups, y_groups = split.data.groups, split.caption_groups
    return {
        "image_to_text": recall(x, y, x_groups, y_groups, ks),
        "text_to_image": recall(y, x, y_groups, x_groups, ks),
    }


def recall(
    queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor, ks: Sequence[int] = KS
) -> dict[str, dict[str, float]]:
    """Share of queries that have a candidate of their own group among the k nearest.

    queries: [n, D], candidates: [m, D], groups: int64 [n] and [m]. With as many groups as pairs this is the usual R@k.
    "chance" is the same share when candidates are ranked at random: for r right ones of m, 1 - C(m-r, k)/C(m, k),
    averaged over the queries. Extra memory: a chunk of queries against all candidates, 64 MiB; never [n, m].
    """
    query_groups, candidate_groups = query_groups.to(queries.device), candidate_groups.to(queries.device)
    m, top = len(candidates), min(max(ks), len(candidates))
    chunk = max(1, _CHUNK_BYTES // (4 * m))
    hits = torch.cat(
        [
            candidate_groups[(q @ candidates.T).topk(top).indices] == g[:, None]
            for q, g in zip(queries.split(chunk), query_groups.split(chunk))
        ]
    )
    names, counts = candidate_groups.unique(return_counts=True)
    place = torch.searchsorted(names, query_groups).clamp(max=len(names) - 1)
    right = torch.where(names[place] == query_groups, counts[place], 0).double()
    answer = {}
    for k in ks:
        tries = torch.arange(min(k, m), device=right.device)
        miss = ((m - right[:, None] - tries).clamp(min=0) / (m - tries)).prod(1)
        answer[f"R@{k}"] = {"value": hits[:, :k].any(1).double().mean().item(), "chance": (1 - miss).mean().item()}
    return answer


@torch.no_grad()
def zero_shot(
    model: nn.Module, split: Split, tokenizer: Any, templates: Sequence[str], device: torch.device, precision: str
) -> dict[str, Any] | None:
    """Accuracy over the split's own labels, or None where fewer than two occur.

    Each label's weight is the mean of its features over `templates` (open_clip's build_zero_shot_classifier). Images
    without a label are left out; "images" counts the rest.
    """
    bad = [t for t in templates if t.count("{}") != 1]
    if bad:
        raise ValueError(f"template: expected a phrase with one {{}} for the label, came {bad[0]!r}")
    labels = split.data.labels
    classes = sorted({label for label in labels if label})
    if len(classes) < 2:
        return None
    rows = [i for i, label in enumerate(labels) if label]
    truth = torch.tensor([classes.index(labels[i]) for i in rows], device=device)
    with hardware.autocast(precision, device):
        weights = build_zero_shot_classifier(model, tokenizer, classes, list(templates), device=device)
    ranked = (split.image_features[rows] @ weights.float()).topk(min(5, len(classes))).indices == truth[:, None]
    return {"classes": classes, "images": len(rows), "templates": list(templates)} | {
        f"top{k}": {"value": ranked[:, :k].any(1).double().mean().item(), "chance": min(1.0, k / len(classes))}
        for k in (1, 5)
    }


def table(results: Mapping[str, Any]) -> Table:
    """The figures of `run` for a terminal of 80 columns: per cent and chance."""
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
    value, chance = figure["value"], figure["chance"]
    return f"{value:.1%} [dim]({chance:.1%})[/dim]"


def _in_words(figures: Mapping[str, Mapping[str, float]], among: int) -> str:
    found = "   ".join(f"{k} {v['value']:.1%}" for k, v in figures.items())
    chance = ", ".join(f"{100 * v['chance']:.1f}" for v in figures.values())
    return f"{found}   of {among} (chance {chance}%)"
