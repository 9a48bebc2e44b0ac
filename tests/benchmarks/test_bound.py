"""benchmarks.bound: a kernel of known size, and the command line."""

import json
import os
import subprocess
import sys

import pytest
from interpreter import needs_triton
from paths import PYTHONPATH, ROOT

from benchmarks.bound import ptx, sass

pytestmark = pytest.mark.slow
M, N, K, TILE, WARPS = 96, 160, 64, 32, 4  # of tests/support/bound_product.py


def run(*command):
    """Runs Python in a process of its own, since this process may have loaded Triton as an interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], env=environment | {"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def test_pipes():
    codes = {"MUFU.EX2": "mufu", "I2F": "mufu", "FFMA": "fma", "IMAD.MOV": "fma", "LDSM.4": "lsu", "HMMA.16816.F32": "tensor"}
    assert {code: sass.pipe(code) for code in codes} == codes
    assert sass.pipe(sass.of_ptx(ptx.Instruction("ex2.approx.ftz.f32", []))) == "mufu"


@needs_triton
def test_a_product_of_known_size():
    """The program: a kernel out = a b + bias; zeros; sum += out bᵀ in float32; a copy from the host."""
    for found in json.loads(run("tests/support/bound_product.py")[-1]):
        assert found["multiply_adds"] == M * N * K
        assert found["tensor"] > 0
        programs = (M // TILE) * (N // TILE)
        *of_products, of_rows = found["asked"]
        assert of_products == 2 * [programs * TILE * K * 2]
        assert programs * 4 * TILE <= of_rows <= programs * 4 * TILE * WARPS
        assert found["stored"] == 2 * M * N
        sums = 3 * 4 * M * K  # zeros are written, then read and written
        assert found["bytes"] == 2 * M * N + 4 * M + sums + (2 + 4) * (M * N + K * N)
        assert found["operand_bytes"] == 2 * (M * K + K * N) + 4 * (M * N + K * N)
        assert found["block_bytes"] == 0
        assert (found["own_kernels"], found["torch_kernels"], found["launches"]) == (1, 4, 5)
        assert found["host_copies"] == 1
        assert found["exact"]


@needs_triton
def test_the_command_line():
    n, width = 4096, 512
    *shown, last = run(
        "-m", "benchmarks.bound", "--call", "sigmoid", "--n", str(n), "--width", str(width), "--card", "rtx-4090"
    )
    found = json.loads(last)
    assert (found["call"], found["shape"], found["dtype"]) == ("sigmoid", f"N={n} D={width}", "bfloat16")
    assert abs(found["tflop"] - 3 * 2e-12 * n * n * width) <= 1e-4
    assert found["predicted_ms"] >= 3 * 2e-9 * n * n * width / 165.2
    assert found["block_bytes"] == 2 * n * n
    assert found["all_bytes"] == found["bytes"] + found["operand_bytes"] + found["block_bytes"]
    assert found["launches"] == found["own_kernels"] + found["torch_kernels"] > 3
    assert "host_copies" in found
    assert "predicted, never measured" in shown[0]
    assert any("similarity_sigmoid" in line for line in shown)
