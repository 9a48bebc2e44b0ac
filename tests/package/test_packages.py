"""The packages of `make dist` and `make wheel`: complete, and one wheel for all supported versions of torch and Python.

The packages are built once, without CUDA, by the users' command. The wheel is built from the source distribution, so that a
missing file fails here. SIMPLCLIP_OTHER_PYTHON=path[:path] names Pythons with another torch to try the wheel in.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import extension_symbols
import pytest
import torch
from paths import ROOT

BIN = Path(sys.executable).parent
HERE = f"torch {torch.__version__}, Python {platform.python_version()}"
OTHERS = [os.path.abspath(p) for p in os.environ.get("SIMPLCLIP_OTHER_PYTHON", "").split(os.pathsep) if p]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "SIMPLCLIP_BACKEND")}

pytestmark = pytest.mark.slow

# Runs two ops, forward and backward, on the compiled CPU kernels and by definition; prints the files of both.
OPS = """
import platform
import torch
import simplclip
from simplclip import ops
from simplclip.ops import backends

def results(backend):
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(67, 48), dim=1).requires_grad_() for _ in range(2))
    q, k, v = (torch.randn(2, 13, 3, 16, requires_grad=True) for _ in range(3))
    gains = [torch.rand(3, requires_grad=True) for _ in range(3)]
    with simplclip.backend(backend):
        losses = ops.similarity_loss(image, text, 20.0, plane=(1.5, 0.5), terms=("contrastive", "pair_matching"))
        out = ops.shaped_attention(q, k, v, *gains, causal=True)
    total = sum(losses.values()) + out.square().sum()
    return [total.detach(), out.detach(), *torch.autograd.grad(total, [image, text, q, k, v, *gains])]

got, expected = results("cpu"), results("reference")
assert all(float(t.abs().max()) > 0 for t in expected)
torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
versions = f"torch {torch.__version__}, Python {platform.python_version()}"
print(versions, simplclip.__file__, backends.extension.__file__, sep="\\n")
"""


def require(*distributions: str) -> None:
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: pip install 'simplclip[dev]' brings it")


def run(command, cwd: Path = ROOT, **environment) -> str:
    command = [str(word) for word in command]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command[:6])}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def make(target: str, folder: Path, *done: str) -> None:
    """Makes a target of the Makefile with this Python, as if the targets in `done` were made already."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    old = [word for name in ("install", *done) for word in ("-o", name)]
    run(["make", *old, target, f"BIN={BIN}", f"DIST={folder}"], SIMPLCLIP_CUDA="0")


def the_file(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    require("build")
    folder = tmp_path_factory.mktemp("dist")
    make("dist", folder)
    return the_file(folder, "*.whl")


def run_ops(python, folder: Path) -> str:
    """Runs the ops of the installation in `folder`; returns the versions under which they ran."""
    versions, *files = run([python, "-c", OPS], folder, PYTHONPATH=str(folder), OMP_NUM_THREADS="1").split("\n")[:3]
    assert all(Path(file).is_relative_to(folder) for file in files), files
    return versions


def install(python, wheel: Path, folder: Path) -> None:
    """Installs by this Python's pip as `python` would, whose tags decide whether the wheel is accepted."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run([*pip, "--no-index", "--target", folder, wheel])


def test_source_distribution_has_all_that_is_built_and_no_tests(tmp_path):
    require("build")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path])
    with tarfile.open(the_file(tmp_path, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kinds = {"csrc": ("h", "cuh", "cpp", "cu"), "simplclip/kernels": ("py",), "simplclip": ("py", "yaml", "typed")}
    wanted = {
        str(path.relative_to(ROOT))
        for folder, suffixes in kinds.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix[1:] in suffixes
    }
    assert "simplclip/kernels/similarity/op.py" in wanted
    assert len(wanted) > 100
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "requirements.txt"}
    assert wanted - names == set()
    others = ("tests", "benchmarks", "docs", "build")
    assert not [name for name in names if name.startswith(others) or name.endswith((".so", ".pyc"))]


@pytest.mark.prove
def test_wheel_is_typed_and_of_the_limited_api_and_the_stable_abi(wheel, tmp_path):
    assert re.fullmatch(r"simplclip-[\d.]+\w*-cp311-abi3-linux_\w+\.whl", wheel.name)
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    with zipfile.ZipFile(wheel) as archive:
        assert "simplclip/py.typed" in archive.namelist()
        (extension,) = [name for name in archive.namelist() if name.endswith(".so")]
        assert extension == "simplclip/_C.abi3.so"
        assert extension_symbols.unstable(archive.extract(extension, tmp_path)) == []


@pytest.mark.prove
def test_wheel_runs_in_a_clean_environment(wheel, tmp_path):
    """A path file gives the environment the torch of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    python, installed = tmp_path / "venv" / "bin" / "python", tmp_path / "installed"
    install(python, wheel, installed)
    site = the_file(tmp_path / "venv", "lib/python*/site-packages")
    (site / "torch.pth").write_text("\n".join(p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")))
    assert run_ops(python, installed) == HERE


@pytest.mark.prove
@pytest.mark.skipif(
    not OTHERS, reason="SIMPLCLIP_OTHER_PYTHON names no Python that has another version or torch (make oldest does)"
)
@pytest.mark.parametrize("python", OTHERS)
def test_wheel_runs_under_other_versions(wheel, tmp_path, python):
    install(python, wheel, tmp_path)
    versions = run_ops(python, tmp_path)
    print(f"built under {HERE}, runs under {versions}")
    assert versions != HERE


@pytest.mark.prove
def test_wheel_becomes_a_manylinux_wheel(wheel, tmp_path):
    require("auditwheel", "patchelf")
    shutil.copy(wheel, tmp_path)
    make("wheel", tmp_path, "dist")
    repaired = the_file(tmp_path, "*.whl")
    assert re.fullmatch(r"simplclip-[\d.]+\w*-cp311-abi3-manylinux_2_\d+_\w+\.whl", repaired.name)
    with zipfile.ZipFile(repaired) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert libraries == ["simplclip/_C.abi3.so"]
    install(sys.executable, repaired, tmp_path / "installed")
    run_ops(sys.executable, tmp_path / "installed")
