"""This library's models, a file each, which is all that a model needs: siclip-s0 is siclip_s0.py.

SPEC      how the model is made, a `models.spec.Spec`, with its tokenizer
CONFIG    the text of the YAML file by which `simplclip train NAME` trains it, if it has one

The names are those of the files. Nothing here imports torch: of a file CONFIG is read, so it is one
literal, and the file is imported when its SPEC is needed.
"""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simplclip.models.spec import Spec

_FILES = {
    file.stem.replace("_", "-"): file
    for file in Path(__file__).parent.glob("*.py")
    if file.name != "__init__.py"
}
NAMES = tuple(sorted(_FILES))


def spec(name: str) -> Spec:
    """Returns the SPEC of one of NAMES."""
    recipe: Spec = pkgutil.resolve_name(f"{__name__}.{_FILES[name].stem}:SPEC")
    return recipe


def configs() -> dict[str, str]:
    """Returns the CONFIG of each model that has one, by name."""
    texts: dict[str, str] = {}
    for name in NAMES:
        for node in ast.parse(_FILES[name].read_bytes()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CONFIG":
                texts[name] = ast.literal_eval(node.value)
    return texts
