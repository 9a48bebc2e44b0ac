"""A stand-in for open_clip_train.main of open_clip's main branch (4.2.0.dev0): a task holds model and loss, train_one_epoch
takes one state, the arguments have no horovod. The model is a linear layer over random features, and over tokens for CoCa."""

import argparse
import os
import types
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 512  # of ViT-B-32, whose name the tests give
TOKENS = 11


class Model(nn.Module):
    def __init__(self, seed, siglip=False, coca=False):
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = nn.Linear(12, WIDTH), nn.Linear(10, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if siglip else None
        self.decoder = nn.Linear(10, 10 * TOKENS) if coca else None

    def forward(self, image, text):
        out = {"image_features": F.normalize(self.image(image), dim=1), "logit_scale": self.logit_scale.exp()}
        out["text_features"] = F.normalize(self.text(text.float()), dim=1)
        if self.logit_bias is not None:
            out["logit_bias"] = self.logit_bias
        if self.decoder is not None:
            out["logits"] = self.decoder(text.float()).unflatten(1, (10, TOKENS))
        return out


class Task(nn.Module):
    def __init__(self, model, loss, teacher=None):
        super().__init__()
        self.trainable_module, self.loss, self.teacher = model, loss, teacher

    def forward(self, batch):
        out = self.trainable_module(**batch)
        report = {"logit_scale": out["logit_scale"]}
        if self.teacher is not None:
            with torch.no_grad():
                out.update({f"dist_{name}": value for name, value in self.teacher(**batch).items()})
        if "logits" in out:
            out |= {"logits": out["logits"][:, :-1], "labels": batch["text"][:, 1:]}
        losses = self.loss(**out, output_dict=True)
        losses["loss"] = sum(value for name, value in losses.items() if name.endswith("_loss"))
        return losses, report


def create_task(args, model, dist_model=None, naflex_data_config=None):
    """Chooses the loss by the model first, as open_clip does: a task of audio has a ClipLoss whatever the arguments say."""
    if "genlip" in args.model:
        loss = nn.CrossEntropyLoss()
    elif "clap" in args.model:
        loss = open_clip.ClipLoss()
    elif args.distill:
        loss = open_clip.DistillClipLoss()
    elif "coca" in args.model:
        loss = open_clip.CoCaLoss(args.coca_caption_loss_weight, args.coca_contrastive_loss_weight)
    elif args.siglip:
        loss = open_clip.loss.SigLipLoss(dist_impl=args.loss_dist_impl)
    else:
        loss = open_clip.ClipLoss()
    return Task(model, loss, dist_model)


@dataclass
class TrainState:
    task: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0


def parse_args(argv):
    parser = argparse.ArgumentParser()
    for name in ("model", "distill-model", "distill-pretrained", "resume", "checkpoint-path"):
        parser.add_argument(f"--{name}")
    for flag in ("siglip", "fsdp"):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument("--epochs", type=int, default=1)
    parser.set_defaults(
        local_loss=False, gather_with_grad=False, rank=0, world_size=1, distributed=False, device="cpu", accum_freq=1,
        coca_caption_loss_weight=3.0, coca_contrastive_loss_weight=0.5, loss_dist_impl="gather",
        wd=0.2, opt="adamw", save_logs=True, save_frequency=1, save_most_recent=False,
    )  # fmt: skip
    return parser.parse_args(argv)


def train_one_epoch(state, data, args, tb_writer=None):
    for batch in data["train"]:
        state.optimizer.zero_grad()
        losses, _ = state.task(batch)
        losses["loss"].backward()
        state.optimizer.step()
        data["seen"].append({name: value.item() for name, value in losses.items()})


def main(trainer, argv):
    """Runs the trainer; returns the losses of each step, and the task at the end."""
    args = trainer.parse_args(argv)
    args.distill = args.distill_model is not None and args.distill_pretrained is not None
    model = Model(0, siglip=args.siglip and "clap" not in args.model, coca="coca" in args.model)
    task = trainer.create_task(args, model=model, dist_model=Model(1) if args.distill else None, naflex_data_config=None)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrices], "weight_decay": args.wd * matrices}
        for matrices in (False, True)
    ]
    state = trainer.TrainState(task, torch.optim.AdamW(groups, lr=1e-2))
    if args.resume is not None:
        checkpoint = torch.load(args.resume, weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
        state.optimizer.load_state_dict(checkpoint["optimizer"])
        state.epoch = checkpoint["epoch"]
    g = torch.Generator().manual_seed(5)
    batches = [
        {"image": torch.randn(8, 12, generator=g), "text": torch.randint(TOKENS, (8, 10), generator=g)} for _ in range(10)
    ]
    data = {"train": batches, "seen": []}
    for epoch in range(state.epoch, args.epochs):
        state.epoch = epoch
        trainer.train_one_epoch(state, data, args, tb_writer=None)
        checkpoint = {"epoch": epoch + 1, "state_dict": model.state_dict(), "optimizer": state.optimizer.state_dict()}
        if args.checkpoint_path is not None:
            torch.save(checkpoint, os.path.join(args.checkpoint_path, f"epoch_{epoch + 1}.pt"))
    return data["seen"], task


def module() -> types.ModuleType:
    """Returns a new open_clip_train.main module."""
    trainer = types.ModuleType("open_clip_train.main")
    for item in (create_task, train_one_epoch, parse_args, TrainState):
        setattr(trainer, item.__name__, item)
    trainer.main = lambda argv: main(trainer, argv)
    return trainer
