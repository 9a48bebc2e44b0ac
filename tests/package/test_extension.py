"""Extensions that do not belong to the sources are refused; an editable installation is found from
every folder.
"""

import re
import shutil
import subprocess
import sys
import venv
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

# A module without kernels, which compiles in a second.
MODULE = """
#include <Python.h>
#include "sources.h"
static PyObject* yes(PyObject*, PyObject*) { return PyBool_FromLong(1); }
static PyObject* reason(PyObject*, PyObject*) { return PyUnicode_FromString(SIMPLCLIP_NO_CUDA); }
static PyMethodDef methods[] = {
    {"has_native_bf16", yes, METH_NOARGS, ""}, {"why_no_cuda", reason, METH_NOARGS, ""},
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", SIMPLCLIP_SOURCES, -1, methods};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


def copy_of_tree(folder: Path, *, built: bool) -> Path:
    """Copies what an installation needs; built: with the extensions."""
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", *([] if built else ["*.so"]))
    for name in ("simplclip", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy2(ROOT / name, folder)
    return folder


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def environment() -> dict[str, str]:
    # of ninja and the compiler
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "SIMPLCLIP_CUDA": "0", "OMP_NUM_THREADS": "1"}


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
    tree = copy_of_tree(tmp_path / "tree", built=True)
    with (tree / changed).open("a") as file:
        file.write("\n")
    done = run(sys.executable, "-c", REPORT, cwd=tree)
    assert done.stdout.splitlines()[:3] == ["reference", "False", OTHER_SOURCES]
    assert done.stderr.count(f"RuntimeWarning: {OTHER_SOURCES}\n") == 1
    assert re.search(f"^CPU kernels +{re.escape(OTHER_SOURCES)}$", done.stdout, re.MULTILINE)


@pytest.fixture
def python(tmp_path):
    """Returns the Python of a new environment that has the packages of this one, but not
    simplclip.
    """
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(
        "\n".join(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))
    )
    return tmp_path / "venv" / "bin" / "python"


PLACES = """
import simplclip
from simplclip import kernels
from simplclip.ops import backends
simplclip.backend
binary = backends.extension and backends.extension.__file__
print(simplclip.__file__, *kernels.__path__, binary, backends.extension_error, sep="\\n")
"""


@pytest.mark.prove
def test_an_editable_installation(python, tmp_path):
    """A checkout in a folder named simplclip, installed by the command of docs/install.md; a script
    lies beside it.
    """
    checkout = copy_of_tree(tmp_path / "simplclip", built=False)
    shutil.rmtree(checkout / "csrc" / "cpu")
    (checkout / "csrc" / "module.cpp").write_text(MODULE)
    other = shutil.copytree(checkout, tmp_path / "other", symlinks=True)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*install, "--no-deps", "--no-build-isolation", "-e", ".", cwd=checkout)
    script = tmp_path / "script.py"
    script.write_text(PLACES)

    def places(command, cwd: Path) -> list[str]:
        return run(python, *command, cwd=cwd).stdout.splitlines()

    def of(tree: Path, binary: Path | None, error: str) -> list[str]:
        package = tree / "simplclip"
        return [str(package / "__init__.py"), str(package / "kernels"), str(binary), error]

    binary = checkout / "simplclip" / "_C.abi3.so"
    assert places([script], tmp_path) == of(checkout, binary, "None")
    # Another checkout takes its own files, of which the extension was not built.
    assert places(["-c", PLACES], other) == of(other, None, "simplclip._C was not built")


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
