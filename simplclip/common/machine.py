"""Findings about a device of this machine that later processes use: one JSON file for each device and build.

The file's name is a digest of the device, its driver, torch, Triton and the files of this library that compute: after any of
them changes, nothing is known. The folder is ~/.cache/simplclip, or SIMPLCLIP_CACHE.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config

from simplclip.common.errors import UserError
from simplclip.common.files import locked, write_atomically
from simplclip.version import __version__

PACKAGE = Path(__file__).resolve().parent.parent
COMPUTES = ("*.so", "*.pyd", "ops/**/*.py")


def folder() -> Path:
    if given := os.environ.get("SIMPLCLIP_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simplclip"


def cpu_name() -> str:
    """Returns the processor's name from /proc/cpuinfo with its family and model, since the name alone may say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{info.get('model name', platform.machine())} (family {info.get('cpu family')}, model {info.get('model')})"


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: str) -> dict[str, str]:
    """Returns the configuration for which findings hold. device: "cpu", or "cuda", where the first card stands for all."""
    if device == "cuda":
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        found = {"device": torch.cuda.get_device_name(0), "driver": str(driver)}
    else:
        instructions = os.environ.get("SIMPLCLIP_CPU_ISA") or torch.backends.cpu.get_cpu_capability()
        found = {"device": f"{cpu_name()}, {instructions}", "driver": "none"}
    triton = version_of("triton") or "none"
    return {**found, "torch": torch.__version__, "triton": triton, "simplclip": __version__, "build": _build()}


def computing() -> list[Path]:
    """The files of this library that compute. In an editable installation kernels/ lies elsewhere than the package.

    Dangling links, which editors make beside a file that is being edited, are left out.
    """
    spec = importlib.util.find_spec("simplclip.kernels")
    kernels = (spec.submodule_search_locations if spec else None) or []
    found = [path for pattern in COMPUTES for path in PACKAGE.glob(pattern)]
    found += [path for place in kernels for path in Path(place).rglob("*.py")]
    return sorted(path for path in found if path.is_file())


@functools.cache
def _build() -> str:
    """A digest of the sizes and times of the files that compute."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in computing()]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def path(device: str) -> Path:
    digest = hashlib.sha256(json.dumps(describe(device)).encode()).hexdigest()[:16]
    return folder() / f"{device}-{digest}.json"


def _marking_graphs(read: Callable[[str], dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    """Wraps `read` to put the build and the findings into the key of the graphs that torch.compile keeps on disk.

    A graph expects the arguments of an op, and the shapes of its results, that the op had during compilation. Another version
    or another backend of the op may have others.
    """

    @functools.wraps(read)
    def reading(device: str) -> dict[str, Any]:
        found, config = read(device), torch.compiler.config
        others = [part for part in config.cache_key_tag.split(";") if part and not part.startswith(f"simplclip {device} ")]
        own = f"simplclip {device} {hashlib.sha256(json.dumps([_build(), found]).encode()).hexdigest()}"
        config.cache_key_tag = ";".join([*others, own])
        return found

    return reading


def _check(found: Any) -> None:
    """Raises ValueError for content that `store` did not write."""
    sections = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError("a value where a mapping should be")
    reasons, tuned = found.get("failed", {}), found.get("tuned", {})
    choices, rows = tuned.get("choices", {}), tuned.get("measured", [])
    if not isinstance(choices, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("choices of another form")
    if not all(isinstance(value, (str, int)) for value in (*reasons.values(), *choices.values())):
        raise ValueError("values of another type")


@functools.cache
@_marking_graphs
def _read(device: str) -> dict[str, Any]:
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        return {}  # there are no findings about a device that is not here, for which a plan may still ask
    file: Path | str = "the cache folder"
    try:
        if not os.path.isdir(folder()):  # the common case, which needs no query of the device and its driver
            return {}
        file = path(device)
        found = json.loads(file.read_text())
        _check(found)
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home folder, or too deep a JSON
        warnings.warn(f"{file}: expected what an earlier process found out, got {error}; it is ignored", stacklevel=3)
        return {}


def known(section: str, device: str) -> dict[str, Any]:
    """Returns a section of the findings about a device, which callers must not change. A process reads the file once."""
    return _read(device).get(section, {})


def forget() -> None:
    """Makes the next call of `known` read the file again."""
    _read.cache_clear()


def store(section: str, device: str, found: dict[str, Any]) -> Path:
    """Replaces a section of the findings for this process and later ones; an empty section is removed.

    Raises UserError if the file cannot be written; the file then stays as it was.
    """
    file: Path | str = "the cache folder"
    try:
        file = path(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent):
            forget()
            sections = {**_read(device), section: found, "machine": describe(device)}
            write_atomically(file, json.dumps({name: value for name, value in sections.items() if value}, indent=2))
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        told = f"{file}: expected to write what was found out about this machine, got {why}"
        raise UserError(f"{told}; SIMPLCLIP_CACHE names another folder") from None
    finally:
        forget()
    return file
