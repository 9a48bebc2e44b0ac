"""The scripts of examples/ as modules: they are no package, and are not installed."""

import importlib.util
import sys

from paths import ROOT

FOLDER = ROOT / "examples"


def load(name):
    """Returns the module of examples/NAME.py; a second call returns the same module."""
    known = f"example_{name.replace('/', '_')}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]
