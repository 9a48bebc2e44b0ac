"""What each rank of tests/ops/test_distributed.py runs: a small CLIP under fully_shard as in
docs/scaling.md.

Its blocks, loss and gradient caching, with mixed precision, activation checkpointing and
torch.compile.
"""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from simplclip import gradient_cache
from simplclip.losses import ClipPMLoss
from simplclip.nn import SimplifiedBlock
from support.programs import run_doc_blocks as run

N = 8
C = 32
STEPS = 5


class Tower(nn.Module):
    def __init__(self, first: nn.Module, causal: bool):
        super().__init__()
        self.first = first
        self.blocks = nn.ModuleList(SimplifiedBlock(C, 4, causal=causal) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return F.normalize(x.mean(1), dim=-1)


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = Tower(nn.Linear(12, C), False), Tower(nn.Embedding(20, C), True)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        return self.image(image), self.text(text), self.logit_scale.exp()


def batch(step, world):
    g = torch.Generator().manual_seed(step)
    return torch.randn(world * N, 6, 12, generator=g), torch.randint(
        20, (world * N, 7), generator=g
    )


def train(model, loss, cached, rows, world):
    """The losses of the steps and, after them, the parameters."""
    parameters = [*model.parameters(), *loss.parameters()]
    optimizer, values = torch.optim.SGD(parameters, lr=0.1, momentum=0.9), []
    for step in range(STEPS):
        image, text = (t[rows] for t in batch(step, world))
        optimizer.zero_grad()
        if cached:
            batches = list(zip(image.split(3), text.split(3)))
            value = gradient_cache.backward(lambda b: model(*b), batches, loss, model=model)["loss"]
        else:
            value = loss(*model(image, text))
            value.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        values.append(value.detach().float())
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.stack(values), torch.cat([p.detach().flatten() for p in whole])


def main(backend):
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    shard = run("scaling.md", "FSDP2")["shard"]
    start = torch.cat(
        [p.detach().flatten() for p in [*Clip().parameters(), *ClipPMLoss().parameters()]]
    )
    every = (
        itertools.product((False, True), (False, True))
        if backend == "inductor"
        else ((False, True), (True, False))
    )
    for half, cached in every:
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else torch.float32, reduce_dtype=torch.float32
        )
        torch.compiler.reset()
        model = shard(Clip(), mesh, precision, backend)
        assert isinstance(model, FSDPModule)
        loss = ClipPMLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        values, weights = train(model, loss, cached, slice(N * rank, N * rank + N), world)
        dist.all_reduce(values)
        expected_values, expected = train(Clip(), ClipPMLoss(), cached, slice(None), world)
        what, within = f"bfloat16: {half}, gradient caching: {cached}", (3e-2 if half else 1e-5)
        torch.testing.assert_close(
            values / world, expected_values, rtol=within, atol=0, msg=lambda m, w=what: f"{w}: {m}"
        )
        away = (weights - expected).norm() / (expected - start).norm()
        assert away < (0.1 if half else 1e-4), f"{what}: {away} of the way"
