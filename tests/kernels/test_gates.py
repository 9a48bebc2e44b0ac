"""The gates detect what they are for, and the tables of tiles are complete.

`make aot` runs the gates themselves.
"""

import importlib.util
import itertools
import pkgutil
from types import SimpleNamespace
from unittest import mock

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

import triton

from gates import extension, gate
from gates.kernels import kernels, tile_of
from simplclip import kernels as triton_code
from simplclip.kernels import tuning
from simplclip.kernels.similarity.plan import SIDE
from simplclip.ops import backends
from support.kernels.calls import CALLS, KINDS, QUICK
from support.kernels.launched import launches_of


def with_tile(call, *tile):
    """Returns the row of a call's statistics in bfloat16 with another tile than the table's."""
    with mock.patch.object(tuning, "lookup", return_value=tuning.Tile(*tile)):
        compiled = kernels("bf16", 86, [call])
        (kernel,) = (each for each in compiled if "statistics" in each.compiled.name)
        return gate.measure(kernel, 86)


@pytest.mark.slow
def test_a_spill_fails_the_gate():
    row = with_tile("pair matching", 128, 128, 32, 4, 2, 1)
    assert row.spills > 0
    assert any("spill" in failure for failure in row.failures)


@pytest.mark.slow
def test_too_much_shared_memory_fails_the_gate():
    row = with_tile("pair matching", 128, 128, 64, 8, 6, 2)
    assert any("shared memory" in failure for failure in row.failures)
    assert any("planned 2" in failure for failure in row.failures)


@pytest.mark.slow
def test_statistics_have_just_the_planned_blocks():
    row = with_tile("contrastive", 64, 64, 32, 4, 4, 2)
    assert row.failures == ["3 blocks per multiprocessor, planned 2"]


@pytest.mark.slow
def test_tf32_operands_are_rounded():
    for kernel in kernels("tf32", 86, ["contrastive"]):
        if kernel.tile:
            assert kernel.compiled.asm["ptx"].count("cvt.rna.tf32.f32") > 8, kernel.compiled.name


@pytest.mark.slow
def test_a_thread_stores_16_bytes_at_a_time():
    compiled = kernels("bf16", 86, ["similarity_loss", "parallel_mlp, gelu"])
    writers = [each for each in compiled if each.compiled.name in gate.MATRIX_WRITERS]
    assert {each.compiled.name for each in writers} == {*gate.MATRIX_WRITERS}
    assert [gate.measure(each, 86).failures for each in writers] == [[]] * len(writers)


def taken(kind, sm):
    """Returns the lines of the table whose tiles launches have; each has that of its parts."""
    found = set()
    for name in CALLS:
        for launch in launches_of(name, kind, sm):
            if tile := tile_of(launch, kind, sm):
                named = launch.named
                blocks = named.get("TILE") or SimpleNamespace(**named)
                sides = blocks.BLOCK_M, blocks.BLOCK_N, blocks.BLOCK_K
                options = [named.get(each) for each in ("num_warps", "num_stages", "maxnreg")]
                asked = f"{name}: {launch.kernel.__name__}"
                assert (*sides, *options) == (*tile[:5], tile.registers), asked
                assert (blocks.PRECISION == "tf32") == (kind == "tf32"), asked
                found |= {line for line, each in tuning._TILES.items() if each is tile}
    return found


@pytest.mark.slow
def test_launches_have_the_tiles_of_the_table_and_the_proof_has_every_tile():
    every = itertools.product(KINDS, gate.LIMITS)
    left = {*tuning._TILES}.difference(*(taken(kind, sm) for kind, sm in every))
    assert not left, f"no call has the tiles {left}"


def test_every_precision_has_tiles():
    """A tile divides the sides of blocks; 16 is the least product of all versions of Triton."""
    for precision, architecture in itertools.product(tuning.PRECISIONS, gate.LIMITS):
        for kernel in ("statistics", "gradient", "sigmoid", "parallel_mlp"):
            assert tuning.lookup(precision, architecture, kernel)
    for line, tile in tuning._TILES.items():
        assert min(tile[:3]) >= 16, line
        assert SIDE % tile.block_m == SIDE % tile.block_n == 0, line


def test_calls_start_every_kernel():
    """A Triton function is a kernel if its name says so; others are parts of kernels."""
    modules = pkgutil.walk_packages(triton_code.__path__, "simplclip.kernels.")
    names = {
        name: value
        for _, module, _ in modules
        for name, value in vars(importlib.import_module(module)).items()
    }
    written = {
        name
        for name, value in names.items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    launches = [each for name in QUICK for each in launches_of(name, "fp16", 86)]
    assert written == {each.kernel.__name__ for each in launches}


@pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))
def test_every_launch_of_shaped_attention_fits_every_architecture():
    plan = backends.cuda_extension.shaped_attention_plan
    least = min(shared for shared, *_ in gate.LIMITS.values())
    for tokens, width, wide, backward in itertools.product(
        range(1, 81), range(16, 129, 16), (0, 1), (0, 1)
    ):
        if backends.cuda_extension.shaped_attention_why_not(tokens, width, wide):
            assert wide
            assert width > 64
            continue
        planned = plan(tokens, width, wide, backward)
        assert 0 < planned["shared"] <= least, (tokens, width, wide, backward, planned)
        assert planned["resident"] > 0
        assert planned["threads"] // 32 * 16 >= tokens
