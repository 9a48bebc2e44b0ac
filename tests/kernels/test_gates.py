"""The gates detect what they are for, and the tables of tiles are complete.

`make aot` runs the gates themselves.
"""

import importlib.util
import itertools
import pkgutil
import re
import warnings
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

import triton

from gates import extension, gate
from gates.kernels import SIMPLEST, compile_kernel, kernels, similarity
from simplclip import kernels as triton_code
from simplclip.kernels import runtime as launching
from simplclip.kernels import tuning
from simplclip.kernels.similarity.plan import SIDE
from simplclip.ops import backends


def of_one_matrix(tile):
    return gate.measure(similarity(SIMPLEST._replace(plane=True), "bfloat16", 86, False, tile), 86)


@pytest.mark.slow
def test_a_spill_fails_the_gate():
    row = of_one_matrix(tuning.Tile(128, 128, 32, 4, 2, 1))
    assert row.spills > 0
    assert any("spill" in failure for failure in row.failures)


@pytest.mark.slow
def test_tf32_operands_are_rounded():
    text = compile_kernel(similarity(SIMPLEST, "tf32", 86, True), 86).asm["ptx"]
    assert text.count("cvt.rna.tf32.f32") > 8


@pytest.mark.slow
@pytest.mark.parametrize("name", gate.MATRIX_WRITERS)
def test_a_thread_stores_16_bytes_at_a_time(name):
    kernel = next(kernel for kernel in kernels("bfloat16", 86, False) if kernel.name == name)
    assert not gate.measure(kernel, 86).failures


@pytest.mark.slow
def test_too_much_shared_memory_fails_the_gate():
    row = of_one_matrix(tuning.Tile(128, 128, 64, 8, 6, 2))
    assert any("shared memory" in failure for failure in row.failures)
    assert any("planned 2" in failure for failure in row.failures)


def test_every_precision_has_tiles():
    """A tile divides the sides of blocks; 16 is the least product of all versions of Triton."""
    for precision, architecture in itertools.product(tuning.PRECISIONS, gate.LIMITS):
        for kernel in ("statistics", "gradient", "sigmoid", "parallel_mlp"):
            assert tuning.lookup(precision, architecture, kernel)
    for line, tile in tuning._TILES.items():
        assert min(tile[:3]) >= 16, line
        assert SIDE % tile.block_m == SIDE % tile.block_n == 0, line


@pytest.mark.slow
def test_statistics_have_just_the_planned_blocks():
    kernel = similarity(SIMPLEST, "bfloat16", 86, False, tuning.Tile(64, 64, 32, 4, 4, 2))
    assert gate.measure(kernel, 86).failures == ["3 blocks per multiprocessor, planned 2"]


def test_the_gates_compile_every_kernel():
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
    assert written == {kernel.name for kernel in kernels("bfloat16", 86, False)}


def test_a_spill_warns_once_when_a_kernel_starts():
    spilled, clean = (
        SimpleNamespace(
            name=f"_kernel_{spills}",
            n_spills=spills,
            metadata=SimpleNamespace(target=SimpleNamespace(arch=86)),
        )
        for spills in (7, 0)
    )
    grid = (1 << 20,)  # more than CUDA's other dimensions hold
    message = r"_kernel_7: expected no spilled registers on sm_86, got 7 from Triton 3\."
    for result, expected in ((spilled, [message]), (spilled, []), (clean, [])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            launching.launch({grid: lambda *_, result=result, **options: result}, *grid, 1, BLOCK=2)
        assert len(caught) == len(expected)
        assert all(
            re.match(pattern, str(warning.message)) for pattern, warning in zip(expected, caught)
        )


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
