"""Plans ten epochs of 12.4 million pairs on one card, by this library and by open_clip's trainer,
and the ways to fine-tune ViT-B-32: no GPU is needed.

Also the likely milliseconds of losses and of steps on several cards.

The row of siclip-s0 has the figures of "largest in one graph" of `simplclip plan siclip-s0 --card
3090 --teacher-width 768`. Writes benchmarks/results/plan-hours-*.csv, plan-finetune-*.csv and
plan-likely-*.csv.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from benchmarks import similarity_forms
from benchmarks.cards import calls
from benchmarks.cards.bound import SHOWN as CARDS_OF_LOSSES
from benchmarks.results_file import RESULTS, table, versions, write_csv
from benchmarks.steps import TEACHER_WIDTH, OpenClipStep
from simplclip import simplify
from simplclip.plan.cards import CARDS, GIB
from simplclip.plan.count import Usage
from simplclip.plan.kernels import Kernel
from simplclip.plan.measure import on_card, predict
from simplclip.plan.search import Budget, Planner, predict_graphs
from simplclip.plan.time import step_time
from simplclip.train import config

SHOWN = ("rtx-3090", "rtx-4090", "rtx-5090")
PAIRS, PASSES = 12_400_000, 10
CC12M_TOKENS = 23.3  # of a caption, with start and end
PLAIN = {
    "model": {"name": "open_clip:ViT-B-32"},
    "data": {"train": "planned/*.tar", "mean_tokens": CC12M_TOKENS},
}


def plain_config() -> config.Config:
    return config.from_dict(PLAIN | {"run": {"out": "runs/planned", "precision": "bf16"}})


def ours(values: config.Config) -> Callable[[int], Usage]:
    return Planner(
        values, Budget(24 * GIB), teacher_width=TEACHER_WIDTH, card="rtx-3090"
    ).predict_in_one_graph


def theirs(name: str) -> Callable[[int], Usage]:
    """A step of open_clip's trainer with its loss, all weights trained."""
    return lambda pairs: predict(OpenClipStep(name, pairs, "bf16"), torch.device("cuda", 0))


FINETUNED: dict[str, dict[str, dict]] = {
    "full, also with layer decay": {},
    "LoRA, rank 8": {"model": {"lora": {"rank": 8}}},
    "LoRA, rank 64": {"model": {"lora": {"rank": 64}}},
    "image tower alone, by lr_scale": {"optim": {"lr_scale": {"*": 0, "visual.*": 1}}},
}
FINETUNED_PAIRS = (32, 256)
FORMS: dict[str, Callable[[], Callable[[int], Usage]]] = {
    "siclip-s0, as configured": lambda: ours(config.load("siclip-s0")),
    "siclip2-s0, as configured": lambda: ours(config.load("siclip2-s0")),
    "MobileCLIP-S0 whole, open_clip's trainer": lambda: theirs("mobileclip-s0"),
    "ViT-B-32, simplclip": lambda: ours(plain_config()),
    "ViT-B-32, open_clip's trainer": lambda: theirs("open_clip:ViT-B-32"),
}


# Pairs and widths of losses, and pairs of steps in one graph.
LOSS_SIZES = (32768, 65536), (512, 768)
STEPS = {"siclip-s0, as configured": 1024, "ViT-B-32, simplclip": 512}
# Of more than 80 image tokens, whose attention is torch's beside two kernels of the library.
SIMPLIFIED = {"open_clip:ViT-B-16": 256, "open_clip:ViT-L-14": 128}


def finetuned(changes: dict[str, dict]) -> dict[str, object]:
    """Returns what a step of ViT-B-32 takes on the first of SHOWN with these settings."""
    values = plain_config().replaced(**changes)
    budget = Budget(CARDS[SHOWN[0]].memory * GIB)
    planner = Planner(values, budget, card=SHOWN[0])
    few, many = (planner.predict_row("step", pairs, None) for pairs in FINETUNED_PAIRS)
    weights = planner.step.prepared.model.parameters()
    return {
        "trained": sum(weight.numel() for weight in weights if weight.requires_grad),
        "gib of few": round(few.peak / GIB, 2),
        "gib": round(many.peak / GIB, 2),
        "images_per_s": round(many.images_per_s),
        "most_pairs": planner.find_largest("largest", None).batch_size,
    }


