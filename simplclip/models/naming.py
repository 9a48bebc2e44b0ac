"""Names of models, of their towers, and of the files of a run and an export; needs no torch."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from simplclip.common.errors import InputError

# models of this library; presets.py has their recipes
NAMES = ("mobileclip-s0", "siclip-lite0", "siclip-s0", "siclip-tiny", "siclip2-s0")
PLAIN = "open_clip:"  # begins the names of open_clip's models
SCALARS = ("logit_scale", "logit_bias")  # parameters of neither tower

# a run: the weights of its best evaluation, and of its last step
BEST, LAST = "best.pt", "last.pt"
# with LoRA, the weights that both lack, since they do not change
BASE = "base.pt"
EXPORT, EXPORTED_WEIGHTS, CARD = "export.json", "open_clip_model.safetensors", "README.md"
# an export's form -> its weights, and the file that is written last: with it the export is whole
Form = Literal["open_clip", "transformers"]
FORMS: dict[Form, tuple[str, str]] = {
    "open_clip": (EXPORTED_WEIGHTS, EXPORT),
    "transformers": ("model.safetensors", "config.json"),
}


def configs() -> dict[str, str]:
    """Returns, by name, the text of the YAML file by which `simplclip train NAME` trains a model.

    Only models that have one.
    """
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return {file.stem: file.read_text("utf-8") for file in files}


def tower_of(name: str) -> str:
    """Returns the tower, "image" or "text", of a module or parameter by name, or "" for neither."""
    if name in ("", *SCALARS):
        return ""
    return "image" if name.partition(".")[0] == "visual" else "text"


def check_name(name: str, argument: str = "name") -> None:
    """Raises InputError, with the nearest names, unless `name` is in NAMES or "open_clip:NAME"."""
    from open_clip import list_models

    names = [*NAMES, *(PLAIN + plain for plain in list_models())]
    if name not in names:
        near = get_close_matches(name, names, 3) or get_close_matches(PLAIN + name, names, 3)
        raise InputError(
            f"{argument}: expected one of {[*NAMES]} or {PLAIN}NAME, got {name!r}; nearest: {near}"
        )
