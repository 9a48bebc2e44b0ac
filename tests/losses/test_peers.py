"""The table of other libraries in simplclip.losses: CLIP-KD's formulas in float64.

Its src/open_clip/loss.py is written in plain torch. For open_clip's losses see test_drop_in.py.
"""

import pytest
import torch
import torch.nn.functional as F

from simplclip.losses import WIKDLoss
from support.losses import loss_inputs

N = 24
LABELS = torch.arange(N)


def same(peer, fused, leaves):
    torch.testing.assert_close(fused, peer, rtol=1e-9, atol=1e-12)
    gradients = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (fused, peer))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def both_ways(logits):
    return (F.cross_entropy(logits, LABELS) + F.cross_entropy(logits.T, LABELS)) / 2


def clip_kd(image, text, scale, projections, teacher_image, teacher_text, teacher_scale):
    """Returns CLIP-KD's losses by their names there, before weighting by the alphas."""

    def kl(s, t):
        return F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")

    logits, of_teacher = scale * image @ text.T, teacher_scale * teacher_image @ teacher_text.T
    image, text = (
        F.normalize(F.linear(t, weight), dim=1) for t, weight in zip((image, text), projections)
    )
    across = scale * image @ teacher_text.T, scale * text @ teacher_image.T
    return {
        "task_loss": both_ways(logits),
        "ckd_loss": (kl(logits, of_teacher) + kl(logits.T, of_teacher.T)) / 2,
        "icl_loss": (F.cross_entropy(across[0], LABELS) + F.cross_entropy(across[1], LABELS)) / 2,
        "cross_kd_loss": (kl(across[0], of_teacher) + kl(across[1], of_teacher.T)) / 2,
        "fd_loss": F.mse_loss(image, teacher_image) + F.mse_loss(text, teacher_text),
    }


@pytest.mark.parametrize(
    ("interactive", "name"), [("infonce", "icl_loss"), ("kl", "cross_kd_loss")]
)
def test_wikd_loss_equals_clip_kd(interactive, name):
    alpha, width = 0.7, 20
    loss = WIKDLoss(
        relational_weight=alpha,
        interactive_weight=alpha,
        interactive=interactive,
        feature_weight=2 * alpha / width,
        divergence="kl",
        embed_dim=16,
        teacher_dim=width,
    ).double()
    (*student, _), teacher = loss_inputs(teacher_width=width)
    projections = loss.image_projection, loss.text_projection
    peer = clip_kd(*student, projections, *teacher)
    fused = loss(*student, *teacher, output_dict=True)
    leaves = [*student, *projections]
    same(
        sum((peer["task_loss"], *(alpha * peer[key] for key in ("ckd_loss", name, "fd_loss")))),
        sum(fused.values()),
        leaves,
    )
    for key, value in {
        "contrastive_loss": peer["task_loss"],
        "feature_loss": alpha * peer["fd_loss"],
    }.items():
        torch.testing.assert_close(fused[key], value)
