"""Prints the tables of docs/plan.md and docs/fine-tuning.md: hours of ten epochs of 12.4 million
pairs on a card, and the ways to fine-tune ViT-B-32, as `simplclip plan` predicts them.
"""

from __future__ import annotations

from typing import Any

from simplclip.commands.plan import images_per_s
from simplclip.plan.cards import CARDS, GIB
from simplclip.plan.step import Step
from simplclip.train import config

SHOWN = ("rtx-3090", "rtx-4090", "rtx-5090")
PAIRS = 10 * 12_400_000
CC12M_TOKENS = 23.3  # of a caption, with start and end
FINETUNED: dict[str, dict[str, Any]] = {
    "full, also with layer decay": {},
    "LoRA, rank 8": {"model": {"lora": {"rank": 8}}},
    "LoRA, rank 64": {"model": {"lora": {"rank": 64}}},
    "image tower alone, by lr_scale": {"optim": {"lr_scale": {"*": 0, "visual.*": 1}}},
}
FEW, MANY = 32, 256  # pairs of a step of fine-tuning


def plain(name: str, tokens: float | None) -> config.Config:
    """Returns the config of a model of open_clip or of this library, all of which is trained."""
    data = {"train": "planned/*.tar", "mean_tokens": tokens, "batch_size": MANY}
    run = {"out": "runs/planned", "precision": "bf16", "steps": 1}
    return config.from_dict({"model": {"name": name}, "data": data, "run": run})


FORMS = {
    "siclip-s0, as configured": lambda: config.load("siclip-s0"),
    "siclip2-s0, as configured": lambda: config.load("siclip2-s0"),
    "mobileclip-s0, all trained, texts of 77 tokens": lambda: plain("mobileclip-s0", None),
    "ViT-B-32, texts at their length": lambda: plain("open_clip:ViT-B-32", CC12M_TOKENS),
    "ViT-B-32, texts of 77 tokens": lambda: plain("open_clip:ViT-B-32", None),
}


def hours() -> None:
    """Prints the table of hours."""
    heads = "".join(f" {name[4:]}: pairs | images/s | hours |" for name in SHOWN)
    print(f"| ten epochs of 12.4 million pairs |{heads}")
    print("|---" + 3 * len(SHOWN) * "|--:" + "|")
    for form, make in FORMS.items():
        values = make()
        cells = [form]
        step = Step(values, "bf16")
        for card in SHOWN:
            memory = CARDS[card].memory * GIB
            row = step.largest(memory)
            if "configured" in form:
                row = step.row(values.data.batch_size, values.data.micro_batch, memory)
            each = PAIRS / images_per_s(row, card) / 3600
            cells += [f"{row.batch_size:,}", f"{images_per_s(row, card):,.0f}", f"{each:.0f}"]
        print("| " + " | ".join(cells) + " |")


def fine_tuning() -> None:
    """Prints the table of ways to fine-tune."""
    card = SHOWN[0]
    memory = CARDS[card].memory * GIB
    print(f"| form | trained | GiB, {FEW} pairs | GiB, {MANY} pairs | images/s | most pairs |")
    print("|---" + 5 * "|--:" + "|")
    for form, changes in FINETUNED.items():
        values = plain("open_clip:ViT-B-32", CC12M_TOKENS).replaced(**changes)
        step = Step(values, "bf16")
        few, many = (step.row(pairs, None, memory) for pairs in (FEW, MANY))
        most = step.largest(memory)
        count = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        sizes = f"{few.peak / GIB:.2f} | {many.peak / GIB:.2f}"
        print(
            f"| {form} | {count / 1e6:.1f} M | {sizes} | {images_per_s(many, card):,.0f} | "
            f"{most.batch_size:,} |"
        )


if __name__ == "__main__":
    hours()
    print()
    fine_tuning()
