"""What each rank of tests/ops/test_distributed.py runs: MatryoshkaLoss over gloo ranks."""

import itertools
import os

import torch
import torch.nn.functional as F
from rank_rowwise import focal
from wire import matrices, sent

from simplclip.losses import ClipPMLoss, CoCaLoss, MatryoshkaLoss, RowwiseLoss, SigLipLoss, WIKDLoss
from simplclip.ops import distributed

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


def widths(seen):
    return [width for width, *_ in matrices(seen)]


def check(loss, rank, ids, gathers, **given):
    """Compares with the sum of the loss's own values for each prefix, which rank_losses.py compares with open_clip."""
    leaves, teacher = batch(rank)
    args = teacher if isinstance(loss, WIKDLoss) else ()
    given |= {"ids": ids} if ids is not None else {}
    leaves += loss.parameters()

    def total(result):
        return sum(result) if isinstance(result, tuple) else result

    with sent("all_gather_into_tensor") as seen:
        value = total(MatryoshkaLoss(loss, WIDTHS, WEIGHTS)(*leaves[:2], **given, logit_scale=leaves[2], **named(args)))
        got = torch.autograd.grad(value, leaves)
    assert sorted(widths(seen)) == sorted(gathers), (type(loss).__name__, seen, gathers)
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
        alone = local_loss and not gather_with_grad  # each direction alone gathers both towers' features
        both = [D, D] if alone else [D]
        ids = torch.arange(N) // 2
        check(ClipPMLoss(pm_weight=0, **mode), rank, None, both)
        check(ClipPMLoss(plane="hadamard", embed_dim=D, **mode).double(), rank, ids, both)
        check(RowwiseLoss(focal, compile=False, **mode), rank, None, [D, D])
        # Projections give other features at each width, which stay on their rank unless alone. The teacher's travel once.
        projected = [14] * 6 if alone else []
        check(WIKDLoss(**DISTIL, embed_dim=D, teacher_dim=14, **mode).double(), rank, None, [*both, 14, 14, *projected])
    check(SigLipLoss(rank=rank, world_size=WORLD), rank, torch.arange(N) // 2, [D], logit_bias=torch.tensor(-3.0))
    coca(rank)


def coca(rank):
    (image, text, scale), _ = batch(rank)
    logits, labels = torch.randn(N, 4, 6, dtype=torch.float64), torch.randint(1, 6, (N, 4))
    mode = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
    with sent("all_gather_into_tensor") as seen:
        contrastive, caption = MatryoshkaLoss(CoCaLoss(2.0, 0.7, **mode), WIDTHS, WEIGHTS)(image, text, logits, labels, scale)
    assert widths(seen) == [D]
    expected = MatryoshkaLoss(ClipPMLoss(pm_weight=0, **mode), WIDTHS, WEIGHTS)(image, text, scale)
    torch.testing.assert_close(contrastive, 0.7 * expected)
    torch.testing.assert_close(caption, 2 * F.cross_entropy(logits.transpose(1, 2), labels))


def autocast(rank):
    """Checks that features, also a teacher's, travel once and in autocast's dtype."""
    leaves, teacher = ([t.detach().float() for t in tensors] for tensors in batch(rank))
    leaves = [t.requires_grad_() for t in leaves]
    loss = MatryoshkaLoss(ClipPMLoss(pm_weight=0, gather_with_grad=True, rank=rank, world_size=WORLD), WIDTHS)
    with torch.autocast("cpu"), sent("all_gather_into_tensor") as seen:
        value = loss(*leaves)
    assert widths(seen) == [D]
    value.backward()
    distil = MatryoshkaLoss(WIKDLoss(gather_with_grad=True, rank=rank, world_size=WORLD), WIDTHS)
    with torch.autocast("cpu"), sent("all_gather_into_tensor") as seen:
        distil(*leaves, *teacher)
    assert sorted(widths(seen)) == [D, 14]
    with torch.no_grad():
        torch.testing.assert_close(loss(*leaves), value.detach(), rtol=2e-2, atol=0)
    assert distributed._gathered.get() is None
    torch.testing.assert_close(torch.compile(loss, backend="eager")(*leaves), loss(*leaves))
