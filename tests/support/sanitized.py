"""Builds the CPU kernels with AddressSanitizer and UBSan and runs the random calls on them.

    python tests/support/sanitized.py --cases 2000 [--isa avx2] [--first-case 0]

In build/sanitize, beside links to the package's other files, so that the normal build stays. Once for each instruction set
that this CPU has; the first error ends the run with 1.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from paths import ROOT  # noqa: E402

OUT = ROOT / "build" / "sanitize"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
TEST = "tests/ops/test_properties.py::test_random_calls"
# With checks for use of the stack after return, GCC 12 aligns AVX-512 objects of a function to 32 bytes only.
ASAN = "detect_stack_use_after_return=0:detect_leaks=0"


def runtime(name: str) -> str:
    """Returns the path of a sanitizer's library, which must be loaded before Python's own."""
    compiler = os.environ.get("CXX", "c++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()


def build() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    environment = {**os.environ, "PATH": path, "SIMPLCLIP_SANITIZE": "1", "SIMPLCLIP_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", OUT, "--build-temp", OUT / "objects"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{done.stderr}\nbuilding with sanitizers failed")
    package = OUT / "simplclip"
    for path in [*(ROOT / "simplclip").iterdir(), ROOT / "kernels"]:
        link = package / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not os.path.lexists(link):
            link.symlink_to(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-case", type=int, default=0)
    parser.add_argument("--isa", action="append", choices=ISAS, help="default: all that this CPU has")
    options = parser.parse_args()
    build()
    environment = {
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so"))),
        "ASAN_OPTIONS": ASAN,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    for isa in options.isa or ISAS:
        env = {**os.environ, **environment, "SIMPLCLIP_CPU_ISA": isa}
        code = "from simplclip.ops import backends as b; print(b.extension.__file__, b.extension.cpu_isa())"
        loaded = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=OUT)
        if "SIMPLCLIP_CPU_ISA: expected one of" in loaded.stderr:
            print(f"{isa}: not on this CPU", flush=True)
            continue
        if loaded.stdout.split() != [str(next((OUT / "simplclip").glob("_C.*so"))), isa]:
            raise SystemExit(f"{isa}: the sanitized kernels do not load: {loaded.stdout}\n{loaded.stderr}")
        print(f"{isa}: {options.cases} random calls", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-o",
             f"pythonpath={OUT} . tests tests/support tests/ops", TEST,
             "--cases", str(options.cases), "--first-case", str(options.first_case)], env=env, cwd=ROOT,
        )  # fmt: skip
        if done.returncode:
            print(f"{isa}: failed", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
