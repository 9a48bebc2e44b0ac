"""Writes folders of tars, each complete or absent, with a meta.json from which a command goes on
after a stop.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.common.files import (
    FULL_DISK,
    differences,
    locked,
    remove_leftovers,
    replacing,
    write_atomically,
)
from simplclip.data.errors import Skipped
from simplclip.data.samples import json_of


class TarFolder:
    """A folder of tars and its meta.json: `about`, which says how they are made, and `entries`.

    An entry of a tar, by its file name: {"samples", "bytes", "skipped" and "remarks" (each reason
    -> [count, the first]), ...}
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        """Notes the arguments; nothing is read or written before `claimed`."""
        self.out = out
        self.about = json.loads(json.dumps(dict(about)))
        self.entries: dict[str, dict[str, Any]] = {}
        self.complete = False  # whether all tars are finished, where a command knows it

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Context in which the folder is locked, and has what an earlier run made.

        Raises InputError if the folder holds other files, or tars of something else,
        FileExistsError if another process has locked it.
        """
        with locked(self.out, "out"):
            names = sorted(path.name for path in self.out.iterdir())
            visible_names = [name for name in names if not name.startswith(".")]
            # `pack_shards` makes the folder "shards" for this command
            other_names = [name for name in visible_names if name != "shards"]
            if "meta.json" in names:
                self._load_meta()
            elif not other_names:
                self.save()
            else:
                raise InputError(
                    f"out: expected a new folder, got {self.out}, which holds other files "
                    f"({other_names[0]})"
                )
            remove_leftovers(self.out, lambda name: True)
            yield

    def _load_meta(self) -> None:
        """Sets `entries` and `complete` to those of meta.json."""
        try:
            former = json_of((self.out / "meta.json").read_text("utf-8"))
            self.entries = former.pop("splits")["data"]["shards"]
            self.complete = former.pop("complete", False)
            for name in ("skipped", "remarks"):
                skipped_in(self.entries.values(), name)
            for entry in self.entries.values():
                _ = 0 + entry["samples"] + entry["bytes"] + entry.get("rows", 0)
            changed = differences(former, self.about)
        except (ValueError, LookupError, TypeError, AttributeError):
            expected = "a new folder or that of an earlier run"
            raise InputError(
                f"out: expected {expected}, got {self.out} with another meta.json"
            ) from None
        if changed:
            changes = [f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items()]
            raise InputError(
                f"out: expected {self.out} to hold what an earlier run made of the same data with "
                f"the same settings, got other ones: {'; '.join(changes)}; remove it or choose "
                "another folder"
            )

    def save(self) -> None:
        """Replaces meta.json by `about`, `entries` and `complete` as they are now."""
        samples = sum(entry["samples"] for entry in self.entries.values())
        content = dict(self.about)
        if self.complete:
            content["complete"] = True
        shards = dict(sorted(self.entries.items()))
        content["splits"] = {"data": {"samples": samples, "shards": shards}}
        write_atomically(self.out / "meta.json", json.dumps(content, indent=1) + "\n")

    def is_whole(self, name: str) -> bool:
        """Whether a tar has an entry, and its file the size in it; of 0 bytes there is no file."""
        entry = self.entries.get(name)
        return entry is not None and entry["bytes"] == _size_of(self.out / name)


def _size_of(tar: Path) -> int:
    """Returns the bytes of a file, 0 if there is none."""
    return tar.stat().st_size if tar.is_file() else 0


def entry_of(
    tar: Path, samples: int, skipped: Skipped, remarks: Skipped | None = None
) -> dict[str, Any]:
    """Returns the entry of a tar for meta.json, see TarFolder; its bytes are 0 if it is no file."""
    entry: dict[str, Any] = {"samples": samples, "bytes": _size_of(tar)}
    if skipped.counts:
        entry["skipped"] = _with_examples(skipped)
    if remarks is not None and remarks.counts:
        entry["remarks"] = _with_examples(remarks)
    return entry


def _with_examples(skipped: Skipped) -> dict[str, list[Any]]:
    """Returns {reason: [count, example]}, sorted by reason, as meta.json has them."""
    counts = sorted(skipped.counts.items())
    return {reason: [count, skipped.examples[reason]] for reason, count in counts}


def skipped_in(entries: Iterable[Mapping[str, Any]], name: str = "skipped") -> Skipped:
    """Returns the sum over entries of what was left out of tars, or of their "remarks"."""
    skipped = Skipped()
    for entry in entries:
        for reason, (count, first) in entry.get(name, {}).items():
            skipped.merge(Skipped(Counter({reason: count}), {reason: first}))
    return skipped


@contextlib.contextmanager
def new_tar(path: str | Path) -> Iterator[tarfile.TarFile]:
    """Context with a tar to write; it gets its name when the block ends without an error.

    It replaces a file of this name. Raises InputError if the disk is full.
    """
    try:
        with (
            replacing(path) as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            yield tar
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise InputError(
            f"out: {path} could not be written: {error.strerror}; the same command goes on when "
            "there is more room"
        ) from None


def add(tar: tarfile.TarFile, key: str, files: Mapping[str, bytes]) -> None:
    """Appends a sample's files, {suffix: content}, as KEY.SUFFIX, without time and user."""
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        member.mtime = 0
        member.mode = 0o444
        member.uname = member.gname = "simplclip"
        tar.addfile(member, io.BytesIO(content))
