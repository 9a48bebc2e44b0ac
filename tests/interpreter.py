"""Cases of Triton kernels under Triton's interpreter: in a process of their own, since TRITON_INTERPRET counts when it loads.

A file of cases ends with `main(...)` and is started once by `results`, which reads a line per case.
"""

import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
NO_GPU = None if torch.cuda.is_available() else "no CUDA device"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


def results(script: str) -> tuple[dict[str, str], str]:
    """What each case of the script came to, and what the process wrote to stderr."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, TESTS / script], env=environment, capture_output=True, text=True, cwd=TESTS)
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line), done.stderr


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
