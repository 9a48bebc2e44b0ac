import contextlib
import functools

import pytest
import torch

from simplclip.ops import distributed
from support.ranks.launch import forked_ranks, torchrun

pytestmark = pytest.mark.long


# Parts for three ranks, in make prove. Statistics of one column a rank ("one pair") have strides by
# which a kernel must not read them.
OF_THREE = ("open_clip", "one process", "one pair", "learned parameters")
PARTS = {
    2: (*OF_THREE, "exchanges", "gradient caching", "transformers", "fully_shard"),
    3: OF_THREE,
}


@pytest.fixture(scope="module")
def of_ranks():
    """Runs the parts for a number of ranks in one start, and returns the output."""
    return functools.cache(lambda ranks: forked_ranks("losses.py", *PARTS[ranks], ranks=ranks))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "part"),
    [
        *((2, part) for part in PARTS[2]),
        *(pytest.param(3, part, marks=pytest.mark.prove) for part in OF_THREE),
    ],
)
def test_losses_on_ranks_equal_open_clip_or_one_process(ranks, part, of_ranks):
    if part == "transformers":
        pytest.importorskip(
            "transformers",
            reason="transformers is not installed: pip install 'simplclip[transformers]'",
        )
    assert of_ranks(ranks).stdout.count(f"{part} passed") == ranks, of_ranks(ranks).stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.prove)])
def test_one_pair_a_rank_in_triton(ranks):
    pytest.importorskip("triton", reason="the package triton is not installed")
    forked_ranks("losses.py", "one pair in Triton", ranks=ranks, check=True)


@pytest.mark.prove
def test_fully_shard_with_towers_that_inductor_compiles():
    run = torchrun("losses.py", "fully_shard by inductor")
    assert run.stdout.count("passed") == 2, run.stderr[-5000:]


def test_shapes_are_read_at_the_first_call_and_when_they_change(monkeypatch):
    """On a GPU, reading shapes waits for the device; a meta tensor cannot be read at all."""
    gathered = []
    monkeypatch.setattr(
        torch.distributed, "all_gather_into_tensor", lambda *a, **k: gathered.append(a)
    )
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    shapes, features = distributed.SameShapes(), torch.empty(4, 8, device="meta")
    for rows, read in ((4, True), (4, False), (4, False), (3, True), (3, False), (4, True)):
        image = features[:rows]
        with pytest.raises(NotImplementedError) if read else contextlib.nullcontext():
            shapes.check({"image": image, "text": image, "ids": None}, None)
    assert len(gathered) == 6  # every rank gathers at every call
