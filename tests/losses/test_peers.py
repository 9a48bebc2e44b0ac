"""The table "coming from elsewhere" in simplclip.losses: each line against the other library's loss, written in plain torch.

Sources: CLIP-KD src/open_clip/loss.py, memeff 0.3.1 clip_loss.py, GradCache src/grad_cache/loss.py. For open_clip's losses
see test_losses.py and test_wikd_loss.py, for two ranks rank_losses.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from simplclip import ops
from simplclip.losses import ClipPMLoss, WIKDLoss
from simplclip.nn import SimplifiedBlock

N = 24


def features(width=16, teacher_width=16, seed=0):
    """Float64: student's image and text, not normalised; teacher's, normalised."""
    g = torch.Generator().manual_seed(seed)
    student = [torch.randn(N, width, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    teacher = [F.normalize(torch.randn(N, teacher_width, generator=g, dtype=torch.float64), dim=1) for _ in range(2)]
    return student, teacher


def same(theirs, ours, leaves, times=1.0):
    """Equal values, and gradients that are `times` ours."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    wanted, got = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (theirs, ours))
    for w, g in zip(wanted, got):
        torch.testing.assert_close(times * g, w, rtol=1e-7, atol=1e-10)


def clip_kd(student, teacher, scale, teacher_scale, cross_scale, projections=None):
    """Its losses by their names there, before the alphas."""
    image, text = student
    t_image, t_text = teacher
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    t_logits = teacher_scale * t_image @ t_text.T
    if projections is not None:
        image, text = (F.linear(x, w) for x, w in zip(student, projections))
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    across = cross_scale * image @ t_text.T, cross_scale * text @ t_image.T
    labels = torch.arange(N)
    kl = lambda s, t: F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")  # noqa: E731
    return {
        "task_loss": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2,
        "ckd_loss": (kl(logits, t_logits) + kl(logits.T, t_logits.T)) / 2,
        "icl_loss": (F.cross_entropy(across[0], labels) + F.cross_entropy(across[1], labels)) / 2,
        "cross_kd_loss": (kl(across[0], t_logits) + kl(across[1], t_logits.T)) / 2,
        "fd_loss": F.mse_loss(image, t_image) + F.mse_loss(text, t_text),
    }


@pytest.mark.parametrize(
    ("theirs", "ours", "options", "teacher_width"),
    [
        ("task_loss", "contrastive_loss", {"contrastive_weight": 1.0}, 16),
        ("ckd_loss", "distill_loss", {"relational_weight": 0.7}, 16),
        ("icl_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "infonce"}, 16),
        ("icl_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "infonce"}, 20),
        ("cross_kd_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "kl"}, 16),
        ("cross_kd_loss", "interactive_loss", {"interactive_weight": 0.7, "interactive": "kl"}, 20),
        ("fd_loss", "feature_loss", {"feature_weight": 2 * 0.7}, 16),
        ("fd_loss", "feature_loss", {"feature_weight": 2 * 0.7}, 20),
    ],
)
def test_clip_kd(theirs, ours, options, teacher_width):
    student, teacher = features(teacher_width=teacher_width)
    loss = WIKDLoss(
        **{"contrastive_weight": 0.0, "relational_weight": 0.0, **options}, divergence="kl", learn_interactive_scale=True,
        embed_dim=16, teacher_dim=teacher_width,
    ).double()  # fmt: skip
    cross_scale = torch.tensor(2.66, dtype=torch.float64)
    leaves, projections = list(student), None
    if loss.interactive_log_scale is not None:
        assert loss.interactive_log_scale.exp().item() == pytest.approx(1 / 0.07)
        loss.interactive_log_scale.data = cross_scale.log()
    if loss.image_projections is not None:
        projections = loss.image_projections[0], loss.text_projections[0]
        leaves += projections
    scale, teacher_scale = torch.tensor(14.0, dtype=torch.float64), torch.tensor(30.0, dtype=torch.float64)
    alpha = 1.0 if theirs == "task_loss" else 0.7
    wanted = alpha * clip_kd(student, teacher, scale, teacher_scale, cross_scale, projections)[theirs]
    normalised = [F.normalize(x, dim=1) for x in student]
    same(wanted, loss(*normalised, scale, *teacher, teacher_scale, output_dict=True)[ours], leaves)


class Memeff(torch.autograd.Function):
    """The value of ClipLoss at 1/temperature; with stable=True the gradients have sqrt(N / temperature) in its place."""

    @staticmethod
    def forward(ctx, x, y, temperature, stable):
        with torch.enable_grad():
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            logits, labels = x @ y.T / temperature, torch.arange(N)
            value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        gradients = torch.autograd.grad(value, (x, y))
        scale = math.sqrt(N / temperature) * temperature if stable else 1.0
        ctx.save_for_backward(*(scale * g for g in gradients))
        return value.detach()

    @staticmethod
    def backward(ctx, gradient):
        return *(gradient * g for g in ctx.saved_tensors), None, None


@pytest.mark.parametrize("stable", [True, False])
def test_memeff(stable):
    student, _ = features()
    x, y = (F.normalize(t, dim=1) for t in student)
    theirs = Memeff.apply(x, y, 0.05, stable)
    ours = ClipPMLoss(pm_weight=0)(x, y, torch.tensor(1 / 0.05, dtype=torch.float64))
    same(theirs, ours, student, times=math.sqrt(N * 0.05) if stable else 1.0)


def test_grad_cache():
    (x, y), _ = features()
    one = lambda a, b: F.cross_entropy(a @ b.T, torch.arange(N))  # noqa: E731
    same(one(x, y), ops.similarity_loss(x, y, 1.0, symmetric=False)["contrastive"], (x, y))
    both = ClipPMLoss(pm_weight=0)(x, y, torch.tensor(1.0, dtype=torch.float64))
    same((one(x, y) + one(y, x)) / 2, both, (x, y))


@pytest.mark.parametrize(("rms", "ratio"), [(0.026, 0.993), (1.0, 1.0)])
def test_rms_norm_of_he_and_hofmann(rms, ratio):
    norm = SimplifiedBlock(64, 2, norm="rmsnorm").norm.double()
    x = torch.randn(5, 64, dtype=torch.float64)
    x *= rms / x.square().mean(1, keepdim=True).sqrt()
    theirs = norm.weight * x / (x.norm(2, dim=-1, keepdim=True) * 64**-0.5 + norm.eps)
    torch.testing.assert_close(norm(x) / theirs, torch.full_like(x, ratio), rtol=1e-4, atol=0)
