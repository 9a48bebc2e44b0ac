"""The CPU kernels of every instruction set.

A process chooses its set once, so that each set has a test run of its own.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from simplclip.ops import backends
from support.devices import needs_cpu_kernels
from support.paths import ROOT

pytestmark = pytest.mark.long


# Flags of /proc/cpuinfo that a set needs, see csrc/cpu/instruction_set.h; the best set comes first.
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}
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


def preprocessed(name, headers):
    command = ["g++", "-E", "-P", "-std=c++20", f"-I{headers}", f"csrc/cpu/{name}.cpp"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, which preprocesses the sources")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the sets are those of x86-64")
def test_the_cpu_is_asked_for_what_each_set_is_compiled_for(tmp_path):
    """A virtual machine may hide one instruction of a set, which then must not run."""
    headers = runpy.run_path(str(ROOT / "csrc/call_headers.py"))["headers"]
    for name, text in headers(ROOT / "simplclip/calls").items():
        (tmp_path / name).write_text(text)
    asked = {}
    condition = r"if \((.+?)\) found\.push_back\(&(\w+)::kernels\);"
    for tests, isa in re.findall(condition, preprocessed("dispatch", tmp_path), re.DOTALL):
        asked[isa] = set(re.findall(r'__builtin_cpu_supports\s*\("(\w+)"\)', tests))
    compiled = {}
    for isa in FLAGS.keys() - {"baseline"}:
        source = preprocessed(f"isa_{isa}", tmp_path)
        of_immintrin = r"#pragma GCC push_options.*?#pragma GCC pop_options"
        source = re.sub(of_immintrin, "", source, flags=re.DOTALL)
        names = re.findall(r'#pragma GCC target\s*\("(.+)"\)', source)
        compiled[isa] = set(",".join(names).split(","))
    assert asked == compiled
    flags = {isa: {flag.replace("_", "") for flag in FLAGS[isa]} for isa in compiled}
    assert flags == compiled
