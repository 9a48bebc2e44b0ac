"""The Triton kernels of similarity_loss: under the interpreter in a process of its own, and on a GPU where there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_cases

TESTS = Path(__file__).parent
NAMES = [*triton_cases.cases(), *triton_cases.EXTRA]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
NO_GPU = None if torch.cuda.is_available() else "no CUDA device"


@pytest.fixture(scope="module")
def interpreted():
    """What each case came to under the interpreter; one process for all of them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(
        [sys.executable, TESTS / "triton_cases.py"], env=environment, capture_output=True, text=True, cwd=TESTS
    )
    results = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return results, done.stderr


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, interpreted):
    results, errors = interpreted
    assert results.get(name, "no result") == "ok", errors[-4000:]


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("name", [*NAMES, *triton_cases.large_cases()])
def test_on_gpu(name):
    triton_cases.run_named(name, "cuda")


@needs_triton
def test_every_tile_of_columns_has_one_program():
    from simplclip.kernels.similarity_launch import column_splits

    for row_blocks in (1, 2, 7, 64, 257):
        for tiles in (1, 2, 3, 41, 256):
            for slots in (1, 82, 264):
                splits, per_split = column_splits(row_blocks, tiles, slots)
                assert (splits - 1) * per_split < tiles <= splits * per_split
    assert column_splits(1, 256, 82)[0] > 60  # few rows alone would leave most multiprocessors without work


@needs_triton
def test_importing_kernels_compiles_nothing():
    code = "import simplclip.kernels.similarity_loss, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent)
    assert done.stdout.strip() == "False", done.stderr
