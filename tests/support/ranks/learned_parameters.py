"""Part of losses.py: parameters of losses, with and without DistributedDataParallel."""

import copy
import os
from collections.abc import Sequence
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simplclip.losses import ClipPMLoss, MatryoshkaLoss, RowwiseLoss, SigLipLoss, WIKDLoss
from support.losses import Tempered

N = 6
D = 16
STEPS = 3
WIKD_WEIGHTS = {"interactive_weight": 0.6, "feature_weight": 0.4, "pm_weight": 0.5}


def make(world: int, rank: int) -> dict[str, tuple[nn.Module, int]]:
    """Returns each loss by name, and its all-reduces of several elements in a step."""
    mode = {"rank": rank, "world_size": world}
    local = mode | {"local_loss": True, "gather_with_grad": True}
    wikd = WIKDLoss(**local, **WIKD_WEIGHTS, embed_dim=D, teacher_dim=12)
    return {
        "ClipPMLoss": (ClipPMLoss(**local), 1),
        "ClipPMLoss of open_clip's defaults": (ClipPMLoss(**mode), 1),
        "SigLipLoss": (SigLipLoss(**mode, pm_weight=0.5), 1),
        "WIKDLoss": (wikd, 2),
        "RowwiseLoss": (RowwiseLoss(Tempered(), **local), 1),
        "MatryoshkaLoss": (MatryoshkaLoss(ClipPMLoss(**local), (4, 16)), 2),
    }


def batch(world: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)

    def draw(width: int) -> Tensor:
        rows = torch.randn(world * N, width, generator=g, dtype=torch.float64)
        return F.normalize(rows, dim=1)

    return draw(D), draw(D), (draw(12), draw(12))


def train(loss: nn.Module, image: Tensor, text: Tensor, teacher: Sequence[Tensor]) -> Tensor:
    """Makes steps of SGD on the loss's parameters; all features get gradients, as of a tower."""
    scale = torch.tensor(9.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    inner = getattr(loss, "module", loss)
    args = (*teacher, scale) if isinstance(inner, WIKDLoss) else ()
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(image.clone().requires_grad_(), text.clone().requires_grad_(), scale, *args)
        if isinstance(value, tuple):
            value = sum(value)
        value.backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in loss.parameters()])


def main(rank: int) -> None:
    world = dist.get_world_size()
    shard = slice(N * rank, N * rank + N)
    image, text, teacher = batch(world)
    rank_batch = image[shard], text[shard], [t[shard] for t in teacher]
    for name in make(1, 0):
        torch.manual_seed(rank)  # each rank draws its own projections
        loss, reductions = make(world, rank)[name]
        loss = loss.double()
        torch.manual_seed(0)
        expected = train(make(1, 0)[name][0].double(), image, text, teacher)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            plain = train(copy.deepcopy(loss), *rank_batch)
        wrapped = DistributedDataParallel(copy.deepcopy(loss))
        forms = {"plain": plain, "in DDP": train(wrapped, *rank_batch)}
        if name == "ClipPMLoss" and "SIMPLCLIP_PROVE" in os.environ:  # with --prove
            forms["compiled"] = train(torch.compile(loss, backend="aot_eager"), *rank_batch)
        for form, values in forms.items():
            all_values = [torch.empty_like(values) for _ in range(world)]
            dist.all_gather(all_values, values)
            for other in all_values:
                assert torch.equal(other, values), f"{name} {form}: ranks differ"
            message = partial("{}: {}".format, (name, form))
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11, msg=message)
        # values of losses have one element
        several = [call for call in reduced.call_args_list if call.args[0].numel() > 1]
        assert len(several) == STEPS * reductions, (name, several)
