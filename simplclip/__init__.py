"""simplclip: fused ops and a minimal trainer for CLIP on one consumer GPU (SiCLIP, arXiv 2411.14789).

Importing compiles nothing and needs neither a GPU nor Triton nor the extension: without it the reference serves.
Submodules load when they are first named, so that the command line can set up threads before torch starts.
"""

import importlib

from simplclip.version import __version__

__all__ = ["__version__", "backend", "report"]

_FUNCTIONS = {"backend": "simplclip.ops.backends", "report": "simplclip.doctor"}
_MODULES = (
    "ablate",
    "data",
    "evaluate",
    "gradient_cache",
    "inherit",
    "kernels",
    "losses",
    "models",
    "nn",
    "openclip",
    "ops",
    "plan",
    "pretrained",
    "train",
)


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"simplclip.{name}")
    raise AttributeError(f"module 'simplclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FUNCTIONS, *_MODULES])
