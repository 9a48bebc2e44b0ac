"""What each rank of tests/ops/test_distributed.py runs: MatryoshkaLoss over gloo ranks."""

import itertools
import os

import torch
import torch.nn.functional as F
from rank_rowwise import focal

from simplclip.losses import ClipPMLoss, MatryoshkaLoss, RowwiseLoss, SigLipLoss, WIKDLoss

WORLD, N, D = int(os.environ.get("WORLD_SIZE", 1)), 5, 12
WIDTHS, WEIGHTS = (3, 7, 12), (0.5, 1.0, 2.0)
DISTIL = {"interactive_weight": 0.6, "feature_weight": 0.4, "pm_weight": 0.5, "plane": "hadamard"}


def batch(rank):
    """Returns this rank's image, text and scale as leaves, and a teacher's features and scale."""
    g = torch.Generator().manual_seed(rank)
    image, text, *teacher = (torch.randn(N, d, generator=g, dtype=torch.float64) for d in (D, D, 14, 14))
    scale = torch.tensor(9.0, dtype=torch.float64)
    teacher = [F.normalize(t, dim=1) for t in teacher]
    return [t.requires_grad_() for t in (image, text + image, scale)], [*teacher, scale.detach()]


def check(loss, rank, ids, **given):
    """Compares with the sum of the loss's own values for each prefix, which rank_losses.py compares with open_clip."""
    leaves, teacher = batch(rank)
    args = teacher if isinstance(loss, WIKDLoss) else ()
    given |= {"ids": ids} if ids is not None else {}
    leaves += loss.parameters()

    def total(result):
        return sum(result) if isinstance(result, tuple) else result

    value = total(MatryoshkaLoss(loss, WIDTHS, WEIGHTS)(*leaves[:2], **given, logit_scale=leaves[2], **named(args)))
    got = torch.autograd.grad(value, leaves)
    expected = 0.0
    for width, weight in zip(WIDTHS, WEIGHTS):
        unit = [F.normalize(t[:, :width], dim=1) for t in leaves[:2]]
        loss.embed_dim = None  # a loss for the whole width
        whole = [(name, p) for name, p in loss.named_parameters() if p.shape[-1:] == (D,)]
        replaced = {name: p[..., :width] for name, p in whole}
        once = (*unit,), {**given, "logit_scale": leaves[2], **named(args)}
        expected = expected + weight * total(torch.func.functional_call(loss, replaced, *once))
    loss.embed_dim = D
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(got, torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def named(teacher):
    return dict(zip(("dist_image_features", "dist_text_features", "dist_logit_scale"), teacher))


def main(rank):
    for local_loss, gather_with_grad in itertools.product((False, True), (False, True)):
        mode = {"local_loss": local_loss, "gather_with_grad": gather_with_grad, "rank": rank, "world_size": WORLD}
        ids = torch.arange(N) // 2
        check(ClipPMLoss(pm_weight=0, **mode), rank, None)
        check(ClipPMLoss(plane="hadamard", embed_dim=D, **mode).double(), rank, ids)
        check(RowwiseLoss(focal, **mode), rank, None)
        check(WIKDLoss(**DISTIL, embed_dim=D, teacher_dim=14, **mode).double(), rank, None)
    check(SigLipLoss(rank=rank, world_size=WORLD), rank, torch.arange(N) // 2, logit_bias=torch.tensor(-3.0))
