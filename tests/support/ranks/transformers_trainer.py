"""Part of losses.py: the recipe of docs/recipes.md for transformers' Trainer, in
DistributedDataParallel.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simplclip.losses import ClipLoss, SigLipLoss
from support.models.hugging_face import batch, model, step
from support.programs import run_doc_blocks

N = 5


def check(trainer: Any, name: str, loss: nn.Module, whole: bool, rank: int) -> None:
    """Compares the recipe's loss with the model's own of the whole batch, or of a rank's batch."""
    inputs = batch(name, N * dist.get_world_size())
    local = {key: value[N * rank : N * rank + N] for key, value in inputs.items()}
    out, expected = step(model(name), inputs if whole else local)
    if not whole:
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    student = model(name)
    student.simplclip_loss = loss
    wrapped = DistributedDataParallel(student)
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped.module)
    value = trainer.compute_loss(SimpleNamespace(accelerator=accelerator), wrapped, local)
    value.backward()
    value = value.detach()
    if whole:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    torch.testing.assert_close(value, out.loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def main(rank: int) -> None:
    world = dist.get_world_size()
    trainer = run_doc_blocks("recipes.md", "In transformers' Trainer")["ContrastiveTrainer"]
    check(trainer, "CLIPModel", ClipLoss(), False, rank)
    whole_loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    check(trainer, "CLIPModel", whole_loss, True, rank)
    check(trainer, "SiglipModel", SigLipLoss(rank=rank, world_size=world), True, rank)
