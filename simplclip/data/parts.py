"""Parts of the data: a tar, or a piece of a table, a JSON file or a folder. One worker reads a part in order.

A sample of any part is a dict: "__key__", "__url__" (the file or folder it is from), and its files by suffix, as bytes or
Spans. Captions and labels that are not files are "__captions__", a list of texts, and "__label__", the number of a class.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.addresses import is_address, name_of
from simplclip.data.broken import Skipped
from simplclip.data.shards import IMAGE_SUFFIXES, KNOWN, Sample, ShardError, read_shard
from simplclip.data.tar import Span

ROWS = 512  # samples in a piece of a table, a JSON file or a folder
RETRIES = (0.2, 1.0, 5.0)  # seconds to wait before a part that could not be read is tried again
REMOTE = "not a local file"


@dataclass(frozen=True)
class Classes:
    """The classes of labelled data, by number: their names, their folders if each class has one, and prompt templates."""

    names: list[str] | None = None
    folders: tuple[str, ...] = ()
    templates: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the data, which one worker reads in order.

    weight: how often an epoch has each sample of the part; a fraction, as in 0.5 or 2.5, adds a random share of the samples.
    title: the part's name, if other parts have the same file name.
    count: number of samples, including broken ones; None if it is not known before the part is read.
    """

    url: str
    weight: float = 1.0
    title: str = ""
    classes: Classes | None = None
    count: int | None = None

    @property
    def name(self) -> str:
        """The name in messages and seeds, which does not change if the data move."""
        return self.title or name_of(self.url)

    @property
    def is_local_tar(self) -> bool:
        return False

    def read(self, skipped: Skipped, **options: Any) -> Iterator[Sample]:
        """Yields the samples of the part. options: arguments of `read_shard`, which tars use."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Tar(Part):
    """A tar, by path or by address."""

    @property
    def is_local_tar(self) -> bool:
        return not is_address(self.url)

    def read(self, skipped: Skipped, **options: Any) -> Iterator[Sample]:
        return read_shard(self.url, skipped, **options)


def read_part(part: Part, skipped: Skipped, **options: Any) -> Iterator[Sample]:
    """Yields the samples of a part. After an error it tries again from where it failed, and at last raises ShardError.

    For a local file that can be read but is no valid tar it raises at once, since another try cannot help.

    options: arguments of `read_shard`.
    """
    given = 0
    for wait in (*RETRIES, None):
        found = Skipped()
        try:
            for number, sample in enumerate(part.read(found, **options), 1):
                counted = found.take() if found.counts else None
                if number > given:  # an earlier try yielded the first `given` samples, and counted the broken ones there
                    given = number
                    if counted:
                        skipped.merge(counted)
                    yield {**sample, "__shard__": part.title} if part.title else sample
            skipped.merge(found)
            return
        except (ShardError, OSError) as error:
            cause = error.__cause__ if isinstance(error, ShardError) else error
            if wait is None or not (is_address(part.url) or isinstance(cause, OSError)):
                skipped.merge(found)
                raise error if isinstance(error, ShardError) else ShardError(f"{part.name}: {error}") from error
            time.sleep(wait)


def in_words(parts: list[Part]) -> str:
    """Names the files of parts in messages: "'a.tar' (and 3 more files)". The pieces of a table or folder are one file."""
    first, *more = dict.fromkeys(part.url for part in parts)
    return repr(first) + (f" (and {len(more)} more file{'s' * (len(more) > 1)})" if more else "")


def image_sample(url: str, key: str, folder: str, image: Any, captions: list[Any], skipped: Skipped) -> Iterator[Sample]:
    """Yields the sample of an image path in a table or JSON, relative to `folder`; if it is no local file, only counts it."""
    place = f"{os.path.basename(url)}/{key}"
    if not isinstance(image, str) or not image:
        skipped.add("missing image", place)
    elif image.startswith("pipe:") or "://" in image:
        told = f"{image!r}, which is not a path: tables and JSON name local files alone; of URLs img2dataset makes shards"
        skipped.add(REMOTE, place, told)
    elif (span := span_of(os.path.join(folder, image))) is None:
        skipped.add("missing image", place, f"{image!r} is no file")
    else:
        # The suffix only marks the file as an image. Its content tells the format.
        _, suffix = split_name(image) or ("", "")
        yield {
            "__key__": key, "__url__": url, suffix if suffix in IMAGE_SUFFIXES else "jpg": span, "__captions__": captions
        }  # fmt: skip


def checked(parts: list[Part], name: str) -> list[Part]:
    """Returns `parts`. Raises InputError if a row before the first local image names a URL; later ones are only counted."""
    for part in parts[:1]:
        next(part.read(skipped := Skipped()), None)
        if REMOTE in skipped.counts:
            raise InputError(f"{name}: expected paths of images, got {skipped.examples[REMOTE]}")
    return parts


def split_name(name: str) -> tuple[str, str] | None:
    """Splits the name of a sample's file outside of tars into key and suffix; None for other files. A key may have dots."""
    low = name.lower()
    return next(((name[: -len(suffix)], suffix[1:]) for suffix in KNOWN if low.endswith(suffix)), None)


def span_of(path: str) -> Span | None:
    """Returns a file as a Span; None for anything but a regular file, such as a named pipe, which waits for its writer."""
    try:
        found = os.stat(path)
        return Span(path, 0, found.st_size) if stat.S_ISREG(found.st_mode) else None
    except OSError:
        return Span(path, 0, 0)  # reading it raises the error, which is counted
    except ValueError:  # a name with NUL
        return None
