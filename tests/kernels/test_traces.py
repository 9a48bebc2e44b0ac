"""Launches, torch's kernels and copies from the host in similarity_loss, on fake tensors."""

import functools
import operator
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch.utils._pytree import tree_leaves

from simplclip.common.terms import SWEPT as TERMS
from simplclip.ops import similarity_loss
from simplclip.plan.cards import CARDS
from support.devices import needs_triton
from support.kernels.recorder import names, on_card, trace

pytestmark = needs_triton


def shapes(
    n: int, width: int = 512, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    features = {
        name: torch.empty(n, width, dtype=dtype, device="meta") for name in ("image", "text")
    }
    return features | {"logit_scale": torch.empty((), device="meta")}


def traced(tensors: dict, **options) -> list:
    """Traces a step of similarity_loss. tensors: shapes alone, on the device "meta"."""

    def step(given):
        for name, value in given.items():
            for leaf in tree_leaves(value):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    leaf.requires_grad_(not name.startswith("teacher"))
        out = similarity_loss(**given)
        (
            out["loss"] if "weights" in given else functools.reduce(operator.add, out.values())
        ).backward()

    return trace(step, tensors | options)


@pytest.mark.parametrize(
    ("n", "m", "elements"),
    [(1, 1, 1), (300, 7, 0), (65536, 65536, 1 << 25), (5000, 131072, 1 << 26)]
    + [(1_000_003, 1_000_003, 3 << 30)],
)
def test_sides_of_blocks(n, m, elements):
    """They are found in little time of Python, which a new shape costs."""
    from simplclip.kernels.similarity.plan import SIDE, block_sides

    begin = time.process_time()
    rows, columns = block_sides(n, m, elements, 512, 82)
    assert time.process_time() - begin < 0.5
    assert 0 < rows <= n
    assert 0 < columns <= m
    assert rows == n or rows % SIDE == 0
    assert columns == m or columns % SIDE == 0
    assert rows * columns <= max(elements, SIDE * SIDE)


def test_products_with_blocks_fill_whole_rounds():
    """Of cuBLAS's tiles of 128 x 128 on an RTX 3090: 8192 rows at D = 512 fill 0.78 of 4 rounds."""
    from simplclip.kernels.similarity.plan import block_sides

    for side in block_sides(65536, 65536, 1 << 26, 512, 82):
        rounds = -(-side // 128) * 4 / 82
        assert rounds > 0.95 * -(-rounds // 1)


def rows_alone(n: int, width: int) -> SimpleNamespace:
    """Returns a call of similarity_loss without statistics of columns."""
    features = torch.empty(n, width, dtype=torch.bfloat16, device="meta")
    return SimpleNamespace(
        image=features, text=features, columns=False, has_teacher=False, chunk=n,
        teacher_image=None,
    )  # fmt: skip


@pytest.mark.parametrize(("card", "width"), [("rtx-3090", 512), ("rtx-3090", 1024), ("h100", 768)])
def test_the_rows_of_all_programs_fit_half_of_the_cache(card, width):
    from simplclip.kernels.similarity.plan import sweeps, tile_of

    card = CARDS[card]
    with on_card(card):
        for n in (4096, 32768):
            call = rows_alone(n, width)
            tile = tile_of(call, "statistics")
            (sweep,) = sweeps(call, tile)
            at_a_time = card.multiprocessors * tile.blocks / sweep.splits * tile.block_m
            assert at_a_time * width * 2 <= card.l2 << 19


def test_a_driver_that_reports_no_cache():
    from simplclip.kernels.similarity.plan import sweeps, tile_of

    card = CARDS["rtx-3090"]._replace(l2=0)
    with on_card(card):
        call = rows_alone(4096, 512)
        (sweep,) = sweeps(call, tile_of(call, "statistics"))
    assert sweep.row_count == 4096


def number() -> torch.Tensor:
    return torch.empty((), device="meta")


def every_term(n: int) -> dict[str, object]:
    teacher = {f"teacher_{name}": t for name, t in shapes(n).items() if name != "logit_scale"}
    return {
        "terms": TERMS,
        "plane": (number(), number()),
        "teacher_scale": number(),
        "logit_bias": number(),
        **teacher,
    }


SIGMOIDS = {"terms": ("sigmoid", "pair_matching"), "plane": (number(), number())}
SOFTMAXES = ("contrastive", "pair_matching")
CALLS = {  # options of similarity_loss, and the most launches and kernels of torch in a step
    "contrastive": ({}, 5, 30),
    "pair matching": ({"terms": SOFTMAXES, "plane": (number(), number())}, 5, 52),
    "sigmoid": ({"terms": ("sigmoid",), "logit_bias": number()}, 1, 20),
    "sigmoids": (SIGMOIDS | {"weights": dict.fromkeys(SIGMOIDS["terms"], 0.5)}, 1, 25),
    "ids": (
        {
            "ids": torch.empty(1024, dtype=torch.int64, device="meta"),
            "terms": SOFTMAXES,
            "plane": (0.5, -1.0),
        },
        5,
        60,
    ),
    "every term": (every_term(1024), 8, 92),
}


@pytest.mark.parametrize("name", ["contrastive", "pair matching", "sigmoid"])
def test_the_range_of_float16_costs_one_launch(name):
    """Torch's kernels also undo the factor in both gradients."""
    half, brain = (
        traced(shapes(1024, dtype=dtype), **CALLS[name][0])
        for dtype in (torch.float16, torch.bfloat16)
    )
    assert names(half, "triton") - names(brain, "triton") == Counter(similarity_range=1)
    assert names(half, "torch").total() <= names(brain, "torch").total() + 2


@pytest.mark.parametrize("name", ["contrastive", "every term"])
def test_kernels_do_not_depend_on_how_python_calls_functions(name):
    """torch.compile sets an evaluation of frames, with which a call keeps its arguments longer."""
    step = functools.partial(traced, shapes(1024), **CALLS[name][0])
    assert names(torch._dynamo.run(step)(), "torch") == names(step(), "torch")


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_a_step_and_no_copy_from_the_host(name):
    """Without copies from the host, a CUDA graph can capture each loss."""
    options, launches, kernels = CALLS[name]
    steps = traced(shapes(1024), **options)
    assert not names(steps, "host")
    assert names(steps, "triton").total() <= launches, names(steps, "triton")
    assert names(steps, "torch").total() <= kernels, names(steps, "torch")
