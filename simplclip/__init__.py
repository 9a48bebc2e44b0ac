"""simplclip: fused ops and a minimal trainer for CLIP on one consumer GPU (SiCLIP, arXiv 2411.14789).

Importing compiles nothing and needs neither a GPU nor Triton nor the C++ extension; without the extension the ops run in
plain torch. Submodules are imported on first use, so that the command line can set up threads before torch starts.
"""

import importlib

from simplclip.version import __version__

__all__ = ["__version__", "backend", "create_model", "crop_texts", "fold", "inherit", "load", "report", "simplify"]

# name -> module and its name there
_FUNCTIONS = {
    "backend": ("simplclip.ops.backends", "backend"),
    "create_model": ("simplclip.models.registry", "create"),
    "crop_texts": ("simplclip.models.crop", "crop_texts"),
    "fold": ("simplclip.models.fold", "fold"),
    "inherit": ("simplclip.models.inherit", "inherit"),
    "load": ("simplclip.evaluation.encoder", "load"),
    "report": ("simplclip.ops.report", "report"),
    "simplify": ("simplclip.models.simplify", "simplify"),
}
_MODULES = (
    *("data", "evaluation", "gradient_cache", "kernels", "losses", "models", "nn", "ops", "train"),
    *("export", "memory", "teacher"),  # commands
)


def __getattr__(name: str):
    if name in _FUNCTIONS:
        module, attribute = _FUNCTIONS[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _MODULES:
        return importlib.import_module(f"simplclip.{name}")
    raise AttributeError(f"module 'simplclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FUNCTIONS, *_MODULES])
