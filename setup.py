"""Builds the extensions of simplclip against the LibTorch stable ABI and CPython's limited API.

    simplclip._C       CPU kernels, always
    simplclip._C_cuda  CUDA objects, where nvcc is found and torch was built with CUDA

SIMPLCLIP_CUDA=auto (default) builds CUDA where it can and prints why where it cannot; 0 never does;
1 fails with the reason. SIMPLCLIP_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST chooses the architectures,
e.g. "8.6;9.0"; "all" stands for ARCHITECTURES, as a wheel needs them. Without either, the build is
for this machine's GPUs, or for an RTX 3090 where there is no GPU. MAX_JOBS caps the compilers that
run at once.

Each extension contains a digest of its sources, by which simplclip/ops/extension.py refuses one
that is out of date.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import time
from pathlib import Path

import torch
from setuptools import find_namespace_packages, setup


def find_toolkit() -> None:
    """Sets CUDA_HOME to the folder of PyPI's nvidia-cuda-nvcc, which lies beside torch.

    Without one, to the folder that the path's nvcc reports as TOP, since the folder of a wrapper or
    a link has no libraries.
    """
    nvcc = shutil.which("nvcc")
    packaged = sorted(Path(torch.__file__).parents[1].glob("nvidia/cu*/bin/nvcc"))
    if os.environ.get("CUDA_HOME"):
        return
    if packaged:  # in a version that was chosen for torch's
        os.environ["CUDA_HOME"] = str(packaged[-1].parents[1])
    elif nvcc:
        text = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        top = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
        if top:
            os.environ["CUDA_HOME"] = os.path.realpath(top[1].strip())


find_toolkit()
from torch.utils import cpp_extension  # noqa: E402  (reads CUDA_HOME when imported)

TORCH_TARGET = "0x020a000000000000"  # LibTorch 2.10: the oldest stable ABI that has all we call
# A100, RTX 3090, RTX 4090, H100, RTX 50; PTX of the last for later architectures.
ARCHITECTURES = "8.0;8.6;8.9;9.0;12.0+PTX"
DEFAULT_ARCHITECTURE = "8.6+PTX"
OLDEST = 8  # their tensor cores have instructions for bfloat16

# SIMPLCLIP_SANITIZE=address builds the CPU kernels with AddressSanitizer and UBSan, =thread with
# ThreadSanitizer, which needs real threads; tests/support/package/sanitized.py does, and runs them.
SANITIZERS = {
    "": [],
    "address": [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize=vptr",
        "-fno-sanitize-recover=all",
    ],
    "thread": [
        "-O1",
        "-g1",
        "-fsanitize=thread",
        "-include",
        os.path.abspath("tests/support/package/real_threads.h"),
    ],
}
SANITIZE = SANITIZERS[os.environ.get("SIMPLCLIP_SANITIZE", "")]

MACROS = [("TORCH_TARGET_VERSION", TORCH_TARGET)]
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]


def why_no_cuda() -> str | None:
    """Returns the reason why the CUDA objects cannot be built here; None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if cpp_extension.CUDA_HOME is None:
        packages = f"PyPI's nvidia-{{cuda-nvcc,cuda-crt,nvvm}}=={torch.version.cuda}.*"
        return (
            f"nvcc was not found: install {packages} or the CUDA toolkit {torch.version.cuda}, or "
            "set CUDA_HOME to it"
        )
    nvcc = Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc"
    try:
        text = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} does not run: {error}"
    release = text.split("release ")[1].split(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"nvcc is {release}, torch was built with CUDA {torch.version.cuda}: install a toolkit "
            "of that major version"
        )
    return None


