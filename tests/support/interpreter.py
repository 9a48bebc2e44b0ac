"""Triton's interpreter in a process of its own, since Triton reads TRITON_INTERPRET when it is loaded."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest
from paths import PYTHONPATH, ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")


def why_not(triton: str, numpy: str) -> str | None:
    """Returns why Triton's interpreter cannot run with these versions, or None. A version is "" if the package is missing."""
    if not (triton and numpy):
        return f"the package {'numpy' if triton else 'triton'} is not installed"
    first = [tuple(map(int, version.split(".")[:2])) for version in (triton, numpy)]
    return "Triton 3.6's interpreter needs numpy < 2.4" if first[0] <= (3, 6) and first[1] >= (2, 4) else None


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else ""


WHY_NOT = why_not(_version("triton"), _version("numpy"))
needs_interpreter = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def run(*command: str) -> subprocess.CompletedProcess:
    """Runs Python with these arguments under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": PYTHONPATH}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
