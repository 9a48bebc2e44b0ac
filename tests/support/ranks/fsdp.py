"""Part of losses.py: a small CLIP under fully_shard as in docs/several-gpus.md.

Its blocks, loss and gradient caching, with mixed precision, activation checkpointing and
torch.compile.
"""

import itertools
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
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

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return F.normalize(x.mean(1), dim=-1)


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = Tower(nn.Linear(12, C), causal=False)
        self.text = Tower(nn.Embedding(20, C), causal=True)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.logit_scale.exp()


def batch(step: int, world: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    image = torch.randn(world * N, 6, 12, generator=g)
    text = torch.randint(20, (world * N, 7), generator=g)
    return image, text


def train(
    model: nn.Module, loss: nn.Module, cached: bool, rows: slice, world: int
) -> tuple[Tensor, Tensor]:
    """Returns the losses of the steps and, after them, the parameters."""
    parameters = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    values = []
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


def main(backend: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    shard = run("several-gpus.md", "FSDP2")["shard"]
    parameters = [*Clip().parameters(), *ClipPMLoss().parameters()]
    start = torch.cat([p.detach().flatten() for p in parameters])
    options = [(False, True), (True, False)]  # half, cached
    if backend == "inductor":
        options = list(itertools.product((False, True), (False, True)))
    for half, cached in options:
        dtype = torch.bfloat16 if half else torch.float32
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        torch.compiler.reset()
        model = shard(Clip(), mesh, precision, backend)
        assert isinstance(model, FSDPModule)
        loss = ClipPMLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        values, weights = train(model, loss, cached, slice(N * rank, N * rank + N), world)
        dist.all_reduce(values)
        expected_values, expected = train(Clip(), ClipPMLoss(), cached, slice(None), world)
        rtol, most = (3e-2, 0.1) if half else (1e-5, 1e-4)
        form = f"bfloat16: {half}, gradient caching: {cached}"
        message = partial("{}: {}".format, form)
        torch.testing.assert_close(values / world, expected_values, rtol=rtol, atol=0, msg=message)
        error = (weights - expected).norm() / (expected - start).norm()
        assert error < most, f"{form}: off by {error} of the way"
