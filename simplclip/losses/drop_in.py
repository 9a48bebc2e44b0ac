"""Losses that are subclasses of open_clip's where it is installed: they pass isinstance checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import Tensor, nn

from simplclip.common.errors import check_count
from simplclip.losses.base import check_known
from simplclip.losses.clip import PairLoss
from simplclip.ops import checks


def _open_clip_loss() -> Any:
    """Returns the module open_clip.loss, or where it is missing a class with names of `object`."""
    try:
        import open_clip.loss
    except ImportError:
        return type("NoOpenClip", (), dict.fromkeys(("ClipLoss", "CoCaLoss", "SigLipLoss"), object))
    return open_clip.loss


open_clip_loss: Any = _open_clip_loss()
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class DropIn(PairLoss):
    """Base class of the losses that are subclasses of open_clip's."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Raises TypeError for a subclass whose forward would not call a method that it replaces.

        Such a method of open_clip's needs a forward beside it.
        """
        super().__init_subclass__(**options)
        if cls.forward.__module__.startswith("simplclip.losses."):
            for base in cls.__mro__[: cls.__mro__.index(DropIn)]:
                for name in ("get_logits", "get_ground_truth", "_loss"):
                    if name in vars(base):
                        raise TypeError(
                            f"{cls.__name__}: expected a forward beside {name}, since that of "
                            "simplclip.losses makes no logits and does not call it, got none"
                        )


class ClipLoss(DropIn, open_clip_loss.ClipLoss):
    r"""`open_clip.ClipLoss` without its N×N matrices.

    Constructor, forward, values and gradients are the same.

        Z = logit_scale · x yᵀ + logit_bias
        loss = ½ [cross-entropy of the rows of Z to the diagonal + that of the columns]

    Subclasses with a forward of their own may use `get_logits` and `get_ground_truth`, which are
    open_clip's and make the matrices. See `simplclip.ops.similarity_loss` for shapes, dtypes and
    memory.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss; see
            DistributedLoss for the values and gradients of each mode. use_horovod is not supported
            with several ranks.
        pm_weight: as in ClipPMLoss, whose pair matching has weight 1 by default and here 0.

    Source: Radford et al. 2021 (arXiv 2103.00020); open_clip.loss.ClipLoss.
    """

    prev_num_logits = 0  # of open_clip's get_ground_truth


class CoCaLoss(ClipLoss, open_clip_loss.CoCaLoss):
    r"""`open_clip.CoCaLoss`: the contrastive loss plus the cross-entropy of a caption's tokens.

    Args:
        caption_loss_weight, clip_loss_weight: weights; with clip_loss_weight=0 the contrastive loss
            is not computed.
        pad_id: the token that the caption's loss leaves out.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: as in ClipLoss.

    Source: Yu et al. 2022 (arXiv 2205.01917); open_clip.loss.CoCaLoss.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Any]

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **unknown: Never,
    ) -> None:
        """Stores the weights, and makes a cross-entropy for the caption that leaves out pad_id.

        With clip_loss_weight=0 the contrastive loss is not computed. Other arguments, and errors,
        as in `DistributedLoss`; TypeError for a weight that is no number or a pad_id that is no
        integer.
        """
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **unknown
        )
        self.caption_loss_weight = checks.number("caption_loss_weight", caption_loss_weight)
        self.clip_loss_weight = checks.number("clip_loss_weight", clip_loss_weight)
        checks.check_instance("pad_id", pad_id, int, "an integer")
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logits: Tensor,  # [N, L, V] of the caption's tokens
        labels: Tensor,  # [N, L] int64
        logit_scale: Tensor,  # []
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Returns the weighted contrastive and caption losses, each [].

        With output_dict they are a dict with the keys `contrastive_loss` and `caption_loss`. Labels
        equal to pad_id do not count in the caption loss, the mean over the others. With
        clip_loss_weight=0 the contrastive loss is a constant, the integer 0.
        """
        _check_caption(logits, labels)
        contrastive: Any = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            value: Any = super().forward(image_features, text_features, logit_scale)
            contrastive = self.clip_loss_weight * value
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


def _check_caption(logits: Any, labels: Any) -> None:
    """Raises TypeError or ValueError unless logits are [N, L, V], and labels [N, L] int64."""
    checks.check_floating("logits", logits, "[N, L, V]")
    if logits.dim() != 3:
        got = checks.shape_of(logits)
        raise ValueError(f"logits: expected a tensor [N, L, V], got shape {got}")
    checks.check_instance("labels", labels, Tensor, "an int64 tensor [N, L]")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(
            f"labels: expected a label for each token of logits {checks.shape_of(logits)}, got "
            f"shape {checks.shape_of(labels)}"
        )


class SigLipLoss(DropIn, open_clip_loss.SigLipLoss):
    r"""`open_clip.SigLipLoss` without N×N matrices, and with pair matching beside it.

        Z = logit_scale · x yᵀ + logit_bias
        loss = (1/N) Σ_ij softplus(−y_ij Z_ij) + pm_weight · pair matching

    with y_ij = 1 for a pair and −1 else. Three matrix products of N·M·D in all, pair matching
    included; with output_dict pair matching has three of its own, since each term has its own
    gradient.

    Args:
        rank, world_size: with world_size > 1 each rank computes its own rows against the texts of
            all ranks. Value and gradients are open_clip's.
        cache_labels, dist_impl, chunk_size: as in open_clip, without effect. The ranks gather
            features, never logits, and `scratch_bytes` sets the rows of a chunk. Only open_clip's
            `_loss`, which a subclass may call, reads chunk_size.
        pm_weight: pair matching over all negatives, as in ClipPMLoss.

    Source: Zhai et al. 2023 (arXiv 2303.15343); open_clip.loss.SigLipLoss.
    """

    TERM = "sigmoid"

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        pm_weight: float = 0.0,
        **unknown: Never,
    ) -> None:
        """Stores the settings and, with pm_weight above 0, makes the plane's parameters.

        The distributed mode is always local_loss with gather_with_grad. dist_impl: "bidir" (also
        None), "shift", "reduce" or "gather", which has no effect, like cache_labels and chunk_size.
        Other arguments, and errors, as in `SimilarityLoss`.
        """
        check_known(type(self).__name__, unknown)
        modes = True, True, cache_labels, rank, world_size
        super().__init__(*modes, pm_weight=pm_weight)
        self.dist_impl = dist_impl or "bidir"
        checks.check_choice("dist_impl", self.dist_impl, DIST_IMPLS)
        check_count("chunk_size", chunk_size, 0)
        self.chunk_size = chunk_size  # not used here; open_clip 4's own `_loss` reads it
