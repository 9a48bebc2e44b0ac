"""The CPU kernels of every instruction set. A process chooses its set once, so that each set has a test run of its own."""

import os
import subprocess
import sys

import pytest
from devices import needs_cpu_kernels
from paths import ROOT

from simplclip.ops import backends

MISSING = "SIMPLCLIP_CPU_ISA: expected one of"


def run(isa):
    """Runs the tests that are marked instruction_set again."""
    options = ["-q", "-m", "instruction_set", "-k", "not reference", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "--cases", "150", "tests/ops"]
    environment = os.environ | {"SIMPLCLIP_CPU_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "baseline"])
def test_kernels(isa):
    if isa == backends.extension.cpu_isa():
        pytest.skip("this run takes it already")
    done = run(isa)
    if MISSING in done.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.instruction_set
@needs_cpu_kernels
def test_the_set_is_the_one_that_was_asked_for():
    assert os.environ.get("SIMPLCLIP_CPU_ISA") in (None, "", backends.extension.cpu_isa())
