"""Code that the losses share: checks, open_clip's distributed modes, options, and the hyperplane of pair matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simplclip import ops
from simplclip.ops import checks, distributed
from simplclip.ops.registry import autocast
from simplclip.ops.similarity import inputs
from simplclip.ops.similarity.contrastive import Contrastive

PLANES = ("scalar", "hadamard")


def weight_of(name: str, value: float) -> float:
    if (number := checks.number(name, value)) < 0:
        raise ValueError(f"{name}: expected a weight of 0 or more, got {value!r}")
    return number


def width_of(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: expected an integer above 0 or None, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name}: expected an integer above 0 or None, got {value}")
    return value


def check_width(features: str, t: Tensor, name: str, width: int | None) -> None:
    if width is not None and t.dim() == 2 and t.shape[1] != width:
        raise ValueError(f"{features}: expected the width {name} = {width}, got shape {checks.shape_of(t)}")


def first_columns(parameter: Tensor, features: Tensor) -> Tensor:
    """Returns the part of a parameter that a prefix [N, w] of the features uses: [..., D] -> [..., w]."""
    width = features.shape[1]
    return parameter if parameter.shape[-1] == width else parameter[..., :width]


def terms_of_sum(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Returns the weighted terms from a result of similarity_loss with `weights`, for a caller that adds up the terms.

    The first term carries the gradient of the whole sum, the others none: the sum has the right value and gradient.
    """
    terms = {name: weight * values[name] for name, weight in weights.items()}
    first = next(iter(terms))
    terms[first] = terms[first] + (values["loss"] - values["loss"].detach())
    return terms


