"""The CPU kernels of every instruction set. A process chooses its set once, so that each set has a test run of its own."""

import os
import shutil
import subprocess
import sys

import pytest
from devices import needs_cpu_kernels
from paths import ROOT, SUPPORT

from simplclip.ops import backends

MISSING = "SIMPLCLIP_CPU_ISA: expected one of"


def run(isa, **environment):
    """Runs the tests that are marked instruction_set again."""
    # pytest's faulthandler would replace the signal handler that computes AMX in software.
    options = ["-q", "-m", "instruction_set", "-k", "not reference", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "no:faulthandler", "--cases", "150", "tests/ops"]
    environment = os.environ | {"SIMPLCLIP_CPU_ISA": isa} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512", "avx2", "baseline"])
def test_kernels(isa, tmp_path):
    """On a CPU with AVX-512 for bfloat16 but without AMX, software computes the instructions of AMX."""
    if isa == backends.extension.cpu_isa():
        pytest.skip("this run takes it already")
    done = run(isa)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if isa == "amx" and MISSING in done.stdout and backends.native_bf16 and compiler:
        software = tmp_path / "amx.so"
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", SUPPORT / "amx.c", "-o", software], check=True)
        done = run(isa, LD_PRELOAD=str(software))
    if MISSING in done.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.instruction_set
@needs_cpu_kernels
def test_the_set_is_the_one_that_was_asked_for():
    assert os.environ.get("SIMPLCLIP_CPU_ISA") in (None, "", backends.extension.cpu_isa())
