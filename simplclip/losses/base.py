"""Code that the losses share: open_clip's constructor, its modes of ranks, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Never

import torch
from torch import Tensor, nn

from simplclip.common.errors import check_count
from simplclip.ops import checks, distributed
from simplclip.ops.similarity import inputs

STUDENT = ("image_features", "text_features")
TEACHER = ("dist_image_features", "dist_text_features", "dist_logit_scale")
NAMES = dict(zip(inputs.NAMES, (*STUDENT, *TEACHER)))


def checked_weight(name: str, value: float) -> float:
    """Returns a term's weight as a float; raises an error for no finite number of 0 or more."""
    number = checks.number(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected a weight of 0 or more, got {value!r}")
    return number


def checked_width(name: str, value: int | None) -> int | None:
    """Returns the width of features, an integer above 0 or None; raises InputError for others."""
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
        """Returns the default process group, which must have this loss's world_size and rank."""
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

    def _scaled_for_ranks(self, image: Tensor, text: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """Returns image and text, gradients scaled as in the mode; a collective that checks shapes.

        others: the teacher's image and text features, and ids, as far as there are any.
        """
        tensors = dict(zip((*STUDENT, *TEACHER[:2], "ids"), (image, text, *others)))
        self._shapes.check(tensors, self._group())
        if self.local_loss or self.gather_with_grad:
            return image, text
        share = 1 / self.world_size
        return distributed.scale_gradient(image, share), distributed.scale_gradient(text, share)

    def _gathered(self, *rows: Tensor | None, constant: bool = True) -> list[Any]:
        """Returns the rows of all ranks in their order, by collective calls; None for None."""
        if self.world_size <= 1:
            return list(rows)
        group = self._group()
        gathered = []
        for t in rows:
            if t is not None:
                t = distributed.gather(t.detach() if constant else t, group)
            gathered.append(t)
        return gathered

    def _synchronised_parameters(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns parameters of the loss; backward averages their gradients over the ranks.

        The first call overwrites them by the first rank's, if not compiled. Both are collective.
        """
        if self.world_size <= 1:
            return parameters
        if not torch.compiler.is_compiling() and not self._same_parameters:
            distributed.from_first_rank(self.parameters(), self._group())
            self._same_parameters = True
        return distributed.average_gradients_over_ranks(parameters, self._group())

    def _averaged_over_ranks(self, loss: Tensor) -> Tensor:
        """Returns the loss [] as the mode reports it: this rank's, or the mean, a collective."""
        return loss if self.local_loss else distributed.mean_over_ranks(loss, self._group())
