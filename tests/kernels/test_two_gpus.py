"""The host's code of CUDA C++ and of the Triton launchers, on the two GPUs of ptx/gpus.py.

A call is on one GPU while the other is the current device, in a stream that is not the default.

With --prove: each of the two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from support.paths import PYTHONPATH, ROOT

pytest.importorskip("triton", reason="the package triton is not installed")

from ptx import gpus
from support.kernels import cuda_attention, on_gpus

pytestmark = [pytest.mark.slow, pytest.mark.long]
WHY_NOT = cuda_attention.why_not() or gpus.why_not()
if WHY_NOT:
    pytest.skip(f"host code of CUDA cannot run here: {WHY_NOT}", allow_module_level=True)


@pytest.fixture(scope="module")
def wrong(request: pytest.FixtureRequest) -> dict[str, str]:
    """Returns what is wrong with each call, "" if nothing is, from one process for all of them."""
    names = [f"{index}/{name}" for index in (1, 0) for name in on_gpus.CASES]
    if not request.config.option.prove:
        names = names[: len(on_gpus.CASES)]
    library = cuda_attention.built("cudart.so", gpus.FLAGS, gpus.SOURCE)
    program = os.path.join(ROOT, on_gpus.__file__)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, **gpus.environment(library)}
    run = subprocess.run(
        [sys.executable, program, *names], env=environment, capture_output=True, text=True
    )
    results = dict(map(json.loads, run.stdout.splitlines()))
    ended = f"the process ended with {run.returncode}:\n{run.stderr[-3000:]}"
    return {name: results.get(name, ended) for name in names}


@pytest.mark.parametrize("index", [1, pytest.param(0, marks=pytest.mark.prove)])
@pytest.mark.parametrize("name", on_gpus.CASES)
def test_calls(name, index, wrong):
    assert not wrong[f"{index}/{name}"], wrong[f"{index}/{name}"]
