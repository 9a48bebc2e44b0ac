"""The Makefile: its list of targets fits a screen, and an installation says what the machine lacks
before it starts.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

from support.paths import ROOT

MAKE = shutil.which("make")

pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def make(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "CXX")}
    command = [MAKE, "--no-print-directory", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    """Makes a PATH with a shell, a compiler and this Python."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sh", "grep", "sed", "expand", "nproc", "cat", "cksum"):
        (path / name).symlink_to(shutil.which(name))
    for name, line in (("g++", ""), ("python3", f'exec {sys.executable} "$@"')):
        (path / name).write_text(f"#!/bin/sh\n{line}\n")
        (path / name).chmod(0o755)
    return path


def test_help_fits_a_screen():
    lines = make("help").stdout.splitlines()
    assert len(lines) > 10
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_check_tools_prints_nothing_if_nothing_is_missing(folder):
    run = make("check-tools", PATH=str(folder))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    (folder / "g++").rename(folder / "clang++")
    assert make("check-tools", PATH=str(folder), CXX="clang++ -stdlib=libc++").returncode == 0


def test_an_installation_names_missing_tools_before_it_starts(folder, tmp_path):
    """Without a compiler, and with a Python that has no headers and, as Debian's, no ensurepip."""
    (folder / "g++").unlink()
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError('ensurepip')\n")
    elsewhere = (
        "import sys, sysconfig; sysconfig.get_path = lambda name: '/nowhere'; exec(sys.argv[1])"
    )
    (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{elsewhere}" "$2"\n')
    run = make("install", f"VENV={tmp_path}/venv", PATH=str(folder), PYTHONPATH=str(tmp_path))
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if line.startswith("missing: ")]
    packages = [re.search("apt install (\\S+) ", line)[1] for line in lines]
    assert packages == ["python3-venv", "python3-dev", "g++"]
    compiler = (
        "missing: a C++ compiler, called g++; apt install g++ (Debian, Ubuntu) or dnf install"
    )
    assert lines[2] == f"{compiler} gcc-c++ (Fedora)"
    assert not (tmp_path / "venv").exists()
