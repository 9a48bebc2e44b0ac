"""Import paths of version 0.1, which keep working for one version with a DeprecationWarning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings

MOVED = {
    "simplclip.openclip": "simplclip.models.simplify",
    "simplclip.openclip_train": "simplclip.integrations.open_clip_train",
    "simplclip.backends": "simplclip.ops.backends",
    "simplclip.checkpoint": "simplclip.train.checkpoint",
    "simplclip.config": "simplclip.train.config",
    "simplclip.plan": "simplclip.memory",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the module of the new path under the old path."""

    def find_spec(self, name, path=None, target=None):
        if name not in MOVED:
            return None
        warnings.warn(f"{name} is now {MOVED[name]}; the next version removes the old name", DeprecationWarning, stacklevel=2)
        return importlib.util.spec_from_loader(name, self, origin=importlib.util.find_spec(MOVED[name]).origin)

    def exec_module(self, module) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])

    def get_code(self, name):  # for `python -m`
        new = importlib.util.find_spec(MOVED[name])
        return new.loader.get_code(new.name)


def install() -> None:
    sys.meta_path.insert(0, _Finder())  # before what is left of an old folder
