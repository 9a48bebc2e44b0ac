"""What the losses share: their checks, open_clip's distributed modes, and the plane of pair matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simplclip import ops
from simplclip.ops import checks, distributed
from simplclip.ops.similarity.call import NEGATIVES
from simplclip.ops.similarity.sweep import SCRATCH_BYTES

PLANES = ("scalar", "hadamard")


def weight_of(name: str, value: float) -> float:
    if checks.number(name, value) < 0:
        raise ValueError(f"{name}: expected a weight of 0 or more, got {value!r}")
    return value


def width_of(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: expected an integer above 0 or None, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name}: expected an integer above 0 or None, got {value}")
    return value


def check_width(features: str, t: Tensor, name: str, width: int | None) -> None:
    if width is not None and t.dim() == 2 and t.shape[1] != width:
        raise ValueError(f"{features}: expected the width {name} = {width}, got shape {checks.shape_of(t)}")


class SimilarityLoss(nn.Module):
    """Base class with open_clip's distributed modes and the plane of pair matching.

    With world_size > 1 each rank computes its own rows against the gathered features. Values and gradients are open_clip's in
    each mode:

        local_loss  gather_with_grad   value                   gradient of the features, before DDP's average
        no          no                 of the whole batch      of the whole batch's loss
        no          yes                of the whole batch      world_size times that
        yes         yes                of this rank's rows     world_size times that
        yes         no                 of this rank's rows     of this rank's loss, the other ranks' features held constant

    Each rank computes its share of the gradients of scales and planes: DDP's average is the gradient of the batch's loss.
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
        self.pm_weight = weight_of("pm_weight", pm_weight)
        checks.choice("plane", plane, PLANES)
        checks.choice("negatives", negatives, NEGATIVES)
        self.embed_dim = width_of("embed_dim", embed_dim)
        if plane == "hadamard" and pm_weight and embed_dim is None:
            raise ValueError("embed_dim: expected the width D of the features for plane='hadamard', got None")
        if use_horovod and world_size > 1:
            raise ValueError("use_horovod: expected False, since the ranks communicate through torch.distributed, got True")
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
        self._shapes = distributed.SameShapes()

    def _group(self):
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() != self.world_size:
            have = torch.distributed.get_world_size() if torch.distributed.is_initialized() else "no process group"
            raise RuntimeError(f"world_size: expected a process group of {self.world_size} ranks, got {have}")
        return torch.distributed.group.WORLD

    def _own_features(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's features, with gradients scaled as in open_clip's mode. Checks that all ranks have equal shapes."""
        check_width("image_features", image, "embed_dim", self.embed_dim)
        check_width("text_features", text, "embed_dim", self.embed_dim)
        if self.world_size > 1:
            self._shapes.check(image, text, self._group())
        if self.world_size == 1 or self.local_loss or self.gather_with_grad:
            return image, text
        share = 1 / self.world_size
        return distributed.scale_gradient(image, share), distributed.scale_gradient(text, share)

    def _value(self, loss: Tensor) -> Tensor:
        """The value that open_clip's mode reports."""
        return loss if self.world_size == 1 or self.local_loss else distributed.mean(loss, self._group())

    def _terms(self, image, text, logit_scale, terms, ids, *, teacher=None, projected=(None, None), **options):
        """The terms of this rank's rows. teacher: (image features, text features, scale); projected: (image's, text's)."""
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
