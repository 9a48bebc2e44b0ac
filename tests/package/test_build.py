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


@pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("nvcc") is None, reason="no CUDA toolkit, or torch without CUDA"
)
@pytest.mark.parametrize(
    ("environment", "chosen"),
    [
        ({"SIMPLCLIP_CUDA_ARCHS": "all"}, "for 8.0;8.6;8.9;9.0;12.0+PTX (by SIMPLCLIP_CUDA_ARCHS)"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0"}, "for 9.0 (by TORCH_CUDA_ARCH_LIST)"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "for 8.6+PTX (an RTX 3090, since this machine has no GPU)"),
    ],
)
def test_the_architectures_are_named(environment, chosen):
    clean = {"SIMPLCLIP_CUDA_ARCHS": "", "TORCH_CUDA_ARCH_LIST": ""}
    done = setup({**clean, **environment})
    assert done.returncode == 0, done.stderr
    assert f"simplclip: building the CUDA kernels {chosen}" in done.stdout


def test_the_architecture_of_a_gpu_is_taken(tmp_path):
    """With torch telling of two GPUs."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 2\n"
        "torch.cuda.get_device_capability = lambda i: ((8, 6), (9, 0))[i]\n"
    )
    code = "import setup; print(setup.architectures())"
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SIMPLCLIP_CUDA": "0"}
    clean = {key: value for key, value in os.environ.items() if "ARCH" not in key}
    command = [sys.executable, "-c", "import sys; sys.argv[1:] = ['--name']; " + code]
    done = subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True)
    assert "('8.6;9.0', 'the GPUs of this machine')" in done.stdout, done.stderr


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
