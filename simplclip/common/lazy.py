"""Attributes of a package that are imported on first use, so that a command imports only what it
needs.
"""

import importlib
from collections.abc import Mapping
from typing import Any


def attribute(package: str, modules: Mapping[str, tuple[str, ...]], name: str) -> Any:
    """Returns the attribute `name` of a package, whose module it imports; for a `__getattr__`.

    package: its dotted name. modules: module, relative to the package -> the names that it has, or
    () for the module itself. The package imports the same names under TYPE_CHECKING, for type
    checkers and editors. Raises AttributeError for other names.
    """
    for module, names in modules.items():
        if name in names:
            return getattr(importlib.import_module(f"{package}.{module}"), name)
        if not names and name == module:
            return importlib.import_module(f"{package}.{module}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
