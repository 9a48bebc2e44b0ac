"""The table of other libraries in simplclip.losses: this library's losses against the formulas of theirs, in float64.

CLIP-KD's src/open_clip/loss.py, GradCache's src/grad_cache/loss.py and siglip-kernel's reference.py are written in plain
torch. For open_clip's losses see test_drop_in.py, for two ranks rank_losses.py.
"""

import pytest
import torch
import torch.nn.functional as F
from calls import loss_inputs

from simplclip import ops
from simplclip.losses import ClipPMLoss, MatryoshkaLoss, SigLipLoss, WIKDLoss
from simplclip.nn import SimplifiedBlock

N = 24
LABELS = torch.arange(N)


def same(theirs, ours, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def both_ways(logits):
    return (F.cross_entropy(logits, LABELS) + F.cross_entropy(logits.T, LABELS)) / 2


def clip_kd(image, text, scale, projections, teacher_image, teacher_text, teacher_scale):
    """Returns CLIP-KD's losses by their names there, before weighting by the alphas."""
    kl = lambda s, t: F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")  # noqa: E731
    logits, of_teacher = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    image, text = (F.normalize(F.linear(t, weight), dim=1) for t, weight in zip((image, text), projections))
    across = scale * image @ teacher_text.T, scale * text @ teacher_image.T
    return {
        "task_loss": both_ways(logits),
        "ckd_loss": (kl(logits, of_teacher) + kl(logits.T, of_teacher.T)) / 2,
        "icl_loss": (F.cross_entropy(across[0], LABELS) + F.cross_entropy(across[1], LABELS)) / 2,
        "cross_kd_loss": (kl(across[0], of_teacher) + kl(across[1], of_teacher.T)) / 2,
        "fd_loss": F.mse_loss(image, teacher_image) + F.mse_loss(text, teacher_text),
    }


@pytest.mark.parametrize(("interactive", "name"), [("infonce", "icl_loss"), ("kl", "cross_kd_loss")])
def test_clip_kd(interactive, name):
    alpha, width = 0.7, 20
    loss = WIKDLoss(
        relational_weight=alpha, interactive_weight=alpha, interactive=interactive, feature_weight=2 * alpha / width,
        divergence="kl", embed_dim=16, teacher_dim=width,
    ).double()  # fmt: skip
    (*student, _), teacher = loss_inputs(teacher_width=width)
    projections = loss.image_projection, loss.text_projection
    theirs = clip_kd(*student, projections, *teacher)
    ours = loss(*student, *teacher, output_dict=True)
    leaves = [*student, *projections]
    same(
        sum((theirs["task_loss"], *(alpha * theirs[key] for key in ("ckd_loss", name, "fd_loss")))),
        sum(ours.values()),
        leaves,
    )
    for key, value in {"contrastive_loss": theirs["task_loss"], "feature_loss": alpha * theirs["fd_loss"]}.items():
        torch.testing.assert_close(ours[key], value)


def test_siglip_kernel():
    """Theirs is a mean over the N M pairs."""
    leaves = loss_inputs()[0]
    image, text, scale, bias = leaves
    pairs = 2 * torch.eye(N, dtype=torch.float64) - 1
    theirs = -F.logsigmoid(pairs * (scale * image @ text.T + bias)).mean()
    same(theirs, SigLipLoss()(*leaves) / N, leaves)


def test_matryoshka_of_memeff():
    """memeff wraps a loss that normalises its features itself."""
    reason = "memeff is not installed (pip install -e '.[dev]'), or triton, which it imports"
    theirs = pytest.importorskip("memeff.matryoshka", reason=reason, exc_type=ImportError)
    image, text, scale, _ = loss_inputs()[0]
    widths, weights = (3, 8, 16), (0.5, 1.0, 2.0)

    class Clip(torch.nn.Module):
        def forward(self, x, y):
            return both_ways(scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T)

    ours = MatryoshkaLoss(ClipPMLoss(pm_weight=0), widths, weights)(image, text, scale)
    same(theirs.MatryoshkaLoss(Clip(), widths, weights)(image, text), ours, (image, text))


def test_grad_cache():
    x, y = loss_inputs()[0][:2]
    ours = ops.similarity_loss(x, y, 1.0, symmetric=False)["contrastive"]
    same(F.cross_entropy(x @ y.T, LABELS), ours, (x, y))


@pytest.mark.parametrize(("rms", "ratio"), [(0.026, 0.993), (1.0, 1.0)])
def test_rms_norm_of_he_and_hofmann(rms, ratio):
    norm = SimplifiedBlock(64, 2, norm="rmsnorm").norm.double()
    x = torch.randn(5, 64, dtype=torch.float64)
    x *= rms / x.square().mean(1, keepdim=True).sqrt()
    theirs = norm.weight * x / (x.norm(2, dim=-1, keepdim=True) * 64**-0.5 + norm.eps)
    torch.testing.assert_close(norm(x) / theirs, torch.full_like(x, ratio), rtol=1e-4, atol=0)