def gather_early(features: Tensor, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Starts to gather the features [N, D] of all ranks, so that they travel while another tower works.

        text = text_tower(texts)
        gather_early(text)
        image = image_tower(images)
        value = loss(image, text, scale)  # waits for the texts

    Values and gradients have the same bits as without this call. The losses gather the texts (with local_loss=True,
    gather_with_grad=False and in RowwiseLoss the images too), hence the text tower comes first. Features that the loss does
    not gather, or changes before it gathers them, travel in vain.

    group: by default all ranks. N, D and dtype must be equal on all ranks, which is not checked. The features travel in their
    dtype, under autocast in autocast's dtype, as in the loss. In one process and under torch.compile nothing is done.
    """
    checks.features("features", features, "[N, D]")
    if torch.compiler.is_compiling() or not torch.distributed.is_initialized():
        return
    group = torch.distributed.group.WORLD if group is None else group
    if torch.distributed.get_world_size(group) > 1:
        with torch.no_grad():
            (cast,) = autocast(features)
        distributed.gather_early(features, cast.dtype, group)


class SimilarityLoss(nn.Module):
    """Base class with open_clip's distributed modes and the plane of pair matching.

    With world_size > 1 each rank computes its own rows against the gathered features. Values and gradients are open_clip's in
    each mode:

        local_loss  gather_with_grad   value                   gradient of the features, before DDP's average
        no          no                 of the whole batch      of the whole batch's loss
        no          yes                of the whole batch      world_size times the gradient of the whole batch's loss
        yes         yes                of this rank's rows     world_size times the gradient of the whole batch's loss
        yes         no                 of this rank's rows     of this rank's loss, the other ranks' features held constant

    Each rank computes its share of the gradients of the scales: DDP's average is the gradient of the batch's loss. The loss's
    own parameters (planes, projections, ...) need no DDP: the first call gives all ranks the first rank's values, and each
    backward pass averages the gradients. DDP would average equal gradients again, which changes nothing.

    The `forward` of a loss passes its features through `_own_features` and calls `_of`. `_of` gets the terms by name from
    `_terms`, passes its results through `_value`, and reads the loss's parameters through `_learned`. MatryoshkaLoss calls
    `_of` with prefixes of the features; `first_columns` then cuts parameters of the features' width. A loss without pair
    matching sets pm_weight=0.

    options: the options of ops.similarity_loss that the loss has, of label_smoothing, decoupled, prior, margin, positives.
    """

    # l = p S + q is 0 at S = 0.2 at first, between the cosines of unmatched (about 0) and matched (about 0.3 and more) pairs.
    INITIAL_WEIGHT, INITIAL_BIAS = 10.0, -2.0

    scratch_bytes: int | None = None  # passed to similarity_loss, as is store_bytes; may be set on an instance
    store_bytes: int | None = None

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
        embed_dim: int | None = None,
        **options: Any,
    ):
        nn.Module.__init__(self)  # not super().__init__: a subclass may also inherit from open_clip's loss
        self.pm_weight = weight_of("pm_weight", pm_weight)
        checks.choice("plane", plane, PLANES)
        self.embed_dim = width_of("embed_dim", embed_dim)
        if plane == "hadamard" and pm_weight and embed_dim is None:
            raise ValueError("embed_dim: expected the width D of the features for plane='hadamard', got None")
        if use_horovod and world_size > 1:
            raise ValueError("use_horovod: expected False, since the ranks communicate through torch.distributed, got True")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self.plane = plane
        if pm_weight:
            shape = (embed_dim,) if plane == "hadamard" else ()
            self.plane_weight = nn.Parameter(torch.full(shape, self.INITIAL_WEIGHT))
            self.plane_bias = nn.Parameter(torch.tensor(self.INITIAL_BIAS))
        inputs.check_contrastive(Contrastive(**options), ("contrastive",))
        if isinstance(options.get("prior"), Tensor):
            raise TypeError("prior: expected a number or None (a tensor for each pair: ops.similarity_loss), got Tensor")
        self.options = options
        self._shapes = distributed.SameShapes()
        self._same_parameters = False  # whether all ranks have the first rank's parameters

    def _group(self):
        have = torch.distributed.get_world_size() if torch.distributed.is_initialized() else "no process group"
        if have != self.world_size:
            raise RuntimeError(f"world_size: expected a process group of {self.world_size} ranks, got {have}")
        return torch.distributed.group.WORLD

    def _own_features(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's features, with gradients scaled as in open_clip's mode. Checks that ranks have equal shapes."""
        checks.features("image_features", image, "[N, D]")
        checks.features("text_features", text, "[N, D]")
        check_width("image_features", image, "embed_dim", self.embed_dim)
        check_width("text_features", text, "embed_dim", self.embed_dim)
        if self.world_size > 1:
            self._shapes.check(image, text, self._group())
        if self.world_size <= 1 or self.local_loss or self.gather_with_grad:
            return image, text
        share = 1 / self.world_size
        return distributed.scale_gradient(image, share), distributed.scale_gradient(text, share)

    def _learned(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns parameters of the loss; backward averages their gradients over the ranks."""
        if self.world_size <= 1:
            return parameters
        if not torch.compiler.is_compiling() and not self._same_parameters:
            distributed.from_first_rank(self.parameters(), self._group())
            self._same_parameters = True
        return distributed.learned(parameters, self._group())

    def _value(self, loss: Tensor) -> Tensor:
        """Returns the value that open_clip's mode reports: the loss of this rank, or the mean over the ranks."""
        return loss if self.world_size <= 1 or self.local_loss else distributed.mean(loss, self._group())

    def _terms(self, terms: tuple[str, ...], image: Tensor, text: Tensor, **options: Any) -> dict[str, Tensor]:
        """Returns the terms of this rank's rows. options: tensors and options of ops.similarity_loss."""
        options |= {"terms": terms, "scratch_bytes": self.scratch_bytes, "store_bytes": self.store_bytes, **self.options}
        if "pair_matching" in terms:
            weight, bias = self._learned(self.plane_weight, self.plane_bias)
            options["plane"] = first_columns(weight, text) if self.plane == "hadamard" else weight, bias
        if self.world_size <= 1:
            return ops.similarity_loss(image, text, **options)
        group = self._group()
        if not self.local_loss or self.gather_with_grad:
            return ops.similarity_loss(image, text, group=group, **options)

        # The directions are computed apart, each with this rank's rows and the columns of all ranks, which are constants. The
        # mean of both is taken below, so an option that treats rows and columns differently must be applied there too.
        image, text = autocast(image, text)  # before they travel

        def gather(own):
            return None if own is None else distributed.gather(own.detach(), group)

        options |= {"label_offset": self.rank * image.shape[0], "symmetric": False, "text_ids": gather(options.get("ids"))}
        kinds = ("", "teacher_", "projected_")
        own: dict[str, Any] = {"image": image, "text": text}
        own |= {f"{kind}{side}": options.pop(f"{kind}{side}", None) for kind in kinds[1:] for side in ("image", "text")}
        by_image, by_text = (
            ops.similarity_loss(
                **{f"{kind}image": own[f"{kind}{rows}"] for kind in kinds},
                **{f"{kind}text": gather(own[f"{kind}{columns}"]) for kind in kinds},
                **options,
            )
            for rows, columns in (("image", "text"), ("text", "image"))
        )
        return {name: 0.5 * (by_image[name] + by_text[name]) for name in by_image}
