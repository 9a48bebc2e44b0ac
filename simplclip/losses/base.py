"""Code that the losses share: open_clip's constructor, its modes of ranks, checks, the plane."""

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
from simplclip.ops.modes import autocast
from simplclip.ops.similarity import inputs

PLANES = ("scalar", "hadamard")
STUDENT = ("image_features", "text_features")
TEACHER = ("dist_image_features", "dist_text_features", "dist_logit_scale")
TEACHER_TERMS = ("relational", "interactive", "feature")


def checked_weight(name: str, value: float) -> float:
    """Returns the weight of a term as a float.

    name: the argument's name, for errors. Raises ValueError for a negative or infinite number,
    TypeError for another type.
    """
    number = checks.number(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected a weight of 0 or more, got {value!r}")
    return number


def checked_width(name: str, value: int | None) -> int | None:
    """Returns the width of features as it is; None, for no width, passes.

    name: the argument's name, for errors. Raises InputError if the width is no integer above 0.
    """
    if value is not None:
        check_count(name, value, 1)
    return value


def check_known(loss: str, unknown: Mapping[str, Any]) -> None:
    """Raises TypeError for arguments that a loss, by its name, does not have."""
    if unknown:
        raise TypeError(
            f"{loss}: expected arguments that help({loss}) lists, got {', '.join(unknown)}; "
            "docs/recipes.md has label smoothing, several positives and others"
        )


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

    def swapped(self) -> Pairs:
        """Returns new pairs with image and text exchanged, those of the teacher too."""
        teacher = self.teacher
        if teacher is not None:
            teacher = Teacher(teacher.text, teacher.image, teacher.scale)
        return replace(self, image=self.text, text=self.image, teacher=teacher)


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
        """Stores the modes, see the class. The process group is looked up at the first call only.

        Raises TypeError for an unknown argument or a flag that is no bool, ValueError if rank is
        not below world_size, or for use_horovod with several ranks.
        """
        # not super().__init__: a subclass may also inherit from open_clip's loss
        nn.Module.__init__(self)
        check_known(type(self).__name__, unknown)
        checks.check_boolean("local_loss", local_loss)
        checks.check_boolean("gather_with_grad", gather_with_grad)
        checks.check_boolean("cache_labels", cache_labels)
        checks.check_boolean("use_horovod", use_horovod)
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
        """Returns the default process group, which must have this loss's world_size and rank.

        Raises RuntimeError if it has others or does not exist.
        """
        size: int | str = "no process group"
        if torch.distributed.is_initialized():
            size = torch.distributed.get_world_size()
        if size != self.world_size:
            raise RuntimeError(
                f"world_size: expected a process group of {self.world_size} ranks, got {size}"
            )
        rank = torch.distributed.get_rank()
        if rank != self.rank:
            raise RuntimeError(f"rank: expected this process's rank, {rank}, got {self.rank}")
        return torch.distributed.group.WORLD

    def _check_and_scale_with_all_ranks(
        self, image: Tensor, text: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns image and text of this rank, with gradients scaled as in open_clip's mode.

        Without local_loss and gather_with_grad backward divides their gradients by world_size. A
        collective call: it raises ValueError on every rank if shapes or dtypes differ between
        ranks. others: a teacher's image and text features, and ids, or None; they are checked too.
        """
        names = (*STUDENT, *TEACHER[:2], "ids")
        self._shapes.check(dict(zip(names, (image, text, *others))), self._group())
        if self.local_loss or self.gather_with_grad:
            return image, text
        share = 1 / self.world_size
        return distributed.scale_gradient(image, share), distributed.scale_gradient(text, share)

    def _gather_constants(self, rows: Any) -> Any:
        """Returns the rows of all ranks in the order of ranks, without a gradient; None for None.

        A collective call if world_size > 1; else the rows are returned as they are.
        """
        if rows is None or self.world_size <= 1:
            return rows
        return distributed.gather(rows.detach(), self._group())

    def _synchronised_parameters(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns parameters of the loss; backward averages their gradients over the ranks.

        If world_size > 1, the first call overwrites all parameters of this module by the first
        rank's, a collective call, as backward is each time. Under torch.compile nothing is
        overwritten. With one rank the parameters are returned as they are.
        """
        if self.world_size <= 1:
            return parameters
        if not torch.compiler.is_compiling() and not self._same_parameters:
            distributed.from_first_rank(self.parameters(), self._group())
            self._same_parameters = True
        return distributed.average_gradients_over_ranks(parameters, self._group())

    def _averaged_over_ranks(self, loss: Tensor) -> Tensor:
        """Returns the loss [] as open_clip's mode reports it: of this rank, or the mean of all.

        The mean, without local_loss, is a collective call; its gradient reaches this rank's value
        unchanged.
        """
        return loss if self.local_loss else distributed.mean_over_ranks(loss, self._group())


def why_teacher(terms: tuple[str, ...]) -> str | None:
    """Returns why a teacher is needed, a clause for errors; None if no term needs one.

    terms: names; "relational", "interactive" and "feature" need a teacher.
    """
    return next((f"the term {term!r} needs it" for term in terms if term in TEACHER_TERMS), None)


def checked_teacher(values: Any, terms: tuple[str, ...]) -> Teacher | None:
    """Returns the Teacher of a tuple or list (image, text, scale), or None if no term needs one.

    terms: names. Raises ValueError if a term needs a teacher and `values` does not have three
    items; the items are not checked.
    """
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
        """Stores the settings and, with pm_weight above 0, makes the plane's parameters.

        pm_weight: weight of pair matching; at 0 plane_weight and plane_bias are None. plane:
        "scalar" (its weight is []) or "hadamard" ([embed_dim], which is then needed). embed_dim:
        the width D that all features must have; None for any. Other arguments as in
        `DistributedLoss`, also the errors; ValueError or TypeError for a value that is not valid.
        """
        super().__init__(
            local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod, **unknown
        )
        self.pm_weight = checked_weight("pm_weight", pm_weight)
        checks.check_choice("plane", plane, PLANES)
        self.plane = plane
        self.embed_dim = checked_width("embed_dim", embed_dim)
        self.plane_weight = self.plane_bias = None
        if pm_weight:
            if plane == "hadamard" and embed_dim is None:
                raise ValueError(
                    "embed_dim: expected the width D of the features for plane='hadamard', got None"
                )
            shape: tuple[int, ...] = ()
            if embed_dim is not None and plane == "hadamard":
                shape = (embed_dim,)
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
        """Returns the sum [] of the weighted terms, and a dict of them without gradients.

        weights: name -> weight, for the terms to compute; the weights that the constructor got do
        not count here. The names are "contrastive", "sigmoid", "pair_matching" (if the loss has a
        plane, by pm_weight above 0) and "relational"; of WIKDLoss "interactive" and "feature" too.
        ids: pairs with equal ids are not each other's negatives. teacher: (image, text, scale),
        which the last three names need. The values of the dict are weighted. A collective call if
        world_size > 1. Raises ValueError for no weights, and for a name or value that is not valid.
        """
        checks.check_instance("weights", weights, Mapping, "a mapping of terms to numbers")
        if not weights:
            raise ValueError("weights: expected a weight of at least one term, got none")
        names = tuple(weights)
        weights = inputs.check_weights(weights, names)
        record = checked_teacher(teacher, names)
        pairs = Pairs(image_features, text_features, logit_scale, logit_bias, ids, record)
        values = self._values(pairs, names, weights)
        total = values.pop("loss")
        return total, {name: weights[name] * value for name, value in values.items()}

    def _values(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """Returns the terms [] by name, before weighting, each with its gradient.

        terms: names as in `terms`. weights: name -> weight of each of them. With it the terms have
        no gradient, and "loss", their weighted sum, has it. A collective call if world_size > 1.
        Raises ValueError or TypeError for features, ids or a teacher that do not fit.
        """
        checks.check_features("image_features", pairs.image, "[N, D]")
        checks.check_features("text_features", pairs.text, "[N, D]")
        if self.embed_dim is not None:
            self._check_width(self.embed_dim, pairs.image, pairs.text)
        if self.world_size > 1:
            teacher = pairs.teacher
            dist = (None, None) if teacher is None else (teacher.image, teacher.text)
            image, text = self._check_and_scale_with_all_ranks(
                pairs.image, pairs.text, *dist, pairs.ids
            )
            pairs = replace(pairs, image=image, text=text)
        image, text = pairs.image, pairs.text
        if text.shape != image.shape or text.dtype != image.dtype or text.device != image.device:
            inputs.check_pair(dict(zip(STUDENT, autocast(image, text))), equal_rows=True)
        if pairs.teacher is not None:
            pairs = replace(pairs, teacher=self._constants(pairs.teacher, image, text, terms))
        values = self._similarity(pairs, terms, weights)
        if self.world_size <= 1:
            return values
        return {name: self._averaged_over_ranks(value) for name, value in values.items()}

    def _constants(
        self, teacher: Teacher, image: Tensor, text: Tensor, terms: tuple[str, ...]
    ) -> Teacher | None:
        """Returns the teacher, checked and detached; None if no term, by its name, needs one.

        image, text: the student's features, whose rows and device the teacher's must have. A scale
        of None is refused only for "relational". Raises ValueError or TypeError; warns once if a
        tensor of the teacher requires a gradient.
        """
        why = why_teacher(terms)
        if why is None:
            return None
        arguments = dict(zip(TEACHER, (teacher.image, teacher.text, teacher.scale)))
        if teacher.scale is None and "relational" not in terms:  # no other term uses it
            del arguments["dist_logit_scale"]
        student = dict(zip(STUDENT, (image, text)))
        return Teacher(*inputs.constants_of_teacher(arguments, student, why))

    def _similarity(
        self, pairs: Pairs, terms: tuple[str, ...], weights: Mapping[str, float] | None
    ) -> dict[str, Tensor]:
        """Returns the terms [] of this rank's rows by name, by ops.similarity_loss.

        Arguments and keys as in `_values`, which has checked them. With several ranks the columns
        are those of all ranks, gathered by collective calls.
        """
        compute: Any = partial(
            ops.similarity_loss,
            logit_scale=pairs.scale,
            logit_bias=pairs.bias,
            terms=terms,
            plane=self._plane(pairs.text.shape[1]) if "pair_matching" in terms else None,
            divergence=self.divergence,
            weights=weights,
            ids=pairs.ids,
            scratch_bytes=self.scratch_bytes,
            store_bytes=self.store_bytes,
        )
        image = pairs.image
        text = pairs.text
        teacher_image = teacher_text = None
        if pairs.teacher is not None:
            teacher_image = pairs.teacher.image
            teacher_text = pairs.teacher.text
            compute = partial(compute, teacher_scale=pairs.teacher.scale)
        if self.world_size <= 1 or not self.local_loss or self.gather_with_grad:
            group = distributed.Checked(self._group()) if self.world_size > 1 else None
            return compute(
                image, text, group=group, teacher_image=teacher_image, teacher_text=teacher_text
            )

        # The directions are computed apart, each with this rank's rows and the columns of all
        # ranks, which are constants.
        image, text = autocast(image, text)  # before they travel
        gather = self._gather_constants
        compute = partial(
            compute,
            symmetric=False,
            label_offset=self.rank * len(image),
            text_ids=gather(pairs.ids),
        )
        by_image = compute(
            image, gather(text), teacher_image=teacher_image, teacher_text=gather(teacher_text)
        )
        by_text = compute(
            text, gather(image), teacher_image=teacher_text, teacher_text=gather(teacher_image)
        )
        return {name: 0.5 * (by_image[name] + by_text[name]) for name in by_image}

    def _plane(self, width: int) -> tuple[Tensor, Tensor] | None:
        """Returns weight ([width] if hadamard, else []) and bias [] of the plane; None without one.

        width: that of the features; a hadamard weight is cut to its first columns. With several
        ranks the tensors are those of `_synchronised_parameters`.
        """
        weight: Any = self.plane_weight
        bias: Any = self.plane_bias
        if weight is None:
            return None
        if self.world_size > 1:
            weight, bias = self._synchronised_parameters(weight, bias)
        if self.plane == "hadamard":
            weight = weight[:width]
        return weight, bias

    def _check_width(self, embed_dim: int, image: Tensor, text: Tensor) -> None:
        """Raises ValueError unless features have embed_dim columns (with `prefixes`: at most)."""
        for name, features in (("image_features", image), ("text_features", text)):
            width = features.shape[-1]
            fits = width == embed_dim or (self.prefixes and width < embed_dim)
            if not fits:
                got = checks.shape_of(features)
                raise ValueError(
                    f"{name}: expected the width embed_dim = {embed_dim}, got shape {got}"
                )
