"""The symbols that a built extension needs from other libraries, as nm lists them."""

import re
import subprocess

# The C functions of the stable ABI, those of the limited API (another CPython has no others), what
# the linker adds, and the C++ library, some of which libtorch exports without a version.
_STABLE = re.compile(
    r"aoti_torch_\w+|torch_\w+|_?Py\w+|_ITM_\w+|__gmon_start__|(_ZN?[KOR]*St|_ZNK?S[asiod]|_ZS)\w+"
)
_VERSIONED = re.compile(r".+@@?(GLIBC|GLIBCXX|CXXABI|GCC|libcudart\.so)[\w.]+")
_TORCH = re.compile(r"2at[0-9NE]|3c10|5torch")  # mangled namespaces, in templates too


def unstable(path) -> list[str]:
    """Returns the needed symbols outside of the LibTorch stable ABI, CPython and the system's
    libraries.
    """
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert any(name.startswith("Py") for name in names)
    return [
        n
        for n in names
        if _TORCH.search(n) or not (_STABLE.fullmatch(n) or _VERSIONED.fullmatch(n))
    ]
