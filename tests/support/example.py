"""The scripts of examples/ as modules: they are no package, and are not installed."""

import importlib.util
import sys

from paths import ROOT

FOLDER = ROOT / "examples"


def load(name):
    """Returns the module of examples/NAME.py, e.g. emoji/build; a second call returns the same
    module.
    """
    path = FOLDER / f"{name}.py"
    if path.parent != FOLDER and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where it finds the files beside it, as a script does
    module = f"example_{name.replace('/', '_')}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]