def fine_tuning() -> None:
    """Writes the file of ways to fine-tune."""
    where = versions()
    rows = [{"form": form} | finetuned(changes) for form, changes in FINETUNED.items()]
    print("\n".join(table(rows)))
    path = RESULTS / f"plan-finetune-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


def hours() -> None:
    """Writes the file of ten epochs."""
    rows = []
    limits = [Budget(CARDS[card].memory * GIB).usable for card in SHOWN]
    for form, make in FORMS.items():
        graphs = predict_graphs(make(), min(limits), max(limits), print)
        row: dict[str, object] = {"form": form}
        for card, limit in zip(SHOWN, limits):
            pairs, rate = graphs.largest_batch(limit, CARDS[card])
            row |= {f"{card} pairs": pairs, f"{card} images/s": round(rate)}
            row |= {f"{card} hours": round(PASSES * PAIRS / rate / 3600, 1)}
        rows.append(row)
    print("\n".join(table(rows)))
    where = versions()
    path = RESULTS / f"plan-hours-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


def likely_chunks(card: str, n: int, width: int) -> list[Kernel]:
    """Returns the kernels of torch's linear_cross_entropy as a contrastive loss on a card.

    Its op is a single one for fake tensors, so that its function runs in its place. Backward, which
    scales the gradients that forward made, is left out.
    """
    from torch.nn.modules import linear_cross_entropy  # of torch 2.13 or later

    name = "_linear_cross_entropy_batch_chunked"
    op = getattr(linear_cross_entropy, name)

    def function(*arguments: object) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return op._init_fn(*arguments)

    features = {"dtype": torch.bfloat16, "requires_grad": True, "device": "cuda"}
    with on_card(CARDS[card]) as kernels, mock.patch.object(linear_cross_entropy, name, function):
        image, text = (torch.empty(n, width, **features) for _ in range(2))
        similarity_forms.linear_cross_entropy(image, text, torch.empty((), device="cuda"))
    return kernels


def likely_row(form: str, kernels: list[Kernel]) -> dict[str, object]:
    """Returns a row of the file of `likely`."""
    times = {f"{card} ms": step_time(kernels, CARDS[card]).likely for card in CARDS_OF_LOSSES}
    traffic = sum(kernel.bytes * kernel.times for kernel in kernels)
    launches = step_time(kernels, CARDS[SHOWN[0]]).launches
    row: dict[str, object] = {"form": form, "bytes": traffic, "launches": launches}
    return row | {name: round(ms, 2) for name, ms in times.items()}


def likely() -> None:
    """Writes the file of losses and steps in milliseconds."""
    where = versions()
    rows: list[dict[str, object]] = []
    for terms, n, width in itertools.product(("contrastive", "sigmoid"), *LOSS_SIZES):
        row: dict[str, object] = {}
        for card in CARDS_OF_LOSSES:
            with on_card(CARDS[card]) as kernels:
                calls.loss((terms,), n, width, torch.bfloat16, backward=True)
            of_card = likely_row(f"{terms} loss, {n:,} pairs, D = {width}", kernels)
            # bytes and launches of the first card
            row = of_card | row | {f"{card} ms": of_card[f"{card} ms"]}
        rows.append(row)
    for n, width in itertools.product(*LOSS_SIZES):
        kernels = likely_chunks(SHOWN[0], n, width)
        form = f"contrastive loss by {similarity_forms.TORCH}, {n:,} pairs, D = {width}"
        rows.append(likely_row(form, kernels))
    for form, pairs in STEPS.items():
        kernels = FORMS[form]()(pairs).kernels  # with an RTX 3090's tiles
        rows.append(likely_row(f"step of {form}, {pairs} pairs", kernels))
    for name, pairs in SIMPLIFIED.items():
        step = OpenClipStep(name, pairs, "bf16")
        simplify(step.model)
        kernels = predict(step, torch.device("cuda", 0)).kernels
        form = f"step of {name.partition(':')[2]} of simplified blocks, {pairs} pairs"
        rows.append(likely_row(form, kernels))
        for own in ("shaped_attention_terms", "shaped_attention_gradients"):
            part = [kernel for kernel in kernels if kernel.name == own]
            rows.append(likely_row(f"{form}: {own}", part))
    print("\n".join(table(rows)))
    path = RESULTS / f"plan-likely-{where['date']}.csv"
    write_csv(path, [row | where for row in rows])
    print(f"wrote {path}")


def main() -> None:
    hours()
    fine_tuning()
    likely()


if __name__ == "__main__":
    main()
