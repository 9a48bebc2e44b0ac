"""Loss modules with open_clip's signatures on top of the fused ops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplclip import checks, distributed, ops
from simplclip.ops.similarity_loss import DIVERGENCES, INTERACTIVE, NEGATIVES
from simplclip.ops.similarity_plan import SCRATCH_BYTES

PLANES = ("scalar", "hadamard")


def _weight(name: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{name}: expected a weight of 0 or more, got {value!r}")
    return value


class _SimilarityLoss(nn.Module):
    """What the losses share: open_clip's distributed modes, and the plane of pair matching.

    With world_size > 1 each rank sweeps its own rows against the gathered features. Values and gradients are open_clip's in
    each mode:

        local_loss  gather_with_grad   value                   gradient of the features, before DDP's average
        no          no                 of the whole batch      of the whole batch's loss
        no          yes                of the whole batch      world_size times that
        yes         yes                of this rank's rows     world_size times that
        yes         no                 of this rank's rows     of this rank's loss, the other ranks' features held constant

    The gradients of scales and planes are each rank's share: their average, which DDP forms, is that of the batch's loss.
    """

    # l = p S + q starts between the cosines of unmatched (about 0) and matched (about 0.3 and more) pairs.
    INITIAL_WEIGHT, INITIAL_BIAS = 10.0, -2.0

    scratch_bytes = SCRATCH_BYTES  # of similarity_loss; may be set on an instance

    def __init__(
        self,
        local_loss,
        gather_with_grad,
        cache_labels,
        rank,
        world_size,
        use_horovod,
        *,
        pm_weight,
        plane,
        negatives,
        embed_dim,
    ):
        super().__init__()
        self.pm_weight = _weight("pm_weight", pm_weight)
        checks.choice("plane", plane, PLANES)
        checks.choice("negatives", negatives, NEGATIVES)
        if plane == "hadamard" and pm_weight and embed_dim is None:
            raise ValueError("embed_dim: expected the width D of the features for plane='hadamard', got None")
        if use_horovod and world_size > 1:
            raise ValueError("use_horovod: expected False, since the ranks exchange through torch.distributed, got True")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.plane = plane
        self.negatives = negatives
        if pm_weight:
            shape = (embed_dim,) if plane == "hadamard" else ()
            self.plane_weight = nn.Parameter(torch.full(shape, self.INITIAL_WEIGHT))
            self.plane_bias = nn.Parameter(torch.tensor(self.INITIAL_BIAS))

    def _group(self):
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() != self.world_size:
            have = torch.distributed.get_world_size() if torch.distributed.is_initialized() else "no process group"
            raise RuntimeError(f"world_size: expected a process group of {self.world_size} ranks, got {have}")
        return torch.distributed.group.WORLD

    def _own_features(self, *features: Tensor) -> tuple[Tensor, ...]:
        """This rank's features, with the gradient that open_clip's mode gives them."""
        if self.world_size == 1 or self.local_loss or self.gather_with_grad:
            return features
        return tuple(distributed.scale_gradient(t, 1 / self.world_size) for t in features)

    def _value(self, loss: Tensor) -> Tensor:
        """The value that open_clip's mode reports."""
        return loss if self.world_size == 1 or self.local_loss else distributed.mean(loss, self._group())

    def _terms(self, image, text, logit_scale, terms, ids, *, teacher=None, projected=(None, None), **options):
        """The terms of this rank's rows. teacher: image features, text features, scale; projected: image's, text's."""
        if "pair_matching" in terms:
            options |= {"plane": (self.plane_weight, self.plane_bias), "negatives": self.negatives}
            if self.negatives == "shift":
                columns = text.shape[0] * self.world_size
                options["shift"] = torch.randint(1, max(columns, 2), (), device=image.device)
        teacher_image, teacher_text, teacher_scale = teacher or (None, None, None)
        options |= {"terms": terms, "ids": ids, "teacher_scale": teacher_scale, "scratch_bytes": self.scratch_bytes}
        if self.world_size == 1 or not self.local_loss or self.gather_with_grad:
            return ops.similarity_loss(
                image, text, logit_scale, teacher_image=teacher_image, teacher_text=teacher_text,
                projected_image=projected[0], projected_text=projected[1],
                group=None if self.world_size == 1 else self._group(), **options,
            )  # fmt: skip
        group = self._group()
        images = (image, teacher_image, projected[0])
        texts = (text, teacher_text, projected[1])
        everyones = lambda own: [None if t is None else distributed.gather(t.detach(), group) for t in own]  # noqa: E731
        options |= {"label_offset": self.rank * image.shape[0], "symmetric": False}
        options["text_ids"] = None if ids is None else distributed.gather(ids, group)
        halves = []
        for (x, teacher_x, projected_x), (y, teacher_y, projected_y) in (
            (images, everyones(texts)),
            (texts, everyones(images)),
        ):
            half = ops.similarity_loss(
                x, y, logit_scale, teacher_image=teacher_x, teacher_text=teacher_y,
                projected_image=projected_x, projected_text=projected_y, **options,
            )  # fmt: skip
            halves.append(half)
        return {name: 0.5 * (halves[0][name] + halves[1][name]) for name in halves[0]}


