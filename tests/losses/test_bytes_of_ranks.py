"""The bytes that ranks send and allocate in a loss, on fake tensors: docs/scaling.md."""

import contextlib
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simplclip.losses import ClipPMLoss, SigLipLoss, WIKDLoss
from simplclip.plan.meter import Meter


@contextlib.contextmanager
def pretended(ranks):
    """Context in which this process is the first of `ranks` ranks, and collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sent(ranks, n, width, itemsize, terms, teacher_width=0, ids=False, parameters=0):
    """The bytes that a rank sends in a step, by the table of docs/scaling.md.

    Without those of statistics, which an op exchanges where a mode does not see it.
    """
    others, terms = ranks - 1, set(terms)
    there_and_back = 2 * width if terms - {"interactive", "feature"} else 0
    teacher = ("relational" in terms) + 2 * ("interactive" in terms)  # texts, and texts and images
    features = n * itemsize * (there_and_back + teacher * teacher_width)
    numbers = 8 * n * ids * ((there_and_back > 0) + ("interactive" in terms))
    return others * (features + numbers) + 2 * 4 * parameters * others // ranks


class Wire(TorchDispatchMode):
    """A mode that counts the bytes that this rank sends, without the loss's value."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks = ranks
        self.sent = 0
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::") and "broadcast" not in name:
            tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
            size = max(t.numel() * t.element_size() for t in tensors)
            self.largest = max(self.largest, size)
            times = {"c10d::_allgather_base_": 1, "c10d::alltoall_base_": 1, "c10d::allreduce_": 2}
            if tensors[0].numel() > 1:  # not the loss's value
                self.sent += times.get(name, 0) * size * (self.ranks - 1) // self.ranks
        return func(*args, **(kwargs or {}))


def step(loss_of, ranks, n, width, teacher_width, ids):
    """Returns the mode that counted the bytes that the first of several ranks sent in a loss."""
    with pretended(ranks), FakeTensorMode(allow_fallback_kernels=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip 3.3 calls what torch 2.15 deprecates
        mode = {} if loss_of is SigLipLoss else {"gather_with_grad": True}
        loss = loss_of(rank=0, world_size=ranks, **mode)
        if hasattr(loss, "_shapes"):
            loss._shapes.check = lambda *_: None  # the check reads values
        features = [torch.empty(n, width, requires_grad=True) for _ in range(2)]
        args = (*features, torch.empty((), requires_grad=True))
        if teacher_width:
            args += (*(torch.empty(n, teacher_width) for _ in range(2)), torch.empty(()))
        options = {"ids": torch.empty(n, dtype=torch.int64)} if ids else {}
        wire = Wire(ranks)
        with wire:
            value = loss(*args, **options)
            (sum(value) if isinstance(value, tuple) else value).backward()
    return wire


CONTRASTIVE = partial(ClipPMLoss, pm_weight=0)
DISTILLED = partial(
    WIKDLoss, interactive_weight=1, feature_weight=1, embed_dim=512, teacher_dim=768
)
OF_DISTILLED = {
    "terms": ("contrastive", "relational", "interactive", "feature"), "ids": True,
    "teacher_width": 768, "parameters": 2 * 512 * 768,
}  # fmt: skip
KINDS = {
    "contrastive": (CONTRASTIVE, {"terms": ("contrastive",)}),
    "with ids": (CONTRASTIVE, {"terms": ("contrastive",), "ids": True}),
    "pair matching": (ClipPMLoss, {"terms": ("contrastive", "pair_matching"), "parameters": 2}),
    "sigmoid": (SigLipLoss, {"terms": ("sigmoid",)}),
    "infonce": (DISTILLED, OF_DISTILLED),
    "kl": (partial(DISTILLED, interactive="kl"), OF_DISTILLED),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 1024])
def test_bytes_of_a_step_equal_the_formula(kind, ranks):
    n = 1024
    loss_of, what = KINDS[kind]
    wire = step(loss_of, ranks, n, 512, what.get("teacher_width", 0), what.get("ids", False))
    assert wire.sent == sent(ranks, n, 512, 4, **what)
    # features of the whole batch, but no matrix of its pairs
    assert wire.largest <= ranks * n * 768 * 4


@pytest.mark.parametrize("half", [False, True])
def test_memory_of_a_rank_is_a_twentieth_of_open_clip_s_local_loss(half):
    """32,768 pairs over 4 ranks, float32 features, with and without autocast, on fake tensors."""
    peaks = []
    for loss_of in (ClipLoss, CONTRASTIVE):
        fake = FakeTensorMode(allow_fallback_kernels=False)
        with warnings.catch_warnings(), pretended(4), fake, Meter(torch.device("cpu")) as meter:
            warnings.simplefilter("ignore")
            loss = loss_of(local_loss=True, gather_with_grad=True, rank=0, world_size=4)
            loss.scratch_bytes, loss.store_bytes = 16 << 20, 0
            if hasattr(loss, "_shapes"):
                loss._shapes.check = lambda *_: None  # the check reads values
            leaves = [
                torch.empty(shape, requires_grad=True) for shape in ((8192, 512), (8192, 512), ())
            ]
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss(*leaves)
            value.backward()
            del value
        peaks.append(meter.peak)
    of_open_clip, fused = peaks
    assert 4 << 30 < of_open_clip < 5 << 30
    assert 20 * fused <= of_open_clip, peaks
