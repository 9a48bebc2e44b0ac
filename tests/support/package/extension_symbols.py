"""The symbols that a built extension needs from other libraries, as nm lists them."""

import re
import subprocess
from pathlib import Path

# The C functions of the stable ABI, those of the limited API (another CPython has no others), what
# the linker adds, and the C++ library, some of which libtorch exports without a version.
_STABLE = re.compile(
    r"aoti_torch_\w+|torch_\w+|_?Py\w+|_ITM_\w+|__gmon_start__|(_ZN?[KOR]*St|_ZNK?S[asiod]|_ZS)\w+"
)
_VERSIONED = re.compile(r".+@@?(GLIBC|GLIBCXX|CXXABI|GCC|libcudart\.so)[\w.]+")
_TORCH = re.compile(r"2at[0-9NE]|3c10|5torch")  # mangled namespaces, in templates too


def unstable(path: str | Path) -> list[str]:
    """Returns the needed symbols outside of the LibTorch stable ABI, CPython and the system's
    libraries.
    """
    command = ["nm", "-D", "--undefined-only", path]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in run.stdout.splitlines()]
    assert any(name.startswith("Py") for name in names)
    return [name for name in names if not is_stable(name)]


def is_stable(name: str) -> bool:
    if _TORCH.search(name):
        return False
    return bool(_STABLE.fullmatch(name) or _VERSIONED.fullmatch(name))
