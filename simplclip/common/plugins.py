"""Parts that other packages register by entry points, so that the library need not import those packages.

group                   an entry is                                             registered by simplclip.demo
simplclip.teachers      a module with `load` and `prepare`                      builtin
simplclip.configs       a package with a folder configs/ of YAML files          demo
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any


@functools.cache
def entries(group: str) -> dict[str, metadata.EntryPoint]:
    """The entry points of simplclip.GROUP by name; `load` imports one of them."""
    return {entry.name: entry for entry in sorted(metadata.entry_points(group=f"simplclip.{group}"))}


def load(group: str, name: str) -> Any:
    """Returns the object that is registered as `name` in simplclip.GROUP."""
    return entries(group)[name].load()
