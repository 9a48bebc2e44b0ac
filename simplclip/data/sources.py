"""The tars that a user names: by path, pattern, URL or command, each with a weight."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import braceexpand

from simplclip.common.errors import InputError

_FORMS = "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"
_OTHERS = (".csv", ".tsv", ".parquet", ".json", ".jsonl", ".txt")
_MOST = 1_000_000  # names of a brace pattern; a pattern may come with a run from elsewhere
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([a-zA-Z])\.\.([a-zA-Z]))(?:\.\.(-?\d+))?")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")


class Address(str):
    """An http(s) URL, which is fetched, or pipe:COMMAND, which is run; the path of a file stays a plain str.

    Only `sources_of` makes addresses, from what a user typed.
    """


@dataclass(frozen=True)
class Source:
    """A tar. weight: how often it comes in a pass over the data. name: in messages and seeds; it stays if the data move."""

    url: str
    weight: float = 1.0
    name: str = ""


def name_of(url: str) -> str:
    """Returns the file name of a path or URL, without the query of the URL, which may be a signature that changes."""
    is_url = isinstance(url, Address) and url.startswith("http")
    return os.path.basename(urlsplit(url).path if is_url else url)


def sources_of(what: Any, name: str = "shards") -> list[Source]:
    """Returns the tars of `what`, which a user names:

    - a tar by path, brace pattern (train-{000000..000003}.tar) or glob;
    - the URL of tars, http:// or https://, with brace patterns, or pipe:COMMAND, whose output is a tar;
    - a mapping of "shards" (one of these or a list) and "weight" (how often its shards come in a pass over the data; of a
      fraction a random share, drawn in each pass);
    - a list of these.

    A text that names an existing file is that file, whatever it begins with. A pathlib.Path is never a URL or command.
    name: name of the argument in errors. Raises InputError if `what` does not exist or is none of these.
    """
    sources = list(_sources(what, name))
    if not sources:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    # The samples of files of one name, such as a/000.tar and b/000.tar, may have the same keys; whole paths tell them apart.
    files = Counter(name_of(url) for url in {source.url for source in sources})
    names = {source.url: name_of(source.url) for source in sources}
    return [replace(s, name=str(s.url) if files[names[s.url]] > 1 else names[s.url]) for s in sources]


def in_words(sources: Iterable[Any]) -> str:
    """Names sources in messages: "'a.tar' (and 3 more files)"."""
    first, *more = dict.fromkeys(source.url for source in sources)
    return repr(str(first)) + (f" (and {len(more)} more file{'s' * (len(more) > 1)})" if more else "")


def _sources(what: Any, name: str) -> Iterator[Source]:
    if isinstance(what, (str, os.PathLike)):
        yield from map(Source, _urls(what, name))
    elif isinstance(what, Mapping):
        if "shards" not in what or not what.keys() <= {"shards", "weight"}:
            raise InputError(f"{name}: expected a mapping with shards and, if need be, weight, got {dict(what)}")
        weight = what.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise InputError(f"{name}: expected a weight above 0, got {weight!r}")
        for source in _sources(what["shards"], name):
            yield replace(source, weight=source.weight * weight)
    elif isinstance(what, Iterable):
        for entry in what:
            yield from _sources(entry, name)
    else:
        raise InputError(f"{name}: expected {_FORMS}, got {what!r}")


def _urls(text: str | os.PathLike, name: str) -> Iterator[str]:
    what = os.fspath(text)
    path = os.path.expanduser(what)
    if os.path.exists(path):
        yield _tar(path, name)
    elif isinstance(text, str) and what.startswith(("pipe:", "http://", "https://")):
        yield from map(Address, _expanded(what, name))
    elif "://" in what:
        raise InputError(
            f"{name}: expected {_FORMS}, got {what!r}; of other places the output of a command may be read, e.g. "
            "'pipe:aws s3 cp s3://BUCKET/NAME.tar -'"
        )
    else:
        for pattern in _expanded(path, name):
            paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
            if not paths:
                reason = "which matches none" if glob.has_magic(pattern) else "which does not exist"
                raise InputError(f"{name}: expected files, got {pattern!r}, {reason}")
            yield from (_tar(path, name) for path in paths)


def _tar(path: str, name: str) -> str:
    lower = path.lower()
    if os.path.isdir(path):
        raise InputError(
            f"{name}: expected tars, got the folder {path!r}; name its tars by {os.path.join(path, '*.tar')!r}, or make "
            "shards of a folder of images by `simplclip data pack`"
        )
    if lower.endswith(_OTHERS):
        raise InputError(f"{name}: expected tars, got {path!r}; make shards of it by `simplclip data pack`")
    if lower.endswith(_COMPRESSED):
        raise InputError(f"{name}: expected tars that are not compressed, got {path!r}; unpack it, e.g. by gunzip")
    return path


def _expanded(pattern: str, name: str) -> list[str]:
    """Expands braces. webdataset's `expand_urls` would also split at '::', as in http://[::1]/, and substitute variables."""
    try:
        if _most_names(pattern) <= _MOST:
            return list(braceexpand.braceexpand(pattern, escape=False))
    except (ValueError, RecursionError):
        raise InputError(f"{name}: expected a brace pattern, got {pattern[:200]!r}, whose braces do not match") from None
    raise InputError(f"{name}: expected a brace pattern of at most {_MOST:,} names, got {pattern[:200]!r}")


def _most_names(pattern: str) -> float:
    """Returns a number that the names of a brace pattern do not exceed: the product over all braces."""
    counts: list[int] = []

    def count(braces: re.Match) -> str:
        ends = _RANGE.fullmatch(braces[1])
        number = braces[1].count(",") + 1
        if ends and ends[1]:
            number = abs(int(ends[1]) - int(ends[2])) // max(1, abs(int(ends[5] or 1))) + 1
        elif ends:
            number = abs(ord(ends[3]) - ord(ends[4])) + 1
        counts.append(number)
        return ""

    for _ in range(20):  # levels of braces in braces
        pattern, number = _BRACES.subn(count, pattern)
        if not number:
            return math.prod(counts)
    return math.inf
