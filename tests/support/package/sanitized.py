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
    compiler = os.environ.get("CXX", "c++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def build(kind: str) -> Path:
    """Builds the kernels with the sanitizers of a kind. Returns the folder of the package."""
    out = ROOT / "build" / f"sanitize-{kind}"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    environment = {**os.environ, "PATH": path, "SIMPLCLIP_SANITIZE": kind, "SIMPLCLIP_CUDA": "0"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        out,
        "--build-temp",
        out / "objects",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nbuilding with sanitizers failed")
    package = out / "simplclip"
    for path in [*(ROOT / "simplclip").iterdir(), ROOT / "kernels"]:
        link = package / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not os.path.lexists(link):
            link.symlink_to(path)
    return out


def random_calls(
    out: Path, env: dict[str, str], cases: int, first_case: int, **options
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={out} . tests", TEST]
    command += ["--cases", str(cases), "--first-case", str(first_case)]
    return subprocess.run(command, env=env, cwd=ROOT, text=True, **options)


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
    threads = {
        "OMP_NUM_THREADS": "1" if options.threads else os.environ.get("OMP_NUM_THREADS", "1")
    }
    for isa in options.isa or ISAS:
        env = {**os.environ, **OPTIONS, **threads, "LD_PRELOAD": preload, "SIMPLCLIP_CPU_ISA": isa}
        code = (
            "from simplclip.ops import backends as b; print(b.extension.__file__, "
            "b.extension.cpu_isa())"
        )
        loaded = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=out
        )
        if "SIMPLCLIP_CPU_ISA: expected one of" in loaded.stderr:
            print(f"{isa}: not on this CPU", flush=True)
            continue
        if loaded.stdout.split() != [str(next((out / "simplclip").glob("_C.*so"))), isa]:
            raise SystemExit(
                f"{isa}: the sanitized kernels do not load: {loaded.stdout}\n{loaded.stderr}"
            )
        if options.threads:
            planted = random_calls(
                out, env | {"SIMPLCLIP_PLANT_RACE": "1"}, 20, 0, capture_output=True
            )
            if not planted.returncode or "data race" not in planted.stderr:
                raise SystemExit(
                    f"{isa}: the planted race is not reported: {planted.stdout}\n{planted.stderr}"
                )
        print(f"{isa}: {options.cases} random calls", flush=True)
        if random_calls(out, env, options.cases, options.first_case).returncode:
            print(f"{isa}: failed", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
