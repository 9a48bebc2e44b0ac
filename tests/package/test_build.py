"""The choices of the build, and the symbols that built modules need from torch."""

import contextlib
import io
import os
import re
import runpy
import shutil
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension

from simplclip.ops import backends
from support.package import extension_symbols
from support.paths import ROOT


@pytest.fixture
def setup(monkeypatch):
    """Returns a function that runs setup.py, without building: its output and its names."""
    monkeypatch.chdir(ROOT)

    def run(**environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("CUDA") and "ARCH" not in k}
        output, home = io.StringIO(), environment.get("CUDA_HOME", cpp_extension.CUDA_HOME)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.dict(os.environ, kept | environment, clear=True))
            stack.enter_context(mock.patch("setuptools.setup"))
            stack.enter_context(mock.patch.object(cpp_extension, "CUDA_HOME", home))
            stack.enter_context(contextlib.redirect_stdout(output))
            names = runpy.run_path("setup.py")
        return output.getvalue(), names

    return run


@pytest.fixture
def without_nvcc(tmp_path):
    """Returns an environment in which no CUDA toolkit can be found."""
    return {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "no-cuda")}


def test_a_build_without_a_toolkit_names_the_reason(setup, without_nvcc):
    reason = "is a build without CUDA" if torch.version.cuda is None else "does not run"
    message = f"SIMPLCLIP_CUDA=1, but the CUDA objects cannot be built: .* {reason}"
    with pytest.raises(SystemExit, match=message):
        setup(**without_nvcc, SIMPLCLIP_CUDA="1")
    assert re.search(reason, setup(**without_nvcc, SIMPLCLIP_CUDA="auto")[1]["NO_CUDA"])
    assert setup(SIMPLCLIP_CUDA="0")[1]["NO_CUDA"] == "SIMPLCLIP_CUDA=0 left them out: unset it"
    with pytest.raises(SystemExit, match="SIMPLCLIP_CUDA: expected 0, 1 or auto, got 'yes'"):
        setup(SIMPLCLIP_CUDA="yes")


@pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("nvcc") is None,
    reason="no CUDA toolkit, or torch without CUDA",
)
def test_a_build_names_its_architectures(setup, monkeypatch):
    ours, of_torch = "SIMPLCLIP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"
    for variable, value, chosen in (
        (ours, "all", f"8.0;8.6;8.9;9.0;12.0+PTX (by {ours})"),
        (of_torch, "8.9 9.0a", f"8.9;9.0 (by {of_torch})"),
        # as NVIDIA's containers of PyTorch set it
        (of_torch, "7.5 8.0 12.0+PTX", f"8.0;12.0+PTX (by {of_torch}, without 7.5: the kernels "),
    ):
        output, _ = setup(**{variable: value})
        assert f"simplclip: building the CUDA kernels for {chosen}" in output
    message = "TORCH_CUDA_ARCH_LIST: expected numbers, .* or all, got 'Ampere'"
    with pytest.raises(SystemExit, match=message):
        setup(TORCH_CUDA_ARCH_LIST="Ampere")
    old = {"SIMPLCLIP_CUDA_ARCHS": "7.0;7.5+PTX"}
    reason = (
        "no architecture to build for.*by SIMPLCLIP_CUDA_ARCHS, without 7.0, 7.5.PTX: the kernels"
    )
    _, names = setup(**old)
    assert len(names["EXTENSIONS"]) == 1
    assert re.match(reason, names["NO_CUDA"])
    with pytest.raises(SystemExit, match=reason):
        setup(**old, SIMPLCLIP_CUDA="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = (
        "simplclip: building the CUDA kernels for 8.6+PTX (an RTX 3090, since this machine has no "
        "GPU)"
    )
    assert message in setup()[0]


def test_a_build_takes_the_architectures_of_this_machines_gpus(setup, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((8, 6), (9, 0))[i])
    architectures = setup(SIMPLCLIP_CUDA="0")[1]["architectures"]
    for name in ("SIMPLCLIP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    assert architectures() == ("8.6;9.0", "the GPUs of this machine")


def test_a_build_takes_nvcc_of_pypi_before_that_of_the_path(setup, monkeypatch, tmp_path):
    """nvidia-cuda-nvcc lies beside torch.

    It has no libcudart.so, which the linker asks for, but libcudart.so.13.
    """
    toolkit = tmp_path / "nvidia" / "cu13"
    for file in ("bin/nvcc", "lib/libcudart.so.13"):
        (toolkit / file).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / file).write_text("")
    names = setup(SIMPLCLIP_CUDA="0")[1]
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit))
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "nvcc"
    old.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}' >&2\n")
    old.chmod(0o755)
    with mock.patch.dict(os.environ, {"PATH": f"{tmp_path}:/bin"}):
        os.environ.pop("CUDA_HOME", None)
        names["find_toolkit"]()
        assert os.environ["CUDA_HOME"] == str(toolkit)
    for _ in range(2):
        (folder,) = names["runtime_folders"]()
        linked = os.path.realpath(f"{folder}/libcudart.so")
        assert linked == str(toolkit / "lib" / "libcudart.so.13")
    (toolkit / "lib" / "libcudart.so").write_text("a toolkit of the system")
    assert names["runtime_folders"]() == []


@pytest.mark.parametrize("module", ["extension", "cuda_extension"])
def test_only_the_stable_abi_is_asked_for(module):
    """No C++ symbol of libtorch is needed, since these symbols change between releases."""
    loaded = getattr(backends, module)
    if loaded is None:
        pytest.skip(getattr(backends, f"{module}_error"))
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    assert extension_symbols.unstable(loaded.__file__) == []
    assert loaded.__file__.endswith(".abi3.so")
