"""simplclip: fused ops and a minimal trainer for CLIP on one consumer GPU (SiCLIP, arXiv
2411.14789).

Importing compiles nothing and needs neither a GPU nor Triton nor the C++ extension; without the
extension the ops run in plain torch. Submodules are imported on first use, so that the command line
can set up threads before torch starts.
"""

import typing as _typing  # an editor lists names without an underscore

from simplclip.common.lazy import attribute as _attribute
from simplclip.version import __version__

if _typing.TYPE_CHECKING:
    from simplclip import (
        data,
        evaluation,
        export,
        gradient_cache,
        kernels,
        losses,
        models,
        nn,
        ops,
        plan,
        teacher,
        train,
    )
    from simplclip.evaluation.encoder import load
    from simplclip.models.crop import crop_texts
    from simplclip.models.fold import fold
    from simplclip.models.inherit import inherit
    from simplclip.models.registry import create_model
    from simplclip.models.simplify import simplify
    from simplclip.ops.backends import backend
    from simplclip.ops.report import report

_MODULES: dict[str, tuple[str, ...]] = {
    "evaluation.encoder": ("load",),
    "models.crop": ("crop_texts",),
    "models.fold": ("fold",),
    "models.inherit": ("inherit",),
    "models.registry": ("create_model",),
    "models.simplify": ("simplify",),
    "ops.backends": ("backend",),
    "ops.report": ("report",),
    # subpackages and modules
    "data": (),
    "evaluation": (),
    "export": (),
    "gradient_cache": (),
    "kernels": (),
    "losses": (),
    "models": (),
    "nn": (),
    "ops": (),
    "plan": (),
    "teacher": (),
    "train": (),
}
__all__ = [
    "__version__",
    "backend",
    "create_model",
    "crop_texts",
    "data",
    "evaluation",
    "export",
    "fold",
    "gradient_cache",
    "inherit",
    "kernels",
    "load",
    "losses",
    "models",
    "nn",
    "ops",
    "plan",
    "report",
    "simplify",
    "teacher",
    "train",
]

if not _typing.TYPE_CHECKING:  # a type checker would take any name for known

    def __getattr__(name: str) -> _typing.Any:
        """Returns a public name, whose module is imported on first use."""
        return _attribute(__name__, _MODULES, name)


def __dir__() -> list[str]:
    """Returns the module's names, with those that are imported on first use."""
    return sorted({*globals(), *__all__})
