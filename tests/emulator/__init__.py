"""Builds kernels for the emulator of emulator.h and loads them.

    kernels = emulator.build("wrappers")
    kernels.ldmatrix(memory, offsets, transposed, out, seed)  # a C++ function of tests/emulator/wrappers*.cpp

A module is built once per content in the user's cache, from copies of the sources, so that a test can also build a kernel
with some of its text replaced and show that tests notice the change.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path
from types import ModuleType

from paths import PYTHONPATH

HERE = Path(__file__).resolve().parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simplclip" / "emulator"
CXX = os.environ.get("CXX", "g++")
# Hidden symbols, since two modules in one process must not share variables.
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
COMMON += ["-Wno-psabi"]
FAST = ["-O2", "-march=native"]
# No use-after-return checks: their stacks belong to a thread, but each fiber would need one.
SANITIZE = ["-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE += ["--param=asan-use-after-return=0"]
# Output is moved into place when complete, since another process may build the same module.
NINJA = """
rule compile
  command = $cxx $flags -c $in -o $out.$$$$ && mv $out.$$$$ $out
rule link
  command = $cxx $flags -shared $in -o $out.$$$$ && mv $out.$$$$ $out
"""
DAYS_KEPT = 7


def why_not() -> str | None:
    """Returns why nothing can be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"fibers are written for x86-64, and this is {platform.machine()}"
    for package in ("pybind11", "ninja"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed (pip install -e '.[dev]')"
    if shutil.which(CXX) is None:
        return f"the compiler {CXX} was not found (set CXX)"
    return None


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def sources(name: str, replace: dict[str, str]) -> dict[str, str]:
    """Returns the sources of a module: path -> text. Each key of `replace` must occur in them exactly once."""
    kinds = {CUDA: ("**/*.cu*", "**/*.h"), HERE: ("*.cuh", "*.h", f"{name}*.cpp"), HERE / "host": ("*.cuh",)}
    paths = {str(path.relative_to(top)): path for top, globs in kinds.items() for kind in globs for path in top.glob(kind)}
    texts = {file: path.read_text() for file, path in sorted(paths.items())}
    for old, new in replace.items():
        files = [file for file, text in texts.items() for _ in range(text.count(old))]
        if len(files) != 1:
            raise ValueError(f"expected {old!r} once in the sources of {name}, found it in {files}")
        texts[files[0]] = texts[files[0]].replace(old, new)
    return texts


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def library(name: str, sanitize: bool = False, replace: dict[str, str] | None = None) -> Path:
    """Returns the module's file, which is built if it does not exist."""
    import ninja
    import pybind11

    flags = COMMON + (SANITIZE if sanitize else FAST)
    # The binding runs no kernel: one object without instrumentation serves all modules.
    binding_flags = [*COMMON, "-O1", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    compiler = run(CXX, "--version") + run(CXX, "-march=native", "-Q", "--help=target")
    binding = {file: (HERE / file).read_text() for file in ("binding.h", "binding.cpp")}
    binding_object = CACHE / f"binding-{digest(compiler, pybind11.__version__, binding_flags, binding)}.o"
    texts = sources(name, replace or {})
    folder = CACHE / f"{name}-{digest(compiler, flags, texts, binding_object.name)}"
    built = folder / "emulated.so"
    if built.exists():
        return built

    folder.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob("*-*"):
        if time.time() - old.stat().st_mtime > DAYS_KEPT * 86400:
            old.unlink() if old.is_file() else shutil.rmtree(old, ignore_errors=True)
    for file, text in (texts | binding).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    units = [file for file in texts if file.endswith(".cpp")]
    rules = [f"cxx = {CXX}", f"flags = {' '.join(flags)}", NINJA]
    rules += [f"build {Path(unit).stem}.o: compile {unit}" for unit in units]
    if not binding_object.exists():
        rules += [f"build {binding_object}: compile binding.cpp\n  flags = {' '.join(binding_flags)}"]
    rules += [f"build emulated.so: link {' '.join(Path(unit).stem + '.o' for unit in units)} {binding_object}"]
    (folder / "build.ninja").write_text("\n".join(rules) + "\n")
    run(Path(ninja.BIN_DIR) / "ninja", "-j", os.environ.get("MAX_JOBS", os.cpu_count() or 1), "-C", folder)
    return built


def build(name: str, sanitize: bool = False, replace: dict[str, str] | None = None) -> ModuleType:
    """Returns the module of tests/emulator/<name>*.cpp. replace: old text -> new text in its sources. sanitize: only in a
    process that `sanitized` started."""
    path = library(name, sanitize, replace)
    unique = f"{path.parent.name}.emulated"  # pybind11 returns an existing module of the same name
    loader = importlib.machinery.ExtensionFileLoader(unique, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(unique, loader))
    loader.exec_module(module)
    return module


def sanitized(code: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs Python code in a process with AddressSanitizer, in which build(..., sanitize=True) can be loaded. An access out of
    bounds ends it with a report on stderr."""
    runtimes = [run(CXX, f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    environment = os.environ | {
        # libstdc++ as well: at the start of the process libasan looks up its function that throws.
        "LD_PRELOAD": ":".join(map(os.path.realpath, runtimes)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": PYTHONPATH,
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=timeout
    )
