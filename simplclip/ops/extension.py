"""The compiled extensions.

One that was built from other sources than these is refused, with a line that says what to run.

Each extension contains a digest of its sources, see `digest`. It is read from the file, without
loading the module: loading registers kernels, which would misread the arguments of ops whose
schemas have changed since.

setup.py runs this file by its path before anything is installed, so that it imports the standard
library alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
INSTALL = "run `pip install --no-build-isolation -e .` (or make install)"
_SUFFIXES = (".h", ".cuh", ".cpp", ".cu", ".py")  # of sources; call_headers.py writes headers
_DIGEST = re.compile(rb"simplclip sources ([0-9a-f]{16}) ([0-9a-f]{16})")


def schemas() -> list[Path]:
    """Returns the paths of the files that give the ops' schemas: calls/."""
    return sorted((PACKAGE / "calls").glob("*.py"))


def cpp_sources(name: str) -> list[Path]:
    """Returns the files of csrc/ that simplclip.<name> is built from; a wheel has none."""
    csrc = PACKAGE.parent / "csrc"
    folder = csrc / ("cuda" if name == "_C_cuda" else "cpu")
    files = [*csrc.glob("*.*"), *folder.rglob("*.*")]
    # Editors leave hidden files beside those that they edit.
    return sorted(
        file for file in files if file.suffix in _SUFFIXES and not file.name.startswith(".")
    )


def _digest_of(files: Iterable[Path]) -> str:
    """Returns 16 hexadecimal digits, a digest of the names and the contents of the files."""
    contents = [(file.name, file.read_bytes()) for file in files]
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:16]


def digest(name: str) -> str:
    """Returns the text that an extension ("_C" or "_C_cuda") built from these sources contains."""
    return f"simplclip sources {_digest_of(schemas())} {_digest_of(cpp_sources(name))}"


def is_current(name: str, file: Path) -> bool:
    """Whether the extension in `file`, which is not loaded, has the schemas and, if here, csrc/."""
    built = _DIGEST.search(file.read_bytes())
    if built is None:
        return False
    _, _, of_schemas, of_csrc = digest(name).encode().split()
    return built[1] == of_schemas and (built[2] == of_csrc or not cpp_sources(name))


def _not_built(name: str) -> str:
    """Returns that simplclip.<name> was not built, and why, if the loaded simplclip._C knows."""
    cpu = sys.modules.get("simplclip._C")
    why = cpu.why_no_cuda() if cpu and name == "_C_cuda" else ""
    return f"simplclip.{name} was not built" + (f": {why}; then {INSTALL}" if why else "")


def load(name: str) -> tuple[Any, str | None]:
    """Imports the extension simplclip.<name>; returns (module, None), or (None, why it is missing).

    Warns of one that was built from other sources. Takes a file of this package's folder alone: an
    editable installation may know that of another checkout.
    """
    try:
        spec = importlib.util.find_spec(f"simplclip.{name}")
        if spec is None or spec.origin is None or Path(spec.origin).parent != PACKAGE:
            return None, _not_built(name)
        if not is_current(name, Path(spec.origin)):
            reason = f"simplclip.{name} was built from other sources: {INSTALL}"
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return None, reason
        return importlib.import_module(f"simplclip.{name}"), None
    except ModuleNotFoundError:
        return None, _not_built(name)
    except ImportError as error:
        return None, f"simplclip.{name} does not load: {error}"


@functools.cache
def warn_without_cuda(reason: str) -> None:
    """Warns, once in a process, that shaped_attention runs on a GPU without its CUDA kernels."""
    warnings.warn(
        f"shaped_attention runs without its CUDA kernels: {reason}", RuntimeWarning, stacklevel=2
    )
