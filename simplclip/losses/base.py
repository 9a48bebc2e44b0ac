"""Code that the losses share: open_clip's constructor and distributed modes, checks, and the
hyperplane of pair matching.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor, nn

from simplclip import ops
from simplclip.common.errors import check_count
from simplclip.ops import checks, distributed
from simplclip.ops.autocast import autocast
from simplclip.ops.similarity import inputs

PLANES = ("scalar", "hadamard")
STUDENT = ("image_features", "text_features")
TEACHER = ("dist_image_features", "dist_text_features", "dist_logit_scale")
OF_TEACHER = ("relational", "interactive", "feature")  # terms


def weight_of(name: str, value: float) -> float:
    if (number := checks.number(name, value)) < 0:
        raise ValueError(f"{name}: expected a weight of 0 or more, got {value!r}")
    return number


def width_of(name: str, value: int | None) -> int | None:
    if value is not None:
        check_count(name, value, 1)
    return value


@dataclass(frozen=True)
class Teacher:
    """A teacher's features of the pairs, and its scale, which only the relational term needs."""

    image: Tensor  # [N, D̂]
    text: Tensor  # [N, D̂]
    scale: Tensor | None = None  # []


@dataclass(frozen=True)
class Pairs:
    """A batch of pairs, as a loss gets it."""

    image: Tensor  # [N, D]
    text: Tensor  # [N, D]
    scale: Tensor  # []
    bias: Tensor | None = None  # []
    ids: Tensor | None = None  # [N] int64
    teacher: Teacher | None = None


