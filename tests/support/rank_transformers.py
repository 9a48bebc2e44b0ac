"""What each rank of tests/ops/test_distributed.py runs: losses of transformers' models in DistributedDataParallel."""

import torch
import torch.distributed as dist
from hugging_face import batch, model, step
from torch.nn.parallel import DistributedDataParallel

from simplclip.integrations.transformers import use_losses
from simplclip.losses import ClipLoss, SigLipLoss

N = 5


def check(name: str, loss, rank: int) -> None:
    """Compares the loss with that of all ranks' batch; without `loss`, the model's own with that of each rank's batch."""
    inputs = batch(name, N * dist.get_world_size())
    mine = {key: value[N * rank : N * rank + N] for key, value in inputs.items()}
    out, expected = step(model(name), mine if loss is None else inputs)
    if loss is None:
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    ours = model(name)
    use_losses(ours, loss)
    found, gradients = step(DistributedDataParallel(ours), mine)
    gradients = {key.removeprefix("module."): gradient for key, gradient in gradients.items()}
    value = found.loss.detach()
    if loss is not None:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    torch.testing.assert_close(value, out.loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def main(rank: int) -> None:
    world = dist.get_world_size()
    check("CLIPModel", None, rank)
    check("CLIPModel", ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world), rank)
    check("SiglipModel", SigLipLoss(rank=rank, world_size=world), rank)
