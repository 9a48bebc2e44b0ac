"""Builds the CPU kernels with sanitizers and runs the random calls on them.

    python tests/support/package/sanitized.py --cases 2000 [--isa avx2] [--first-case 0]
        AddressSanitizer and UBSan
    python tests/support/package/sanitized.py --threads --cases 2000
        ThreadSanitizer: races of threads

In build/sanitize-*, beside links to the package's other files, so that the normal build stays. Once
for each instruction set that this CPU has; the first error ends the run with 1. With --threads,
four threads run each parallel loop (real_threads.h), and a race that is planted must be reported
first.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
TEST = "tests/ops/test_properties.py::test_random_calls"
LOADED = """
from simplclip.ops import backends
print(backends.extension.__file__, backends.extension.cpu_isa())
"""
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # With checks for use of the stack after return, GCC 12 aligns AVX-512 objects of a function to
    # 32 bytes only.
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # Python and torch are not instrumented: what they copy and lock says nothing about the kernels.
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


def runtime(name: str) -> str:
    """Returns the path of a sanitizer's library, which must be loaded before Python's own."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def build(kind: str) -> Path:
    """Builds the kernels with the sanitizers of a kind. Returns the folder of the package."""
    out = ROOT / "build" / f"sanitize-{kind}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    environment = {**os.environ, "PATH": path, "SIMPLCLIP_SANITIZE": kind, "SIMPLCLIP_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", out, "--build-temp", out / "objects"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{run.stdout}\n{run.stderr}\nbuilding with sanitizers failed")
    package = out / "simplclip"
    for path in [*(ROOT / "simplclip").iterdir(), ROOT / "kernels"]:
        link = package / path.name
        built = path.suffix == ".so" or path.name == "__pycache__"
        if not built and not os.path.lexists(link):
            link.symlink_to(path)
    return out


def random_calls(
    out: Path, env: dict[str, str], cases: int, first_case: int = 0, *, quiet: bool = False
) -> subprocess.CompletedProcess:
    """Runs random calls with the kernels in `out`. quiet: return the output, print nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={out} . tests", TEST]
    command += ["--cases", str(cases), "--first-case", str(first_case)]
    return subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=quiet)


def loads(out: Path, env: dict[str, str], isa: str) -> bool:
    """Whether this CPU has the instruction set. Exits if other kernels than those in `out` load."""
    command = [sys.executable, "-c", LOADED]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=out)
    if "SIMPLCLIP_CPU_ISA: expected one of" in run.stderr:
        return False
    (extension,) = (out / "simplclip").glob("_C.*so")
    if run.stdout.split() != [str(extension), isa]:
        raise SystemExit(f"{isa}: the sanitized kernels do not load: {run.stdout}\n{run.stderr}")
    return True


def check_planted_race(out: Path, env: dict[str, str], isa: str) -> None:
    run = random_calls(out, env | {"SIMPLCLIP_PLANT_RACE": "1"}, 20, quiet=True)
    if run.returncode == 0 or "data race" not in run.stderr:
        raise SystemExit(f"{isa}: the planted race is not reported: {run.stdout}\n{run.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", action="store_true", help="look for races instead")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-case", type=int, default=0)
    parser.add_argument(
        "--isa", action="append", choices=ISAS, help="default: all that this CPU has"
    )
    options = parser.parse_args()
    kind = "thread" if options.threads else "address"
    out = build(kind)
    preload = " ".join(map(runtime, LIBRARIES[kind]))
    variables = {**os.environ, **OPTIONS, "LD_PRELOAD": preload}
    if options.threads or "OMP_NUM_THREADS" not in variables:
        variables["OMP_NUM_THREADS"] = "1"
    for isa in options.isa or ISAS:
        env = variables | {"SIMPLCLIP_CPU_ISA": isa}
        if not loads(out, env, isa):
            print(f"{isa}: not on this CPU", flush=True)
            continue
        if options.threads:
            check_planted_race(out, env, isa)
        print(f"{isa}: {options.cases} random calls", flush=True)
        if random_calls(out, env, options.cases, options.first_case).returncode:
            print(f"{isa}: failed", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
