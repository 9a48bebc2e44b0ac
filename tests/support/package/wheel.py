"""Installs a wheel of simplclip into an empty environment and tries it there, as a user would.

    python tests/support/package/wheel.py dist/simplclip-*.whl [--train] [--cuda] [--python
    python3.12] [--packages-of PYTHON]

With the required packages alone it runs `simplclip doctor` and `simplclip selftest`; --train adds
the extra `train` and one training step on eight pictures. Commands run in a temporary folder, so
that nothing of the checkout is on their path, and find no programs but the environment's: neither
a compiler nor nvcc.
--packages-of: a path file names that Python's packages instead of a download of gigabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Writes eight pictures with captions, and the config of one training step on them.
PICTURES = """
from pathlib import Path
from PIL import Image
colours = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange")
Path("pictures").mkdir()
for colour in colours:
    Image.new("RGB", (64, 64), colour).save(f"pictures/{colour}.png")
    Path(f"pictures/{colour}.txt").write_text(f"a {colour} square")
Path("one.yaml").write_text(
    "model: {name: siclip-tiny}\\n"
    "data: {train: pictures, batch_size: 8, workers: 0}\\n"
    "run: {out: run, steps: 1, device: cpu}\\n"
)
"""
VERSIONS = """
import sys, simplclip, torch
print(simplclip.__file__)
print(torch.__version__, sys.version.split()[0])
"""
PACKAGES = r"""
import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
"""
# beginnings of variables' names
NOT_INHERITED = ("PYTHON", "SIMPLCLIP_", "VIRTUAL_ENV", "CC", "CXX", "CUDA_HOME")


class Environment:
    """A new virtual environment in `folder`, where its programs run."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder = folder
        subprocess.run([python, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.bin = folder / "venv" / "bin"
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
        self.variables = kept | {"PATH": str(self.bin)}

    def run(self, program: str, *arguments: str) -> str:
        """Runs a program of the environment and returns its output; exits if it fails."""
        command = [self.bin / program, *arguments]
        line = f"{program} {' '.join(arguments)}"
        start = time.monotonic()
        run = subprocess.run(
            command, cwd=self.folder, env=self.variables, capture_output=True, text=True
        )
        if run.returncode:
            raise SystemExit(f"{line}\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}\nfailed")
        if program != "python":
            print(f"{line}: {time.monotonic() - start:.0f} s", flush=True)
        return run.stdout

    def install(self, *arguments: str) -> None:
        """Installs by this Python's pip; the environment's tags decide on wheels."""
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet"]
        start = time.monotonic()
        subprocess.run([*pip, *arguments], check=True, cwd=self.folder, env=self.variables)
        print(f"pip install {' '.join(arguments)}: {time.monotonic() - start:.0f} s", flush=True)

    def take_packages(self, python: str) -> None:
        """Adds another Python's packages, but not its editable installations."""
        command = [python, "-c", PACKAGES]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        (self.site / "packages.pth").write_text(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument(
        "--train", action="store_true", help="add the extra train and one training step"
    )
    parser.add_argument("--cuda", action="store_true", help="fail if the wheel has no CUDA kernels")
    parser.add_argument(
        "--python", default=sys.executable, help="the Python of the environment; default: this one"
    )
    parser.add_argument(
        "--packages-of",
        metavar="PYTHON",
        help="take the packages of this Python; installs the wheel alone",
    )
    options = parser.parse_args()
    wheel = options.wheel.resolve(strict=True)
    with tempfile.TemporaryDirectory() as name:
        environment = Environment(Path(name).resolve(), options.python)
        if options.packages_of:
            environment.take_packages(options.packages_of)
            environment.install("--no-deps", "--no-index", str(wheel))
        else:
            environment.install(str(wheel))
        imported, versions = environment.run("python", "-c", VERSIONS).splitlines()
        package = environment.site / "simplclip"
        if Path(imported).parent != package:
            raise SystemExit(f"expected the package of the wheel, got {imported}")
        files = [path for path in package.rglob("*") if path.is_file()]
        installed = sum(path.stat().st_size for path in files) / 1e6
        size = wheel.stat().st_size / 1e6
        print(f"torch, Python: {versions}; wheel {size:.1f} MB, installed {installed:.1f} MB")
        built = json.loads(environment.run("simplclip", "doctor", "--json"))["extension"]
        for kind, needed in (("cpu", True), ("cuda", options.cuda)):
            if needed and not built[kind]["loaded"]:
                raise SystemExit(
                    f"expected the {kind} kernels of the wheel, got: {built[kind].get('reason')}"
                )
        print(environment.run("simplclip", "doctor"))
        print(environment.run("simplclip", "selftest"))
        if options.train:
            if not options.packages_of:
                environment.install(f"{wheel}[train]")
            environment.run("python", "-c", PICTURES)
            print(environment.run("simplclip", "train", "one.yaml"))


if __name__ == "__main__":
    main()
