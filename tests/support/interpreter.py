"""Cases of Triton kernels under Triton's interpreter: in a process of their own, since TRITON_INTERPRET counts when it loads.

A file of cases ends with `main(...)` and is started once by `results`, which reads a line per case.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable

import pytest
import torch
from paths import PYTHONPATH, ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


def why_not(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter cannot run with these versions, "" for a package that is not there."""
    if not (triton and numpy):
        return f"the package {'numpy' if triton else 'triton'} is not installed"
    first = [tuple(map(int, version.split(".")[:2])) for version in (triton, numpy)]
    return "Triton 3.6's interpreter needs numpy < 2.4" if first[0] <= (3, 6) and first[1] >= (2, 4) else None


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


WHY_NOT = why_not(_version("triton"), _version("numpy"))
needs_interpreter = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def run(*command: str) -> subprocess.CompletedProcess:
    """Python with these arguments, under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": PYTHONPATH}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)


class Results:
    """What each case of a script (a file below tests/) came to; one process for all of them."""

    def __init__(self, script: str, names: Iterable[str]) -> None:
        done = run(str(ROOT / "tests" / script), *names)
        self.found = dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
        self.errors = done.stderr[-4000:]

    def check(self, name: str) -> None:
        assert self.found.get(name, "no result") == "ok", self.errors


def make_tests(
    names: Iterable[str], large: Iterable[str], run_named: Callable[[str, str], None]
) -> tuple[Callable, Callable]:
    """A test of each case under the interpreter, every second one for `make prove` only, and one on a GPU."""
    names = list(names)
    half = [name if i % 2 == 0 else pytest.param(name, marks=pytest.mark.prove) for i, name in enumerate(names)]

    @needs_interpreter
    @pytest.mark.parametrize("name", half)
    def test_interpreted(name, interpreted):
        interpreted.check(name)

    @needs_triton
    @pytest.mark.gpu
    @pytest.mark.parametrize("name", [*names, *large])
    def test_on_gpu(name):
        run_named(name, "cuda")

    return test_interpreted, test_on_gpu


def poisoned(case: Callable[[str], None], device: str) -> None:
    """A case, with NaN in all memory that is allocated."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        case(device)
    finally:
        torch.use_deterministic_algorithms(False)


def main(names: Iterable[str], run_named: Callable[[str, str], None]) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1"
    for name in sys.argv[1:] or names:
        try:
            run_named(name, "cpu")
            print(f"{name}\tok", flush=True)
        except Exception as error:
            traceback.print_exc()
            lines = (str(error) or repr(error)).splitlines()
            print(f"{name}\t{type(error).__name__}: {lines[0]}", flush=True)