class ClipPMLoss(_SimilarityLoss):
    r"""Contrastive loss plus pair matching, in the place of `open_clip.ClipLoss`.

        loss = ClipLoss(image, text) + pm_weight · ½ [mean_i softplus(−l_ii) + mean over negatives softplus(l_ij)]

    with the learned hyperplane l = p S + q (plane="scalar") or l_ij = w·(x_i ⊙ y_j) + q (plane="hadamard") over the
    similarity S of L2-normalised features; see `simplclip.ops.similarity_loss`, which never stores the N×N matrix (memory
    there). The plane is this module's parameters: `plane_weight` (p [], or w [D]) and `plane_bias` (q []); give them to the
    optimizer. pm_weight=0 has no parameters and is exactly ClipLoss.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.ClipLoss. (Labels are an offset here, so
            that there is nothing to cache.) use_horovod is refused.
        pm_weight: weight of pair matching, 0 or more.
        plane: "scalar" or "hadamard"; hadamard needs embed_dim.
        negatives: "all", "shift" (one negative per row, drawn anew at each call from torch's default generator) or "hard".
        embed_dim: D, for plane="hadamard".

    Source: open_clip.loss.ClipLoss; arXiv 2411.14789 names pair matching, its form here is this library's reading.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        pm_weight: float = 1.0,
        plane: str = "scalar",
        negatives: str = "all",
        embed_dim: int | None = None,
    ):
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod,
            pm_weight=pm_weight, plane=plane, negatives=negatives, embed_dim=embed_dim,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"pm_weight={self.pm_weight}, plane={self.plane!r}, negatives={self.negatives!r}"

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        logit_bias: Tensor | None = None,  # []
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,  # [N] int64
    ) -> Tensor | dict[str, Tensor]:
        """The loss; with output_dict its weighted terms, `contrastive_loss` and (with pm_weight) `pair_matching_loss`.

        ids: pairs with equal ids are not each other's negatives (several captions of an image, duplicates).
        """
        terms = ("contrastive", "pair_matching") if self.pm_weight else ("contrastive",)
        image, text = self._own_features(image_features, text_features)
        values = self._terms(image, text, logit_scale, terms, ids, logit_bias=logit_bias)
        losses = {"contrastive_loss": self._value(values["contrastive"])}
        if self.pm_weight:
            losses["pair_matching_loss"] = self.pm_weight * self._value(values["pair_matching"])
        return losses if output_dict else sum(losses.values())


class WIKDLoss(_SimilarityLoss):
    r"""Distillation from teachers in three spaces beside the contrastive loss, in the place of `open_clip.DistillClipLoss`.

        loss = contrastive_weight · ClipLoss + relational_weight · (cross-entropy of the student's to the teacher's softmax of
               the similarities, rows and columns) + interactive_weight · (student against teacher across modalities)
               + feature_weight · (distance of normalised features, mean of image and text) + pm_weight · pair matching

    all similarity terms in one sweep without N×N matrices: see `simplclip.ops.similarity_loss` and `feature_loss`. With the
    default weights the values are open_clip's: `distill_loss` is a cross-entropy, which is the KL divergence plus the
    entropy of the teacher's softmax, a constant that divergence="kl" leaves out.

    Several teachers: give tuples as dist_image_features, dist_text_features and dist_logit_scale. Their softmaxes are
    averaged (a cross-entropy to the average is the average of the cross-entropies), the other terms too. Each teacher after
    the first costs a sweep of its own.

    Args:
        local_loss, gather_with_grad, cache_labels, rank, world_size: as in open_clip.DistillClipLoss. use_horovod is refused.
        contrastive_weight, relational_weight, interactive_weight, feature_weight, pm_weight: 0 or more; a term with weight 0
            costs nothing and is not returned.
        interactive: "infonce" or "kl"; learn_interactive_scale: its own temperature as a parameter, `interactive_log_scale`
            (starts at log 1/0.07), instead of logit_scale.
        feature_distance: "mse" or "smooth_l1".
        divergence: "cross_entropy" or "kl".
        plane, negatives, embed_dim: of pair matching, as in ClipPMLoss.
        embed_dim, teacher_dim: D and D̂ (a tuple for several teachers); where they differ, the interactive and feature terms
            project the student's features by learned `image_projections` and `text_projections` [D̂, D].

    Source: open_clip.loss.DistillClipLoss; Yang et al. 2023 (CLIP-KD, arXiv 2307.12732); arXiv 2411.14789 for WIKD.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        contrastive_weight: float = 1.0,
        relational_weight: float = 1.0,
        interactive_weight: float = 0.0,
        interactive: str = "infonce",
        learn_interactive_scale: bool = False,
        feature_weight: float = 0.0,
        feature_distance: str = "mse",
        divergence: str = "cross_entropy",
        pm_weight: float = 0.0,
        plane: str = "scalar",
        negatives: str = "all",
        embed_dim: int | None = None,
        teacher_dim: int | tuple[int, ...] | None = None,
    ):
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod,
            pm_weight=pm_weight, plane=plane, negatives=negatives, embed_dim=embed_dim,
        )  # fmt: skip
        self.contrastive_weight = _weight("contrastive_weight", contrastive_weight)
        self.relational_weight = _weight("relational_weight", relational_weight)
        self.interactive_weight = _weight("interactive_weight", interactive_weight)
        self.feature_weight = _weight("feature_weight", feature_weight)
        checks.choice("interactive", interactive, INTERACTIVE)
        checks.choice("divergence", divergence, DIVERGENCES)
        checks.choice("feature_distance", feature_distance, ("mse", "smooth_l1"))
        self.interactive, self.divergence, self.feature_distance = interactive, divergence, feature_distance
        self.interactive_log_scale = None
        if interactive_weight and learn_interactive_scale:
            self.interactive_log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        widths = teacher_dim if isinstance(teacher_dim, (tuple, list)) else (teacher_dim,)
        if any(widths) and embed_dim is None:
            raise ValueError("embed_dim: expected the width D of the student's features beside teacher_dim, got None")
        project = interactive_weight or feature_weight
        widths = [width if project and width not in (None, embed_dim) else 0 for width in widths]
        self.image_projections, self.text_projections = (
            nn.ParameterList(nn.Parameter(torch.randn(w, embed_dim or 0) * (embed_dim or 1) ** -0.5) for w in widths)
            if any(widths)
            else None
            for _ in range(2)
        )

    def extra_repr(self) -> str:
        names = ("contrastive", "relational", "interactive", "feature", "pm")
        weights = ", ".join(f"{name}_weight={getattr(self, f'{name}_weight')}" for name in names)
        return f"{weights}, interactive={self.interactive!r}, divergence={self.divergence!r}"

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        dist_image_features: Tensor | tuple[Tensor, ...],  # [N, D̂]
        dist_text_features: Tensor | tuple[Tensor, ...],  # [N, D̂]
        dist_logit_scale: Tensor | tuple[Tensor, ...],  # []
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,  # [N] int64
    ) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """The weighted terms in this order, without those of weight 0; with output_dict by name:

        `contrastive_loss`, `distill_loss` (relational), `interactive_loss`, `feature_loss`, `pair_matching_loss`.
        """
        teachers = self._teachers(dist_image_features, dist_text_features, dist_logit_scale)
        image, text = self._own_features(image_features, text_features)
        weights = {
            "contrastive": self.contrastive_weight,
            "relational": self.relational_weight,
            "interactive": self.interactive_weight,
            "feature": self.feature_weight,
            "pair_matching": self.pm_weight,
        }
        once, totals = ("contrastive", "pair_matching"), {}
        for index, teacher in enumerate(teachers):
            share = {name: weight if name in once else weight / len(teachers) for name, weight in weights.items()}
            share = {name: weight for name, weight in share.items() if weight and not (index and name in once)}
            projected = self._projected(index, image, text)
            values = {}
            terms = tuple(name for name in share if name != "feature")
            if terms:
                normalised = tuple(None if p is None else F.normalize(p, dim=-1) for p in projected)
                values = self._terms(
                    image, text, logit_scale, terms, ids,
                    teacher=teacher if {"relational", "interactive"} & set(terms) else None,
                    projected=normalised if "interactive" in terms else (None, None),
                    interactive=self.interactive, divergence=self.divergence,
                    interactive_scale=None if self.interactive_log_scale is None else self.interactive_log_scale.exp(),
                )  # fmt: skip
            if "feature" in share:
                students = (own if p is None else p for own, p in zip((image, text), projected))
                pairs = zip(students, teacher[:2])
                values["feature"] = 0.5 * sum(ops.feature_loss(s, t, distance=self.feature_distance) for s, t in pairs)
            for name, weight in share.items():
                totals[name] = totals.get(name, 0) + weight * values[name]
        keys = {"relational": "distill_loss"}
        losses = {keys.get(name, f"{name}_loss"): self._value(totals[name]) for name in weights if name in totals}
        return losses if output_dict else tuple(losses.values())

    @staticmethod
    def _teachers(images, texts, scales) -> list[tuple[Tensor, Tensor, Tensor]]:
        if not isinstance(images, (tuple, list)):
            images, texts, scales = (images,), (texts,), (scales,)
        given = {"dist_image_features": images, "dist_text_features": texts, "dist_logit_scale": scales}
        for name, value in given.items():
            if not isinstance(value, (tuple, list)) or len(value) != len(images) or not images:
                count = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
                raise ValueError(f"{name}: expected one for each of {len(images)} teachers, got {count}")
        return list(zip(images, texts, scales))

    def _projected(self, index: int, image: Tensor, text: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.image_projections is None or index >= len(self.image_projections):
            return None, None
        weights = self.image_projections[index], self.text_projections[index]
        if not weights[0].numel():
            return None, None
        return F.linear(image, weights[0]), F.linear(text, weights[1])
