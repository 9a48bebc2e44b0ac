"""The sweeps over similarity matrices that the terms of a call of similarity_loss need."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from simplclip.ops import backends
from simplclip.ops.similarity.call import SimilarityCall


@dataclass
class Sweep:
    """One pass over the rows of the matrices, and the terms that are computed from the pass."""

    call: SimilarityCall | None = None  # the call that computes the softmaxes; None if the sweep has only sigmoid terms
    contrastive: bool = False
    sigmoids: tuple[str, ...] = ()  # "sigmoid" and "pair_matching", whose matrix is the student's


def sweeps_of(call: SimilarityCall, terms: Collection[str], *, keep_ids: bool, hadamard: bool, weighted: bool) -> list[Sweep]:
    """Returns the sweeps for the terms, and sets `call.softmax`. The interactive term "infonce" needs no sweep.

    keep_ids: whether the call has ids and the contrastive softmax keeps the pairs with equal ids. hadamard: whether pair
    matching's hyperplane has a weight for each feature, and so a matrix of its own. weighted: whether only the weighted sum
    of the terms has a gradient.
    """
    contrastive = "contrastive" in terms
    # The softmaxes of other terms leave out the pairs with equal ids, so a softmax that keeps them has a sweep of its own.
    alone = contrastive and keep_ids
    call.softmax = (contrastive and not alone) or call.relational
    softmaxes = [Sweep(call, contrastive and not alone)] if call.softmax or call.interactive else []
    if alone:
        own = replace(call, softmax=True, drop_ids=False, relational=False, interactive=False)
        softmaxes.append(Sweep(own, contrastive=True))

    together = [term for term in ("sigmoid", "pair_matching") if term in terms]
    apart = [together.pop()] if hadamard and "pair_matching" in together else []
    joined = next((sweep for sweep in softmaxes if _has_room(sweep.call)), None)
    if joined is not None:
        joined.sigmoids = tuple(together)
        together = []
    # A sweep of sigmoid terms computes the gradient of their sum alone, so terms that each need a gradient have a sweep each.
    lots = [together, apart] if weighted else [[term] for term in together + apart]
    return [Sweep(sigmoids=tuple(lot)) for lot in lots if lot] + softmaxes


def _has_room(call: SimilarityCall) -> bool:
    """Whether sigmoid terms may join a sweep. On a GPU a sweep with a teacher's matrix has no registers left for them."""
    return call.softmax and not (on_gpu(call) and call.has_teacher)


def on_gpu(call: SimilarityCall) -> bool:
    """Whether a GPU computes the call, or in tests Triton's interpreter."""
    return call.image.device.type != "cpu" or backends.forced() == "triton"