class DistributedLoss(nn.Module):
    """Base class with open_clip's distributed modes.

    With world_size > 1 each rank computes its own rows against the gathered features. Values and
    gradients are open_clip's in each mode:

        local_loss  gather_with_grad  value    gradient of the features, before DDP's average
        no          no                 batch's  of the batch's loss
        no          yes                batch's  world_size times that of the batch's loss
        yes         yes                rank's   world_size times that of the batch's loss
        yes         no                 rank's   of this rank's loss, others' features constant

    "batch's" is of the whole batch, "rank's" of this rank's rows.

    Each rank computes its share of the gradients of the scales: DDP's average is the gradient of
    the batch's loss. The loss's own parameters (planes, projections, ...) need no DDP: the first
    call gives all ranks the first rank's values, and each backward pass averages the gradients. DDP
    would average equal gradients again, which changes nothing.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        **unknown: Never,  # an error when it runs, and one of type checkers
    ) -> None:
        # not super().__init__: a subclass may also inherit from open_clip's loss
        nn.Module.__init__(self)
        if unknown:
            name = type(self).__name__
            recipes = "docs/recipes.md has label smoothing, several positives and others"
            raise TypeError(
                f"{name}: expected arguments that help({name}) lists, got {', '.join(unknown)}; "
                f"{recipes}"
            )
        check_count("rank", rank, 0)
        check_count("world_size", world_size, 0)
        if rank >= max(1, world_size):
            raise ValueError(f"rank: expected less than world_size = {world_size}, got {rank}")
        if use_horovod and world_size > 1:
            raise ValueError(
                "use_horovod: expected False, since the ranks communicate through "
                "torch.distributed, got True"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        # of get_ground_truth, which subclasses of open_clip's loss have
        self.labels: dict[torch.device, Tensor] = {}
        self._shapes = distributed.SameShapes()
        self._same_parameters = False  # whether all ranks have the first rank's parameters

    def _group(self) -> Any:
        have = (
            torch.distributed.get_world_size()
            if torch.distributed.is_initialized()
            else "no process group"
        )
        if have != self.world_size:
            raise RuntimeError(
                f"world_size: expected a process group of {self.world_size} ranks, got {have}"
            )
        if (rank := torch.distributed.get_rank()) != self.rank:
            raise RuntimeError(f"rank: expected this process's rank, {rank}, got {self.rank}")
        return torch.distributed.group.WORLD

    def _own_rows(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's features, with gradients scaled as in open_clip's mode.

        Checks that ranks have equal shapes.
        """
        self._shapes.check(image, text, self._group())
        if self.local_loss or self.gather_with_grad:
            return image, text
        share = 1 / self.world_size
        return distributed.scale_gradient(image, share), distributed.scale_gradient(text, share)

    def _gathered(self, rows: Any) -> Any:
        """Returns the rows of all ranks as constants; None for None."""
        return (
            rows
            if rows is None or self.world_size <= 1
            else distributed.gather(rows.detach(), self._group())
        )

    def _learned(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns parameters of the loss; backward averages their gradients over the ranks."""
        if self.world_size <= 1:
            return parameters
        if not torch.compiler.is_compiling() and not self._same_parameters:
            distributed.from_first_rank(self.parameters(), self._group())
            self._same_parameters = True
        return distributed.learned(parameters, self._group())

    def _value(self, loss: Tensor) -> Tensor:
        """Returns the value that open_clip's mode reports: the loss of this rank, or the mean over
        the ranks.
        """
        return loss if self.local_loss else distributed.mean(loss, self._group())


def why_teacher(terms: tuple[str, ...]) -> str | None:
    """Returns why a teacher is needed, None if no term needs one."""
    return next((f"the term {term!r} needs it" for term in terms if term in OF_TEACHER), None)


def teacher_of(values: Any, terms: tuple[str, ...]) -> Teacher | None:
    """Returns the teacher of an argument (image, text, scale), if a term needs it."""
    why = why_teacher(terms)
    if why is None:
        return None
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        raise ValueError(
            f"teacher: expected ({', '.join(TEACHER)}), since {why}, got {type(values).__name__}"
        )
    return Teacher(*values)


class SimilarityLoss(DistributedLoss):
    """Base class of the losses by ops.similarity_loss, with the plane of pair matching."""

    # l = p S + q is 0 at S = 0.2 at first, between the cosines of unmatched (about 0) and matched
    # (about 0.3 and more) pairs.
    INITIAL_WEIGHT, INITIAL_BIAS = 10.0, -2.0

    # passed to similarity_loss, as is store_bytes; may be set on an instance
    scratch_bytes: int | None = None
    store_bytes: int | None = None
    divergence = "kl"  # of the relational term
    # True within MatryoshkaLoss: narrower features than embed_dim use the parameters' first columns
    prefixes = False

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        pm_weight: float = 0.0,
        plane: str = "scalar",
        embed_dim: int | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **unknown
        )
        self.pm_weight = weight_of("pm_weight", pm_weight)
        checks.choice("plane", plane, PLANES)
        self.plane, self.embed_dim = plane, width_of("embed_dim", embed_dim)
        self.plane_weight = self.plane_bias = None
        if pm_weight:
            if plane == "hadamard" and embed_dim is None:
                raise ValueError(
                    "embed_dim: expected the width D of the features for plane='hadamard', got None"
                )
            shape = () if embed_dim is None or plane == "scalar" else (embed_dim,)
            self.plane_weight = nn.Parameter(torch.full(shape, self.INITIAL_WEIGHT))
            self.plane_bias = nn.Parameter(torch.tensor(self.INITIAL_BIAS))

    def terms(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # []
        *,
        weights: Mapping[str, float],
        logit_bias: Tensor | None = None,  # []
        ids: Tensor | None = None,  # [N] int64
        teacher: tuple[Tensor, Tensor, Tensor] | None = None,  # [N, D̂], [N, D̂], []
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the weighted sum [] of the terms that `weights` names, which has the gradient,
        and the terms without one.

        The terms are weighted. Their names are "contrastive", "sigmoid", "pair_matching" (if the
        loss has a plane, by pm_weight above 0) and "relational"; of WIKDLoss "interactive" and
        "feature" too. The weights that the constructor got do not count here.
        """
        record = teacher_of(teacher, tuple(weights))
        pairs = Pairs(image_features, text_features, logit_scale, logit_bias, ids, record)
        values = self._values(pairs, tuple(weights), weights)
        total = values.pop("loss")
        return total, {name: weights[name] * value for name, value in values.items()}

    def _values(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """Returns the terms before weighting, each with its gradient; with `weights`, without, and
        beside them "loss".
        """
        checks.features("image_features", pairs.image, "[N, D]")
        checks.features("text_features", pairs.text, "[N, D]")
        if self.embed_dim is not None:
            self._check_width(self.embed_dim, pairs.image, pairs.text)
        if self.world_size > 1:
            image, text = self._own_rows(pairs.image, pairs.text)
            pairs = replace(pairs, image=image, text=text)
        image, text = pairs.image, pairs.text
        if text.shape != image.shape or text.dtype != image.dtype or text.device != image.device:
            inputs.check_pair(dict(zip(STUDENT, autocast(image, text))), equal_rows=True)
        if pairs.teacher is not None:
            pairs = replace(pairs, teacher=self._constants(pairs.teacher, image, text, terms))
        values = self._similarity(pairs, terms, weights)
        return (
            values
            if self.world_size <= 1
            else {name: self._value(value) for name, value in values.items()}
        )

    def _constants(
        self, teacher: Teacher, image: Tensor, text: Tensor, terms: tuple[str, ...]
    ) -> Teacher | None:
        """Returns the teacher of the terms that need one, checked and detached."""
        why = why_teacher(terms)
        if why is None:
            return None
        unused = teacher.scale is None and "relational" not in terms
        arguments = dict(zip(TEACHER[: 3 - unused], (teacher.image, teacher.text, teacher.scale)))
        return Teacher(
            *inputs.constants_of_teacher(arguments, dict(zip(STUDENT, (image, text))), why)
        )

    def _similarity(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None
    ) -> dict[str, Tensor]:
        """Returns the terms of this rank's rows, by ops.similarity_loss."""
        image = pairs.image
        text = pairs.text
        ids = pairs.ids
        plane = None
        weight: Any = self.plane_weight if "pair_matching" in terms else None
        if weight is not None:
            bias: Any = self.plane_bias
            if self.world_size > 1:
                weight, bias = self._learned(weight, bias)
            plane = weight[: text.shape[1]] if self.plane == "hadamard" else weight, bias
        teacher = pairs.teacher
        teacher_image, teacher_text, teacher_scale = (
            (teacher.image, teacher.text, teacher.scale) if teacher else (None,) * 3
        )
        options: dict[str, Any] = {
            "logit_scale": pairs.scale,
            "logit_bias": pairs.bias,
            "terms": terms,
            "plane": plane,
            "teacher_image": teacher_image,
            "teacher_text": teacher_text,
            "teacher_scale": teacher_scale,
            "divergence": self.divergence,
            "weights": weights,
            "ids": ids,
            "scratch_bytes": self.scratch_bytes,
            "store_bytes": self.store_bytes,
        }
        if self.world_size <= 1 or not self.local_loss or self.gather_with_grad:
            return ops.similarity_loss(
                image, text, group=self._group() if self.world_size > 1 else None, **options
            )

        # The directions are computed apart, each with this rank's rows and the columns of all
        # ranks, which are constants.
        image, text = autocast(image, text)  # before they travel
        gather = self._gathered
        options |= {
            "label_offset": self.rank * len(image),
            "text_ids": gather(ids),
            "symmetric": False,
        }
        compute: Any = partial(ops.similarity_loss, **options)
        by_image = compute(
            image, gather(text), teacher_image=teacher_image, teacher_text=gather(teacher_text)
        )
        by_text = compute(
            text, gather(image), teacher_image=teacher_text, teacher_text=gather(teacher_image)
        )
        return {name: 0.5 * (by_image[name] + by_text[name]) for name in by_image}

    def _check_width(self, embed_dim: int, image: Tensor, text: Tensor) -> None:
        for name, features in (("image_features", image), ("text_features", text)):
            width = features.shape[-1]
            if width > embed_dim or width < embed_dim and not self.prefixes:
                got = checks.shape_of(features)
                raise ValueError(
                    f"{name}: expected the width embed_dim = {embed_dim}, got shape {got}"
                )
