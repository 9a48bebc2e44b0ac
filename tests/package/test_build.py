"""The build's choices and what the built modules ask of torch."""

import os
import shutil
import subprocess
import sys

import extension_symbols
import pytest
import torch
from paths import ROOT

from simplclip.ops import backends


def setup(environment):
    """`setup.py --name` evaluates the extensions and builds nothing."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")} | environment
    return subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, env=env, capture_output=True, text=True)


def without_nvcc(tmp_path):
    """An environment in which no CUDA toolkit can be found."""
    return {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "no-cuda")}


def test_cuda_forced_without_a_toolkit_fails_with_the_reason(tmp_path):
    done = setup({**without_nvcc(tmp_path), "SIMPLCLIP_CUDA": "1"})
    assert done.returncode != 0
    assert "SIMPLCLIP_CUDA=1, but the CUDA objects cannot be built: " in done.stderr
    reason = "is a build without CUDA" if torch.version.cuda is None else "does not run"
    assert reason in done.stderr


def test_cuda_auto_without_a_toolkit_says_why(tmp_path):
    done = setup({**without_nvcc(tmp_path), "SIMPLCLIP_CUDA": "auto"})
    assert done.returncode == 0, done.stderr
    assert "simplclip: building without CUDA: " in done.stdout


def test_an_unknown_choice_is_an_error():
    done = setup({"SIMPLCLIP_CUDA": "yes"})
    assert "SIMPLCLIP_CUDA: expected 0, 1 or auto, got 'yes'" in done.stderr


@pytest.mark.parametrize("module", ["extension", "cuda_extension"])
def test_only_the_stable_abi_is_asked_for(module):
    """No C++ symbol of libtorch: those change from release to release."""
    loaded = getattr(backends, module)
    if loaded is None:
        pytest.skip(getattr(backends, f"{module}_error"))
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    assert extension_symbols.unstable(loaded.__file__) == []
    assert loaded.__file__.endswith(".abi3.so")
