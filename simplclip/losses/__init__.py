r"""Loss modules with open_clip's signatures on top of the fused ops.

The losses of other libraries and their equals here, which expect L2-normalised features [N, D] (tests/losses/test_peers.py
compares the values):

    there                            here

    open_clip
      ClipLoss, DistillClipLoss      ClipLoss (ClipPMLoss(pm_weight=0)), WIKDLoss(): equal, in each distributed mode too
      SigLipLoss, CoCaLoss           SigLipLoss, CoCaLoss: equal; chunk_size of open_clip 4 has no effect

    CLIP-KD                          WIKDLoss(divergence="kl", relational_weight=0 unless named below). CLIP-KD normalises
                                     the student's features itself and expects normalised features of the teacher
      alpha_ckd_loss = a             relational_weight=a
      alpha_icl_loss = a             interactive_weight=a, interactive="infonce"
      alpha_cross_kd_loss = a        interactive_weight=a, interactive="kl"
      alpha_fd_loss = a              feature_weight=2 * a / D: means over D numbers are added there, sums averaged here
      cross_logit_scale = c          the scale of the interactive term is logit_scale here, no parameter of its own;
                                     ops.similarity_loss(interactive_scale=c): equal
      visual_proj, text_proj         image_projections, text_projections: the same without a bias

    memeff
      MemoryEfficientCLIPLoss(t)     ClipPMLoss(pm_weight=0) at logit_scale = 1/t: equal values. memeff normalises the
                                     features (unless normalized_inputs=True), has no gradient of the temperature, and with
                                     stable=True, its default, its gradients of the features are sqrt(N t) times ours
      tau_plus = p                   prior=p of ClipLoss and ClipPMLoss: equal; a tensor of one for each pair:
                                     ops.similarity_loss(prior=p)
      label_smoothing = e            label_smoothing=e of ClipLoss and ClipPMLoss: equal, beside prior too
      MatryoshkaLoss(loss, m, w)     MatryoshkaLoss(loss, m, w): equal
      Distributed...CLIPLoss(t)      local_loss=False, gather_with_grad=False, N of all ranks: the same gradients; the sum of
                                     its values over the ranks equals our value

    siglip-kernel
      fused_siglip_plus_loss         SigLipLoss(positives="ids") with ids: M times its value, a mean over all N M pairs where
                                     ours is one over N rows. It takes the logarithm of the scale

    GradCache
      SimpleContrastiveLoss          ops.similarity_loss(x, y, 1.0, symmetric=False): only the direction from x to y, without
                                     scale and normalisation. ClipPMLoss(pm_weight=0) is the mean of both directions
      DistributedContrastiveLoss     the same with group=, whose gradients are world_size times as large
"""

from simplclip.losses.base import PLANES, gather_early
from simplclip.losses.clip import ClipPMLoss
from simplclip.losses.matryoshka import MatryoshkaLoss
from simplclip.losses.rowwise import RowwiseLoss
from simplclip.losses.wikd import WIKDLoss

__all__ = [
    "PLANES", "ClipLoss", "ClipPMLoss", "CoCaLoss", "MatryoshkaLoss", "RowwiseLoss", "SigLipLoss", "WIKDLoss", "gather_early",
]  # fmt: skip


def __getattr__(name: str):
    """Imports the losses that subclass open_clip's at their first use: importing open_clip takes seconds."""
    if name in ("ClipLoss", "CoCaLoss", "SigLipLoss"):
        from simplclip.losses import drop_in

        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