def architectures() -> tuple[str, str]:
    """Returns the architectures of the CUDA objects, and the reason for this choice."""
    for name in ("SIMPLCLIP_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if wanted := os.environ.get(name):
            chosen = ARCHITECTURES if wanted == "all" else ";".join(re.split(r"[;,\s]+", wanted))
            # Numbers alone, since the kernels' architectures are compared with the device at run
            # time.
            if not re.fullmatch(r"(\d+\.\d[af]?(\+PTX)?;?)+", chosen):
                raise SystemExit(
                    f"{name}: expected numbers, as in {ARCHITECTURES}, or all, got {wanted!r}"
                )
            return re.sub("[af]", "", chosen), f"by {name}"  # no kernel needs a variant
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(
            f"{major}.{minor}" for major, minor in sorted(found)
        ), "the GPUs of this machine"
    return DEFAULT_ARCHITECTURE, "an RTX 3090, since this machine has no GPU"


class Build(cpp_extension.BuildExtension):
    """Build command that prints how long it took."""

    def run(self) -> None:
        start = time.monotonic()
        write_headers()
        super().run()
        print(
            f"simplclip: built {' and '.join(e.name for e in self.extensions)} in "
            f"{time.monotonic() - start:.0f} s"
        )
        if NO_CUDA:
            print(f"simplclip: WITHOUT the CUDA kernels: {NO_CUDA}")


def write_headers() -> None:
    """Writes the headers of build/: sources.h, which says what the extensions are built from and
    why there is no CUDA, and the calls of csrc/call_headers.py.
    """
    macros = {"SOURCES": DIGEST("_C"), "SOURCES_CUDA": DIGEST("_C_cuda"), "NO_CUDA": NO_CUDA or ""}
    sources = "".join(
        f"#define SIMPLCLIP_{name} {json.dumps(value)}\n" for name, value in macros.items()
    )
    BUILD.mkdir(exist_ok=True)
    for name, text in {"sources.h": sources, **CALL_HEADERS(Path("simplclip/calls"))}.items():
        header = BUILD / name
        # an unchanged header keeps its time, so that nothing is compiled again
        if not header.exists() or header.read_text() != text:
            header.write_text(text)


def runtime_folders() -> list[str]:
    """Returns where the linker finds CUDA's runtime.

    PyPI's has libcudart.so.13 alone, to which a link is made.
    """
    folder = Path(cpp_extension.CUDA_HOME) / "lib"
    runtimes = sorted(folder.glob("libcudart.so.[0-9]*"))
    if not runtimes or (folder / "libcudart.so").exists():
        return []
    link = BUILD.resolve() / "lib" / "libcudart.so"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(runtimes[-1])
    return [str(link.parent)]


def extensions() -> tuple[list, str | None]:
    """Returns the extensions to build, and the reason why the CUDA objects are not among them; None
    if they are.
    """
    cpu = cpp_extension.CppExtension(
        "simplclip._C",
        ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").rglob("*.cpp")))],
        include_dirs=[str(BUILD.resolve())],
        define_macros=MACROS,
        extra_compile_args={"cxx": [*FLAGS, *SANITIZE]},
        extra_link_args=SANITIZE,
        py_limited_api=True,
    )
    wanted = os.environ.get("SIMPLCLIP_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"SIMPLCLIP_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return [cpu], "SIMPLCLIP_CUDA=0 left them out: unset it"
    reason = why_no_cuda()
    if reason:
        if wanted == "1":
            raise SystemExit(f"SIMPLCLIP_CUDA=1, but the CUDA objects cannot be built: {reason}")
        return [cpu], reason
    chosen, why = architectures()
    names = chosen.split(";")
    old = [name for name in names if name and float(name.partition(".")[0]) < OLDEST]
    if old:
        why += f", without {', '.join(old)}: the kernels need {OLDEST}.0 (Ampere) or later"
        chosen = ";".join(name for name in names if name not in old)
    if not chosen:
        if wanted == "1":
            raise SystemExit(f"SIMPLCLIP_CUDA=1, but there is no architecture to build for: {why}")
        return [cpu], f"no architecture to build for ({why})"
    print(
        f"simplclip: building the CUDA kernels for {chosen} ({why}); SIMPLCLIP_CUDA_ARCHS=all "
        f"builds for {ARCHITECTURES}"
    )
    os.environ["TORCH_CUDA_ARCH_LIST"] = chosen
    cuda = cpp_extension.CUDAExtension(
        "simplclip._C_cuda",
        sorted(str(path) for kind in ("*.cpp", "*.cu") for path in Path("csrc/cuda").rglob(kind)),
        include_dirs=[str(BUILD.resolve())],
        library_dirs=runtime_folders(),
        define_macros=[*MACROS, ("USE_CUDA", None), ("SIMPLCLIP_ARCHITECTURES", f'"{chosen}"')],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3", "-std=c++20"]},
        py_limited_api=True,
    )
    return [cpu, cuda], None


BUILD = Path("build")
DIGEST = runpy.run_path("simplclip/ops/extension.py")["digest"]
CALL_HEADERS = runpy.run_path("csrc/call_headers.py")["headers"]
EXTENSIONS, NO_CUDA = extensions()

setup(
    # kernels/ lies at the top level beside csrc/, and simplclip/kernels is a link to it. It has no
    # __init__.py, so that in a checkout `import kernels` is still PyPI's, which transformers
    # requires.
    packages=find_namespace_packages(include=["simplclip", "simplclip.*"]),
    # With this, an editable installation is an entry of sys.path. By default it is a finder, which
    # Python asks only after it has taken a folder without __init__.py for the package: a checkout
    # in a folder named simplclip, beside a script.
    package_dir={"": "."},
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
