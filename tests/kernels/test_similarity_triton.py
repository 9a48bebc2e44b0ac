"""The Triton kernels of similarity_loss: under the interpreter in a process of its own, and on a GPU where there is one."""

import subprocess
import sys

import pytest
import triton_cases
from interpreter import make_tests, needs_triton, why_not
from paths import ROOT

NAMES = [*triton_cases.cases(), *triton_cases.EXTRA]
SCRIPT = "support/triton_cases.py"


test_interpreted, test_on_gpu = make_tests(NAMES, triton_cases.large_cases(), triton_cases.run_named)


def test_the_interpreter_of_triton_3_6_needs_an_older_numpy():
    reason = "Triton 3.6's interpreter needs numpy < 2.4"
    for triton, numpy, expected in (("3.6.0", "2.4.0", reason), ("3.6.0", "2.3.5", None), ("3.7.1", "2.4.6", None)):
        assert why_not(triton, numpy) == expected
    assert why_not("", "2.4.0") == "the package triton is not installed"


@needs_triton
def test_every_tile_of_columns_has_one_program():
    from simplclip.kernels.launch import splits

    for row_blocks in (1, 2, 7, 64, 257):
        for tiles in (1, 2, 3, 41, 256):
            for slots in (1, 82, 264):
                ranges, per_split = splits(row_blocks, tiles, slots)
                assert (ranges - 1) * per_split < tiles <= ranges * per_split
    assert splits(1, 256, 82)[0] > 60  # few rows alone would leave most multiprocessors without work


@pytest.mark.slow
@needs_triton
def test_importing_kernels_compiles_nothing():
    code = "import simplclip.kernels.similarity.op, torch; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
