"""Folders of tars that a command makes one after another, each complete or absent, with a meta.json
to go on from.
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
    """A folder of tars and its meta.json: `about`, which says of what and how they are made, and an
    entry of each tar.

    entries: file name -> {"samples", "bytes", "skipped" and "remarks" (each reason -> [count, the
    first]), ...}
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.out, self.about = out, json.loads(json.dumps(dict(about)))
        self.entries: dict[str, dict[str, Any]] = {}
        self.complete = False  # whether all tars are finished, where a command knows it

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Context that makes the folder, or takes over that of an earlier run, and locks it for
        this process.

        Raises InputError if the folder holds other files, or tars of something else.
        """
        with locked(self.out, "out"):
            names = sorted(
                path.name for path in self.out.iterdir() if not path.name.startswith(".")
            )
            if "meta.json" in names:
                self._read()
            # which `packed` made for this command
            elif others := [name for name in names if name != "shards"]:
                raise InputError(
                    f"out: expected a new folder, got {self.out}, which holds other files "
                    f"({others[0]})"
                )
            else:
                self.save()
            remove_leftovers(self.out, lambda name: True)
            yield

    def _read(self) -> None:
        try:
            former = json_of((self.out / "meta.json").read_text("utf-8"))
            self.entries = former.pop("splits")["data"]["shards"]
            self.complete = former.pop("complete", False)
            for name in ("skipped", "remarks"):
                skipped_in(self.entries.values(), name)
            sum(
                entry["samples"] + entry["bytes"] + entry.get("rows", 0)
                for entry in self.entries.values()
            )
            changed = differences(former, self.about)
        except (ValueError, LookupError, TypeError, AttributeError):
            expected = "a new folder or that of an earlier run"
            raise InputError(
                f"out: expected {expected}, got {self.out} with another meta.json"
            ) from None
        if changed:
            changes = "; ".join(
                f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items()
            )
            raise InputError(
                f"out: expected {self.out} to hold what an earlier run made of the same with the "
                f"same settings, got others: {changes}; remove it or choose another folder"
            )

    def save(self) -> None:
        samples = sum(entry["samples"] for entry in self.entries.values())
        splits = {"data": {"samples": samples, "shards": dict(sorted(self.entries.items()))}}
        content = self.about | ({"complete": True} if self.complete else {}) | {"splits": splits}
        write_atomically(self.out / "meta.json", json.dumps(content, indent=1) + "\n")

    def is_whole(self, name: str) -> bool:
        """Whether an earlier run has finished the tar, and it is still there."""
        tar, entry = self.out / name, self.entries.get(name)
        return entry is not None and entry["bytes"] == (tar.stat().st_size if tar.is_file() else 0)


def entry_of(
    tar: Path, samples: int, skipped: Skipped, remarks: Skipped | None = None
) -> dict[str, Any]:
    """Returns the entry of a tar; a tar that was not written has 0 bytes. remarks: counts of
    samples that were kept.
    """
    entry: dict[str, Any] = {
        "samples": samples,
        "bytes": tar.stat().st_size if tar.is_file() else 0,
    }
    for name, counted in (("skipped", skipped), ("remarks", remarks)):
        if counted and counted.counts:
            entry[name] = {
                reason: [n, counted.examples[reason]]
                for reason, n in sorted(counted.counts.items())
            }
    return entry


def skipped_in(entries: Iterable[Mapping[str, Any]], name: str = "skipped") -> Skipped:
    """Returns what was left out of tars, or their "remarks"."""
    skipped = Skipped()
    for entry in entries:
        for reason, (count, first) in entry.get(name, {}).items():
            skipped.merge(Skipped(Counter({reason: count}), {reason: first}))
    return skipped


@contextlib.contextmanager
def new_tar(path: str | Path) -> Iterator[tarfile.TarFile]:
    """Context with a tar that gets its name when the block ends without an error.

    Raises InputError if the disk is full.
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
    """Adds the files of a sample, by suffix. The bytes depend on nothing else."""
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        member.mtime = 0
        member.mode = 0o444
        member.uname = member.gname = "simplclip"
        tar.addfile(member, io.BytesIO(content))
