"""Extensions that do not belong to the sources are refused."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from simplclip.ops import backends, extension
from support.devices import needs_cpu_kernels
from support.paths import ROOT

pytestmark = pytest.mark.long


OTHER_SOURCES = (
    "simplclip._C was built from other sources: run `pip install --no-build-isolation -e .` (or "
    "make install)"
)

# Prints which kernels run and why, whether the extension's were registered, and doctor's report.
REPORT = """
import sys
import torch
import simplclip
x = torch.eye(4)
simplclip.ops.similarity_loss(x, x, 5.0)["contrastive"]
from simplclip.ops import backends
print(simplclip.report()["ops"]["similarity_loss_fwd"]["cpu"]["backend"])
print("simplclip._C" in sys.modules)
print(backends.extension_error)
from simplclip.commands.main import main
main(["doctor"])
"""


@needs_cpu_kernels
def test_a_digest_is_of_schemas_and_of_csrc(monkeypatch, tmp_path):
    file = Path(backends.extension.__file__)
    assert backends.extension.__doc__ == extension.digest("_C") != extension.digest("_C_cuda")
    assert extension.is_current("_C", file)
    names = {path.name for path in extension.cpp_sources("_C")}
    assert {"module.cpp", "common.h", "dispatch.cpp"} <= names
    assert "plan.h" not in names

    monkeypatch.setattr(extension, "cpp_sources", lambda name: [])  # an installed wheel
    assert extension.is_current("_C", file)
    monkeypatch.setattr(extension, "schemas", lambda: [tmp_path / "call.py"])
    (tmp_path / "call.py").write_text("another")
    assert not extension.is_current("_C", file)
    (tmp_path / "_C.abi3.so").write_text("built without a digest")
    assert not extension.is_current("_C", tmp_path / "_C.abi3.so")


@pytest.mark.slow
@needs_cpu_kernels
@pytest.mark.parametrize(
    "changed", [pytest.param("simplclip/calls/mlp.py", marks=pytest.mark.prove), "csrc/common.h"]
)
def test_an_extension_of_other_sources_is_not_loaded(changed, tmp_path):
    """A line says what to run, and the reference computes."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("simplclip", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    with (tmp_path / changed).open("a") as file:
        file.write("\n")
    command, kept = [sys.executable, "-c", REPORT], {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.stdout.splitlines()[:3] == ["reference", "False", OTHER_SOURCES]
    assert done.stderr.count(f"RuntimeWarning: {OTHER_SOURCES}\n") == 1
    assert re.search(f"^CPU kernels +{re.escape(OTHER_SOURCES)}$", done.stdout, re.MULTILINE)


def test_the_reason_for_missing_cuda_kernels_is_that_of_the_build(monkeypatch):
    cpu = SimpleNamespace(why_no_cuda=lambda: "nvcc was not found")
    monkeypatch.setitem(sys.modules, "simplclip._C", cpu)
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    reason = f"simplclip._C_cuda was not built: nvcc was not found; then {extension.INSTALL}"
    assert extension.load("_C_cuda") == (None, reason)


def test_missing_cuda_kernels_warn_once():
    extension.warn_without_cuda.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            extension.warn_without_cuda("nvcc was not found")
    (line,) = [str(warning.message) for warning in caught]
    assert line == "shaped_attention runs without its CUDA kernels: nvcc was not found"
    extension.warn_without_cuda.cache_clear()
