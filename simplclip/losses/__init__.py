r"""Loss modules with open_clip's signatures on top of the fused ops.

The losses of other libraries and their equals here, which expect L2-normalised features [N, D]
(tests/losses/test_peers.py, test_drop_in.py and test_matryoshka.py compare the values with
open_clip or the formula):

    open_clip ClipLoss, DistillClipLoss     ClipLoss (ClipPMLoss(pm_weight=0)), WIKDLoss(): equal in
                                            each distributed mode
    open_clip SigLipLoss, CoCaLoss          SigLipLoss, CoCaLoss: equal; chunk_size of open_clip 4
                                            has no effect
    CLIP-KD                                 WIKDLoss(divergence="kl", relational_weight=0 unless
                                            named below). CLIP-KD normalises the student's features
                                            itself
      alpha_ckd_loss = a                      relational_weight=a
      alpha_icl_loss = a                      interactive_weight=a, interactive="infonce"
      alpha_cross_kd_loss = a                 interactive_weight=a, interactive="kl"
      alpha_fd_loss = a                       feature_weight=2 * a / D̂: there a sum of image and
                                            text, a mean over the width
      visual_proj, text_proj                  image_projection, text_projection: the same without a
                                            bias
    memeff MemoryEfficientCLIPLoss(t)       ClipPMLoss(pm_weight=0) at logit_scale = 1/t: equal
                                            values. memeff has no gradient of the temperature and,
                                            by stable=True, gradients sqrt(N t) times ours
    memeff MatryoshkaLoss(loss, m, w)       MatryoshkaLoss(loss, m, w): equal
    siglip-kernel fused_siglip_plus_loss    SigLipLoss, M times its value if no two pairs have the
                                            same ids
    GradCache SimpleContrastiveLoss         ops.similarity_loss(x, y, 1.0, symmetric=False): only
                                            the direction from x to y
    GradCache DistributedContrastiveLoss    the same with group=, whose gradients are world_size
                                            times as large

Label smoothing, several positives and decoupled losses: a few lines each with RowwiseLoss,
docs/recipes.md.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
