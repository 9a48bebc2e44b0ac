"""Writes a page for each public module, from its docstrings: python docs/make_api.py build/api

Ends with 1 if a public name has no docstring.
"""

import importlib
import inspect
import sys
from pathlib import Path

import pdoc

MODULES = (
    *("simplclip", "simplclip.losses", "simplclip.ops", "simplclip.nn"),
    *("simplclip.gradient_cache", "simplclip.models", "simplclip.evaluation"),
)

missing = []
for name in MODULES:
    module = importlib.import_module(name)
    for public in module.__all__:
        value = getattr(module, public)
        setattr(module, public, value)  # pdoc finds no names that a package imports on first use
        if (inspect.isroutine(value) or inspect.isclass(value)) and not inspect.getdoc(value):
            missing.append(f"{name}.{public}")
if missing:
    sys.exit(f"expected a docstring, got none: {', '.join(missing)}")
pdoc.render.configure(docformat="google")
pdoc.pdoc(*MODULES, output_directory=Path(sys.argv[1]))
