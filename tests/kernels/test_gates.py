"""The gates detect what they are for, and the tables of tiles are complete. `make aot` runs the gates themselves."""

import importlib.metadata
import importlib.util
import itertools
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)

from gates import extension, gate
from gates.kernels import compile_kernel, kernels, launches, similarity

from simplclip.kernels import launch as start
from simplclip.kernels import tuning
from simplclip.ops import backends


def of_one_matrix(tile):
    launch = next(launch for launch in launches(False) if launch.tiles == 1 and launch.SIGMOIDS == 2)
    return gate.measure(similarity(launch, "bfloat16", 86, False, tile), 86)


@pytest.mark.slow
def test_a_spill_fails_the_gate():
    row = of_one_matrix(tuning.Tile(128, 128, 32, 4, 2, 1))
    assert row.spills > 0
    assert any("spill" in failure for failure in row.failures)


@pytest.mark.slow
def test_tf32_operands_are_rounded():
    launch = next(launch for launch in launches(False) if launch.tiles == 1 and not launch.SIGMOIDS)
    text = compile_kernel(similarity(launch, "tf32", 86, True), 86).asm["ptx"]
    assert text.count("cvt.rna.tf32.f32") > 8


def test_too_much_shared_memory_fails_the_gate():
    row = of_one_matrix(tuning.Tile(128, 128, 64, 8, 6, 2))
    assert any("shared memory" in failure for failure in row.failures)
    assert any("planned 2" in failure for failure in row.failures)


@pytest.mark.parametrize("older", [False, True])
def test_every_table_entry_is_complete_and_no_smaller_than_a_dot(older, monkeypatch):
    """A tile has products of at least 16, or of 8 in float32 where Triton can."""
    monkeypatch.setattr(tuning, "OLDER", older)
    architectures = (*tuning.ARCHITECTURES, tuning.INTERPRETER, 87, 100)
    for precision, architecture in itertools.product(tuning.PRECISIONS, architectures):
        least = 8 if precision == "ieee" and not older else 16
        for op, matrices in itertools.product(("similarity_forward", "similarity_backward"), range(1, 5)):
            tile = tuning.lookup(op, matrices, precision, architecture)
            assert min(tile.block_m, tile.block_n, tile.block_k) >= least, (op, matrices, precision, architecture)
        tile = tuning.lookup("parallel_mlp_hidden", 1, precision, architecture)
        assert min(tile.block_m, tile.block_n, tile.block_k) >= least, (precision, architecture)
    assert set(tuning.ARCHITECTURES) == set(gate.LIMITS)


@pytest.mark.parametrize("older", [False, True])
def test_the_gates_compile_every_tile_that_may_be_chosen(older, monkeypatch):
    """Every tile is compiled in each kernel of a single matrix: with and without ids, and with rows alone."""
    monkeypatch.setattr(tuning, "OLDER", older)
    names = {"similarity_forward": "_similarity_statistics_kernel", "similarity_backward": "_similarity_gradient_kernel"}
    for architecture, dtype in itertools.product((86, 89, 90), ("bfloat16", "float16")):
        compiled = {(kernel.name, kernel.tile, kernel.matrices) for kernel in kernels(dtype, architecture, False)}
        for op in tuning.TUNED:
            default, second = (
                {
                    what
                    for name, of, what in compiled
                    if (name, of) == (names[op], tile) and re.match("Z([+ ](?!.*sig)|$)", what)
                }
                for tile in tuning.candidates(op, 1, "half", architecture).values()
            )
            assert default == second, (op, architecture)
            assert len(default) >= 4


def test_an_unknown_architecture_takes_the_tiles_of_the_nearest_one():
    for unknown, nearest in ((75, 80), (87, 86), (100, 90), (103, 90), (110, 120), (121, 120)):
        for op, precision in tuning._TABLE:
            assert tuning.lookup(op, 1, precision, unknown) == tuning.lookup(op, 1, precision, nearest)
    assert len({tuning.lookup("similarity_forward", 2, "half", each) for each in (86, 100, 121)}) > 1


def test_tiles_are_those_of_the_installed_triton(monkeypatch):
    assert tuning._older() == tuning.OLDER
    for version, expected in (("3.6.0", True), ("3.7.1+git1", True), ("3.8.0", False), ("3.10.0", False), ("4.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert tuning._older() == expected, version

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert not tuning._older()


def test_a_spill_warns_once_when_a_kernel_starts():
    """Triton returns a compiled kernel, or None under the interpreter."""
    spilled, clean = (
        SimpleNamespace(name=f"_kernel_{spills}", n_spills=spills, metadata=SimpleNamespace(target=SimpleNamespace(arch=86)))
        for spills in (7, 0)
    )
    message = r"_kernel_7: expected no spilled registers on sm_86, got 7 from Triton 3\."
    for result, expected in ((spilled, [message]), (spilled, []), (clean, []), (None, [])):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            start.started({(3,): lambda *args, result=result, **options: result})[(3,)](1, BLOCK=2)
        assert len(found) == len(expected)
        assert all(re.match(pattern, str(warning.message)) for pattern, warning in zip(expected, found))


def test_every_kernel_is_started_so():
    sources = [path.read_text() for path in Path(start.__file__).parent.rglob("*.py")]
    assert not [line for source in sources for line in re.findall(r"^.*_kernel\[.*$", source, re.MULTILINE)]
    assert sum(source.count("started(_") for source in sources) >= 7


@pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))
def test_every_launch_of_shaped_attention_fits_every_architecture():
    plan = backends.cuda_extension.shaped_attention_plan
    least = min(shared for shared, *_ in gate.LIMITS.values())
    for tokens, width, wide, backward in itertools.product(range(1, 81), range(16, 129, 16), (0, 1), (0, 1)):
        if backends.cuda_extension.shaped_attention_why_not(tokens, width, wide):
            assert wide
            assert width > 64
            continue
        found = plan(tokens, width, wide, backward)
        assert 0 < found["shared"] <= least, (tokens, width, wide, backward, found)
        assert found["resident"] > 0
        assert found["threads"] // 32 * 16 >= tokens


@pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))
def test_padded_work_of_the_text_tower():
    for backward, direction in enumerate(extension.PRODUCTS):
        plan = backends.cuda_extension.shaped_attention_plan(77, 64, False, backward)
        assert 1 <= extension.padding(plan, direction, 77) <= 1.12
