"""The tars that a user names: by path, pattern, URL, command or list file, each with a weight."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import braceexpand

from simplclip.common.errors import InputError

MOST = 1_000_000  # names of one pattern
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst")
_FORMS = "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"


class Address(str):
    """An http(s) URL, which is fetched, or pipe:COMMAND, which is run; the path of a file stays a plain str.

    Only `sources_of` makes addresses: from what a user typed, and, if they are URLs, from the lines of list files.
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
    - a list file (.txt) with one of these, but no command, in each line; its paths are relative to its folder;
    - a mapping of "shards" (one of these or a list) and "weight" (how often its shards come in a pass over the data; of a
      fraction a random share, drawn in each pass);
    - a list of these.

    A text that names an existing file is that file, whatever it begins with. A pathlib.Path is never a URL or command.
    name: name of the argument in errors. Raises InputError if `what` does not exist or is none of these.
    """
    sources = list(_sources(what, name))
    if not sources:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    return _named(sources)


def expand(what: Any, name: str = "shards") -> list[str]:
    """Returns the paths of local tars. Raises InputError as `sources_of` does, and for URLs and commands."""
    urls = [source.url for source in sources_of(what, name)]
    for url in urls:
        if isinstance(url, Address):
            raise InputError(f"{name}: expected local tars, got {str(url)!r}")
    return urls


def in_words(sources: Iterable[Any]) -> str:
    """Names sources in messages: "'a.tar' (and 3 more files)"."""
    first, *more = dict.fromkeys(source.url for source in sources)
    return repr(str(first)) + (f" (and {len(more)} more file{'s' * (len(more) > 1)})" if more else "")


def _sources(what: Any, name: str) -> Iterator[Source]:
    if isinstance(what, (str, os.PathLike)):
        for url in _urls(what, name):
            yield Source(url)
    elif isinstance(what, Mapping):
        yield from _weighted(what, name)
    elif isinstance(what, Iterable):
        for entry in what:
            yield from _sources(entry, name)
    else:
        raise InputError(f"{name}: expected {_FORMS}, got {what!r}")


def _weighted(what: Mapping[str, Any], name: str) -> Iterator[Source]:
    if "shards" not in what or not what.keys() <= {"shards", "weight"}:
        raise InputError(f"{name}: expected a mapping with shards and, if need be, weight, got {dict(what)}")
    weight = what.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise InputError(f"{name}: expected a weight above 0, got {weight!r}")
    for source in _sources(what["shards"], name):
        yield replace(source, weight=source.weight * weight)


def _urls(text: str | os.PathLike, name: str, list_folder: str | None = None) -> Iterator[str]:
    """Yields the tars of one path, pattern, URL or command. list_folder: folder of the list file that names it, if any."""
    what = os.fspath(text)
    path = os.path.expanduser(what) if list_folder is None else os.path.join(list_folder, os.path.expanduser(what))
    if os.path.exists(path):
        yield from _file(path, name, listed=list_folder is not None)
    elif isinstance(text, str) and what.startswith(("pipe:", "http://", "https://")):
        if list_folder is not None and what.startswith("pipe:"):
            raise InputError(
                f"{name}: expected a path or URL in a list file, got {what!r}; commands are taken from the command line or "
                "the config alone"
            )
        yield from map(Address, _expanded(what, name, escape=False))
    elif "://" in what:
        raise InputError(
            f"{name}: expected {_FORMS}, got {what!r}; of other places the output of a command may be read, e.g. "
            "'pipe:aws s3 cp s3://BUCKET/NAME.tar -'"
        )
    else:
        for match in _matches(path, name):
            yield from _file(match, name, listed=list_folder is not None)


def _matches(pattern: str, name: str) -> Iterator[str]:
    for path in _expanded(pattern, name):
        if os.path.exists(path):
            yield path
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path))
            if not matches:
                raise InputError(f"{name}: expected files, got the pattern {path!r}, which matches none")
            yield from matches
        else:
            raise InputError(f"{name}: expected a file, got {path!r}, which does not exist")


def _file(path: str, name: str, *, listed: bool) -> Iterator[str]:
    lower = path.lower()
    if os.path.isdir(path):
        raise InputError(
            f"{name}: expected tars, got the folder {path!r}; name its tars by {os.path.join(path, '*.tar')!r}, or make "
            "shards of a folder of images by `simplclip data pack`"
        )
    if lower.endswith((".csv", ".tsv", ".parquet", ".json", ".jsonl")):
        raise InputError(f"{name}: expected tars, got {path!r}; make shards of it by `simplclip data pack`")
    if lower.endswith(_COMPRESSED):
        raise InputError(f"{name}: expected tars that are not compressed, got {path!r}; unpack it, e.g. by gunzip")
    if not lower.endswith(".txt"):
        yield path
    elif listed:
        raise InputError(f"{name}: expected no list file in a list file, got {path!r}")
    else:
        yield from _list_file(path, name)


def _list_file(path: str, name: str) -> Iterator[str]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise InputError(f"{name}: expected a list file with one path or URL a line, got {path!r}, which has none")
    for number, line in lines:
        yield from _urls(line, f"{name}: line {number} of {path!r}", os.path.dirname(path))


def _expanded(pattern: str, name: str, *, escape: bool = True) -> list[str]:
    """Expands braces. webdataset's `expand_urls` would also split at '::', as in http://[::1]/, and substitute variables."""
    if "{" not in pattern and "}" not in pattern:
        return [pattern]
    shown = repr(pattern if len(pattern) <= 200 else pattern[:200] + "...")
    try:
        if _count(pattern) > MOST:
            raise InputError(f"{name}: expected a pattern of at most {MOST:,} names, got {shown} of more")
        return list(braceexpand.braceexpand(pattern, escape))
    except InputError:
        raise
    except (ValueError, RecursionError):  # braces that do not match, or a number of 5,000 digits
        raise InputError(f"{name}: expected a brace pattern, got {shown}") from None


def _count(pattern: str) -> int:
    """Bounds the number of names of a pattern, since braceexpand holds all of them in memory."""
    count = 1
    while "{" in pattern and count <= MOST:
        inner = re.search(r"\{([^{}]*)\}", pattern)
        if inner is None:
            break
        numbers = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?", inner[1])
        letters = 58 if re.fullmatch(r"\w\.\.\w(\.\.-?\d+)?", inner[1]) else 1
        count *= abs(int(numbers[2]) - int(numbers[1])) + 1 if numbers else max(letters, inner[1].count(",") + 1)
        pattern = pattern[: inner.start()] + pattern[inner.end() :]
    return count


def _named(sources: list[Source]) -> list[Source]:
    """Names each source by its file. Files of one name, such as a/000.tar and b/000.tar, get names with their folders.

    The samples of such files may have the same keys; the names tell them apart.
    """
    urls: dict[str, set[str]] = {}
    for source in sources:
        urls.setdefault(name_of(source.url), set()).add(source.url)
    names = {url: name for name, several in urls.items() for url in several}
    for several in urls.values():
        if len(several) > 1:
            tails = [{url: "/".join(PurePath(url).parts[-depth:]) for url in several} for depth in (2, 3, 4, 5)]
            names |= next((tail for tail in tails if len(set(tail.values())) == len(several)), {url: url for url in several})
    return [replace(source, name=str(names[source.url])) for source in sources]
