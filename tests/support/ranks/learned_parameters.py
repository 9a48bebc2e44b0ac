"""What each rank of tests/ops/test_distributed.py runs: parameters of losses, with and without
DDP.
"""

import copy
import os
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from simplclip.losses import ClipPMLoss, MatryoshkaLoss, RowwiseLoss, SigLipLoss, WIKDLoss
from support.losses import Tempered

N = 6
D = 16
STEPS = 3
OF_TEACHER = {"interactive_weight": 0.6, "feature_weight": 0.4, "pm_weight": 0.5}


def make(world, rank):
    """Returns by name each loss, and the number of all-reduces of several elements in one step of
    it.
    """
    mode = {"rank": rank, "world_size": world}
    both = mode | {"gather_with_grad": True}
    plane = {"plane": "hadamard", "embed_dim": D}
    return {
        "ClipPMLoss": (ClipPMLoss(local_loss=True, **both, **plane), 1),
        "ClipPMLoss of open_clip's defaults": (ClipPMLoss(**mode, **plane), 1),
        "SigLipLoss": (SigLipLoss(**mode, pm_weight=0.5), 1),
        "WIKDLoss": (
            WIKDLoss(local_loss=True, **both, **OF_TEACHER, embed_dim=D, teacher_dim=12),
            2,
        ),
        "RowwiseLoss": (RowwiseLoss(Tempered(), local_loss=True, **both), 1),
        "MatryoshkaLoss": (
            MatryoshkaLoss(ClipPMLoss(local_loss=True, **both, **plane), (4, 16)),
            2,
        ),
    }


def batch(world):
    g = torch.Generator().manual_seed(3)

    def draw(width):
        rows = torch.randn(world * N, width, generator=g, dtype=torch.float64)
        return F.normalize(rows, dim=1)

    return draw(D), draw(D), (draw(12), draw(12))


def train(loss, image, text, teacher):
    """Makes steps of SGD on the loss's parameters alone; all features get gradients, as in training
    a tower.
    """
    scale = torch.tensor(9.0, dtype=torch.float64)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    inner = getattr(loss, "module", loss)
    args = (*teacher, scale) if isinstance(inner, WIKDLoss) else ()
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(image.clone().requires_grad_(), text.clone().requires_grad_(), scale, *args)
        (sum(value) if isinstance(value, tuple) else value).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in loss.parameters()])


def main(rank):
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
            alone = train(copy.deepcopy(loss), *rank_batch)
        forms = {
            "alone": alone,
            "in DDP": train(DistributedDataParallel(copy.deepcopy(loss)), *rank_batch),
        }
        if name == "ClipPMLoss" and "SIMPLCLIP_PROVE" in os.environ:  # with --prove
            forms["compiled"] = train(torch.compile(loss, backend="aot_eager"), *rank_batch)
        for form, values in forms.items():
            all_values = [torch.empty_like(values) for _ in range(world)]
            dist.all_gather(all_values, values)
            assert all(torch.equal(each, all_values[0]) for each in all_values), (
                f"{name} {form}: ranks differ"
            )
            torch.testing.assert_close(
                values, expected, rtol=1e-9, atol=1e-11, msg=lambda m, w=(name, form): f"{w}: {m}"
            )
        # values of losses have one element
        several = [call for call in reduced.call_args_list if call.args[0].numel() > 1]
        assert len(several) == STEPS * reductions, (name, several)
