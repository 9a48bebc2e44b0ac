"""What each rank of tests/ops/test_distributed.py runs: features that are gathered while a tower works, to the same bits."""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_rowwise import focal
from wire import matrices, sent

from simplclip import gradient_cache
from simplclip.losses import ClipPMLoss, MatryoshkaLoss, RowwiseLoss, SigLipLoss, WIKDLoss, gather_early
from simplclip.ops import distributed

N, D = 8, 16


def main(rank):
    world = dist.get_world_size()
    mode = {"rank": rank, "world_size": world}
    torch.manual_seed(rank)
    image, text, teacher_image, teacher_text = (F.normalize(torch.randn(N, D), dim=1) for _ in range(4))
    scale = torch.tensor(9.0)
    losses = [SigLipLoss(**mode, pm_weight=0.5)]
    for local_loss, gather_with_grad in itertools.product((False, True), (False, True)):
        modes = mode | {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        losses += [ClipPMLoss(**modes), WIKDLoss(**modes, feature_weight=1.0), RowwiseLoss(focal, compile=False, **modes)]
        losses += [MatryoshkaLoss(ClipPMLoss(pm_weight=0, **modes), (4, 16))]
    for loss, half in itertools.product(losses, (False, True)):
        results = []
        for early in (False, True):
            leaves = [t.clone().requires_grad_() for t in (text, image)]
            args = (teacher_image, teacher_text, scale) if isinstance(loss, WIKDLoss) else ()
            with torch.autocast("cpu", torch.bfloat16, enabled=half), sent("all_gather_into_tensor") as seen:
                if early:
                    gather_early(leaves[0])
                value = loss(leaves[1], leaves[0], scale, *args)
                value = sum(value) if isinstance(value, tuple) else value
            gathered = sorted((width, str(dtype)) for width, dtype, _ in matrices(seen))
            assert [now for *_, now in matrices(seen)] == [early] + [False] * (len(gathered) - 1), seen
            assert not distributed._early, f"{loss} gathered {seen}"
            results.append((gathered, [value, *torch.autograd.grad(value, leaves)]))
        assert results[0][0] == results[1][0], f"{loss} gathered {results}"
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1])), f"{loss}, bfloat16: {half}"
    forgotten(image, text, scale, losses[1])
    by_gradient_caching(image, text, scale, losses[1])


def forgotten(image, text, scale, loss):
    """Checks that a new tensor in the memory of gathered features, and features that were changed, are gathered again."""
    expected = loss(image, 2 * text, scale)
    kept = text.clone()
    gather_early(kept)
    assert torch.equal(loss(image, kept.mul_(2), scale), expected)
    del kept
    gather_early(text.clone())
    assert len(distributed._early) == 0


def by_gradient_caching(image, text, scale, loss):
    weights = [torch.randn(D, D, generator=torch.Generator().manual_seed(7)).requires_grad_() for _ in range(2)]
    towers = {
        "text_features": lambda rows: F.normalize(rows @ weights[0], dim=1),
        "image_features": lambda rows: F.normalize(rows @ weights[1], dim=1),
    }
    results, order = [], []
    for encoded in (None, lambda name, x: order.append(name) or (gather_early(x) if name[0] == "t" else None)):
        for weight in weights:
            weight.grad = None
        inputs = {"text_features": text, "image_features": image}
        with sent("all_gather_into_tensor") as seen:
            step = lambda **features: loss(**features, logit_scale=scale)  # noqa: E731
            terms = gradient_cache.backward(towers, inputs, step, micro_batch=3, encoded=encoded)
        results.append([terms["loss"], *(weight.grad for weight in weights)])
        assert matrices(seen) == [(D, torch.float32, encoded is not None)], seen
    assert order == ["text_features", "image_features"]
    assert all(torch.equal(a, b) for a, b in zip(*results))
