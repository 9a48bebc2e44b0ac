"""The bytes that ranks exchange and allocate, counted on fake tensors and a fake process group."""

import warnings

import pytest
import tiny
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simplclip.common.errors import InputError
from simplclip.losses import ClipPMLoss, SigLipLoss, WIKDLoss
from simplclip.memory import Budget, fake, make, micro_batch_that_fits
from simplclip.memory.count import Counter
from simplclip.memory.exchange import Exchange, pretended
from simplclip.ops import backends
from simplclip.train.config import ConfigError

BUDGET = Budget(24 << 30)


class Wire(TorchDispatchMode):
    """A mode that counts the bytes that this rank sends, without the loss's value."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks, self.sent, self.largest = ranks, 0, 0

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


def step(loss_of, ranks, n, width, dtype, teacher_width=0, ids=False):
    """Returns the bytes sent and the peak memory of a loss's forward and backward on the first of several ranks."""
    with pretended(ranks), FakeTensorMode(allow_fallback_kernels=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # open_clip 3.3 calls what torch 2.15 deprecates
        loss = loss_of({"gather_with_grad": True, "rank": 0, "world_size": ranks})
        if hasattr(loss, "_shapes"):
            loss._shapes.check = lambda *_: None  # the check reads values
        features = [torch.empty(n, width, dtype=dtype, requires_grad=True) for _ in range(2)]
        teacher = [torch.empty(n, teacher_width, dtype=dtype) for _ in range(2)] if teacher_width else []
        scale = torch.empty((), requires_grad=True)
        args = (*features, scale, *teacher, *([scale.detach()] if teacher else []))
        options = {"ids": torch.empty(n, dtype=torch.int64)} if ids else {}
        counter, wire = Counter(torch.device("cpu")), Wire(ranks)
        with counter.counting(), wire:
            value = loss(*args, **options)
            (sum(value) if isinstance(value, tuple) else value).backward()
    return wire, counter.usage.peak


KINDS = {
    "contrastive": (lambda mode: ClipPMLoss(pm_weight=0, **mode), {"terms": ("contrastive",)}),
    "with ids": (lambda mode: ClipPMLoss(pm_weight=0, **mode), {"terms": ("contrastive",), "ids": True}),
    "hadamard": (
        lambda mode: ClipPMLoss(plane="hadamard", embed_dim=512, **mode),
        {"terms": ("contrastive", "pair_matching"), "parameters": 513},
    ),
    "sigmoid": (lambda mode: SigLipLoss(rank=0, world_size=mode["world_size"]), {"terms": ("sigmoid",)}),
    **{
        interactive: (
            lambda mode, interactive=interactive: WIKDLoss(
                interactive_weight=1, interactive=interactive, feature_weight=1, embed_dim=512, teacher_dim=768, **mode
            ),
            {
                **{"terms": ("contrastive", "relational", "interactive", "feature"), "ids": True},
                **{"teacher_width": 768, "parameters": 2 * 512 * 768},
            },
        )
        for interactive in ("infonce", "kl")
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "n"), [(2, 1024), (1024, 1024)])
def test_the_bytes_of_a_step_are_the_formula_s(kind, ranks, n):
    loss_of, what = KINDS[kind]
    dtype = torch.float32
    wire, _ = step(loss_of, ranks, n, 512, dtype, what.get("teacher_width", 0), what.get("ids", False))
    exchange = Exchange(ranks, n, 512, dtype.itemsize, **what)
    assert wire.sent == sum(exchange.sent().values())
    assert wire.largest <= ranks * n * 768 * 4  # features of the whole batch, but no matrix of its pairs


@pytest.mark.parametrize(("native", "most"), [(True, 4.5), (False, 6.1)])
def test_bytes_grow_with_the_batch_and_not_with_its_square(native, most, monkeypatch):
    """A million pairs on 1,024 ranks, with features of 512 numbers in bfloat16.

    A CPU that does not multiply bfloat16 holds the gathered text, 1 GiB, once more in float32, and so its products.
    """
    monkeypatch.setattr(backends, "native_bf16", native)
    of_half, of_all = (Exchange(ranks, 1024, 512, 2).sent() for ranks in (512, 1024))
    assert 2 < sum(of_all.values()) / sum(of_half.values()) < 2.01
    wire, peak = step(KINDS["contrastive"][0], 1024, 1024, 512, torch.bfloat16)
    assert wire.sent == sum(of_all.values())
    assert peak < most * 2**30  # a matrix of this rank's rows would take 2 GiB in bfloat16, 4 in float32


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is a build without CUDA")
@pytest.mark.parametrize("half", [False, True])
def test_memory_of_a_rank_is_a_twentieth_of_open_clip_s_local_loss(half):
    """32,768 pairs over 4 ranks, float32 features, with and without autocast, on a fake card."""
    card, peaks = torch.device("cuda", 0), []
    for loss_of in (ClipLoss, lambda **mode: ClipPMLoss(pm_weight=0, **mode)):
        mode, counter = FakeTensorMode(allow_fallback_kernels=False), Counter(card)
        of, engine = fake.faker(mode, card), fake.Engine(lambda _: None)
        with warnings.catch_warnings(), fake.fake_step(mode, card), engine.installed(), pretended(4), counter.counting():
            warnings.simplefilter("ignore")
            loss = loss_of(local_loss=True, gather_with_grad=True, rank=0, world_size=4)
            loss.scratch_bytes, loss.store_bytes = 16 << 20, 0
            shapes = ((8192, 512), (8192, 512), ())
            leaves = [of(torch.empty(shape, device="meta")).requires_grad_() for shape in shapes]
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                value = loss(*leaves)
            value.backward()
        peaks.append(counter.usage.peak)
    theirs, ours = peaks
    assert 4 << 30 < theirs < 5 << 30
    assert 20 * ours <= theirs, peaks


@pytest.mark.slow
def test_a_plan_of_ranks(tmp_path):
    """Each rank has its share of the pairs, the gathered features and DDP's buckets; bytes are those of the run's loss."""
    config, share = (
        tiny.settings(tmp_path, f"data.batch_size={size}", "loss.interactive_weight=1", teacher=256) for size in (256, 64)
    )
    options = {"device": "cpu", "solve": False}
    of_one = make(share, BUDGET, **options)
    plan = make(config, BUDGET, **options, ranks=4, rate=320.0)
    assert (plan.ranks, plan.answers[0].batch_size) == (4, 64)
    assert plan.exchange["computing"] == 0.2
    more = plan.usage.at_peak["gradients"] - of_one.usage.at_peak["gradients"]
    sent = plan.exchange["sent"]["gradients of parameters"]
    assert more == sent * 2 // 3  # a copy of all gradients; a rank sends 2 · 3/4 times its size
    assert plan.usage.peak >= of_one.usage.peak + more
    assert plan.exchange["seconds"]["25 Gbit/s"] == 8 * sum(plan.exchange["sent"].values()) / 25e9
    assert (of_one.ranks, of_one.exchange) == (1, {})
    with pytest.raises(ConfigError, match="data.batch_size: expected a multiple of 3 ranks, got 256"):
        make(config, BUDGET, **options, ranks=3)
    with pytest.raises(InputError, match="--compare: expected one rank, got 4"):
        make(config, BUDGET, **options, ranks=4, compare=True)


@pytest.mark.slow
def test_a_micro_batch_for_a_rank_is_found_within_a_process_group(tmp_path):
    """As with data.micro_batch=auto under torchrun, where the loader needs a multiple of the number of ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = dist.group.WORLD
        config = tiny.settings(tmp_path, "data.batch_size=144", "model.freeze_norms=true")
        peak = make(config, BUDGET, device="cpu", solve=False, ranks=4).usage.peak
        found = micro_batch_that_fits(config, Budget(peak - 1, 0, 0, 0.0), device="cpu", ranks=4)
        assert (found.data.batch_size, found.data.micro_batch) == (144, 12)
        assert dist.group.WORLD is whole
        assert dist.get_world_size() == 1
        assert dist.new_group().group_name == "1"  # the number is that of ranks that made no plan
    finally:
        dist.destroy_process_group()


def test_one_process_exchanges_nothing():
    assert sum(Exchange(1, 4096, 512, parameters=10).sent().values()) == 0
    with pretended(1):
        assert not dist.is_initialized()
