"""The CPU kernels of every instruction set.

A process chooses its set once, so that each set has a test run of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simplclip.ops import backends
from support.devices import needs_cpu_kernels
from support.paths import ROOT

pytestmark = pytest.mark.long


# Flags of /proc/cpuinfo that a set needs, as in csrc/cpu/dispatch.cpp; the best set comes first.
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
CPU = set(Path("/proc/cpuinfo").read_text().split())
FLAGS = {
    "avx512_bf16": AVX512 | {"avx512_bf16"},
    "avx512": AVX512,
    "avx2": {"avx2", "fma"},
    "baseline": set(),
}
# the suite itself takes the best set, and a desktop CPU's; make prove takes all
PROVED, QUICK = ("avx512_bf16", "avx512", "baseline"), ("avx2",)


def run(isa, cases):
    """Runs the tests that are marked instruction_set again, with this number of random calls."""
    options = ["-q", "-m", "instruction_set", "-p", "no:cacheprovider", "-p", "no:xdist", "--cases"]
    files = Path(__file__).parent.glob("test_*.py")
    marked = [str(path) for path in files if "instruction_set" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-k", "not reference", *options, str(cases), *marked]
    environment = os.environ | {"SIMPLCLIP_CPU_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize(
    "isa", [*(pytest.param(isa, marks=pytest.mark.prove) for isa in PROVED), *QUICK]
)
def test_ops_on_every_instruction_set(isa, request):
    if isa == backends.extension.cpu_isa():
        pytest.skip("this run takes it already")
    if not FLAGS[isa] <= CPU:
        pytest.skip(f"this CPU has no {isa}")
    done = run(isa, cases=150 if request.config.getoption("--prove") else 60)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.instruction_set
@needs_cpu_kernels
def test_the_instruction_set_is_the_variables_or_the_best_of_this_cpu():
    best = next(isa for isa, flags in FLAGS.items() if flags <= CPU)
    assert backends.extension.cpu_isa() == (os.environ.get("SIMPLCLIP_CPU_ISA") or best)
