"""The tars that a user names: by path, pattern, URL or command, each with a weight."""

from __future__ import annotations

import glob
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from simplclip.common.errors import InputError
from simplclip.data.readers import ENDINGS

_EXPECTED = (
    "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"
)
_NO_TAR = (*ENDINGS, ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
_MAX_NAMES = 1_000_000  # of a pattern, which may come with a run from elsewhere
_MAX_BRACES = 20  # pairs of braces in a pattern
_PAIR = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?|([^{}]*,[^{}]*))\}")


class Address(str):
    """An http(s) URL, which is fetched, or pipe:COMMAND, which is run; the path of a file stays a
    plain str.

    Only `sources_of` makes addresses, from what a user typed.
    """


@dataclass(frozen=True)
class Source:
    """A tar."""

    url: str
    weight: float = 1.0  # how often it comes in an epoch
    name: str = ""  # in messages and seeds; it stays if the data move


def name_of(url: str) -> str:
    """Returns the file name of a path or URL, or of the last tar that a pipe:COMMAND names."""
    return os.path.basename(_path_of(url))


def _path_of(url: str) -> str:
    """Returns the path whose end names a tar: of a command its last word up to .tar."""
    if not isinstance(url, Address):
        return url
    if url.startswith("http"):
        return urlsplit(url).netloc + urlsplit(url).path
    return [url, *re.findall(r"\S+\.tar\b", url)][-1]


def _different_names(urls: Iterable[str]) -> dict[str, str]:
    """Returns {url: name}: its file name, or the end of its path that tells it from others."""
    names = {url: name_of(url) for url in urls}
    urls_by_name: dict[str, list[str]] = defaultdict(list)
    for url, name in names.items():
        urls_by_name[name].append(url)
    for same_name in urls_by_name.values():
        if len(same_name) > 1:
            names |= zip(same_name, _different_ends(same_name))
    return names


def _different_ends(urls: list[str]) -> list[str]:
    """Returns the shortest ends of paths or URLs, of one length, that differ; else all of each."""
    whole = [url if isinstance(url, Address) else os.path.abspath(url) for url in urls]
    paths = [_path_of(url).split("/") for url in whole]
    longest = max(map(len, paths))
    for length in range(2, longest + 1):
        ends = ["/".join(path[-length:]) for path in paths]
        if len(set(ends)) == len(set(whole)):
            return ends
    return whole


def sources_of(shards: Any, name: str = "shards") -> list[Source]:
    """Returns the tars that a user names, in order, each with its weight and a name of its own.

    shards:

    - a tar by path, brace pattern (train-{000000..000003}.tar) or glob;
    - the URL of tars, http:// or https://, with brace patterns, or pipe:COMMAND, whose output is a
      tar;
    - a mapping of "shards" (one of these or a list) and "weight" (how often its shards come in an
      epoch; of a fraction a random share, drawn in each epoch);
    - a list of these.

    A text that names an existing file is that file, whatever it begins with. A pathlib.Path is
    never a URL or command. A tar that is named twice comes twice. Files are looked up, but not
    opened; nothing is fetched or run.

    name: name of the argument in errors. Raises InputError if `shards` do not exist or are none of
    these.
    """
    sources = list(_sources(shards, name))
    if not sources:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    # samples of a/000.tar and b/000.tar may have the same keys
    names = _different_names(source.url for source in sources)
    return [replace(source, name=names[source.url]) for source in sources]


def in_words(sources: Iterable[Source]) -> str:
    """Returns the names of sources for a message: "'a.tar' (and 3 more files)"."""
    first, *more = dict.fromkeys(source.url for source in sources)
    if not more:
        return repr(str(first))
    file_word = "file" if len(more) == 1 else "files"
    return f"{str(first)!r} (and {len(more)} more {file_word})"


def _sources(shards: Any, name: str) -> Iterator[Source]:
    """Yields the sources of an argument of `sources_of`, or of a part of it, without names."""
    if isinstance(shards, (str, os.PathLike)):
        yield from map(Source, _urls(shards, name))
    elif isinstance(shards, Mapping):
        if "shards" not in shards or not shards.keys() <= {"shards", "weight"}:
            expected = "a mapping with shards and, if need be, weight"
            raise InputError(f"{name}: expected {expected}, got {dict(shards)}")
        weight = shards.get("weight", 1.0)
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            raise InputError(f"{name}: expected a weight above 0, got {weight!r}")
        for source in _sources(shards["shards"], name):
            yield replace(source, weight=source.weight * weight)
    elif isinstance(shards, Iterable):
        for entry in shards:
            yield from _sources(entry, name)
    else:
        raise InputError(f"{name}: expected {_EXPECTED}, got {shards!r}")


def _urls(shards: str | os.PathLike, name: str) -> Iterator[str]:
    """Yields what a text or path names: existing files (str), or URLs or commands (Address)."""
    text = os.fspath(shards)
    path = os.path.expanduser(text)
    if os.path.exists(path):
        patterns = [path]
    elif isinstance(shards, str) and text.startswith(("pipe:", "http://", "https://")):
        yield from map(Address, _expanded(text, name))
        return
    elif "://" in text:
        hint = f"of other places name a command, e.g. 'pipe:aws s3 cp {text} -'"
        raise InputError(f"{name}: expected {_EXPECTED}, got {text!r}; {hint}")
    else:
        patterns = _expanded(path, name)
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not paths:
            reason = "which matches none" if glob.has_magic(pattern) else "which does not exist"
            raise InputError(f"{name}: expected files, got {pattern[:200]!r}, {reason}")
        for tar in paths:
            if os.path.isdir(tar) or tar.lower().endswith(_NO_TAR):
                raise InputError(
                    f"{name}: expected tars, not compressed, got {tar!r}; `simplclip data pack` "
                    "makes them of a table, a JSON file or a folder of images"
                )
            yield tar


def _expanded(pattern: str, name: str) -> list[str]:
    """Returns the names that a pattern with {000..003} or {a,b} stands for; other braces stay."""
    names = []
    if pattern.count("{") <= _MAX_BRACES:  # braceexpand, which webdataset uses, would hang
        names = list(islice(_expansions(pattern), _MAX_NAMES + 1))
    if not 0 < len(names) <= _MAX_NAMES:
        expected = f"a brace pattern of at most {_MAX_NAMES:,} names"
        raise InputError(f"{name}: expected {expected}, got {pattern[:200]!r}")
    return list(dict.fromkeys(names))


def _expansions(pattern: str) -> Iterator[str]:
    """Yields the names that a brace pattern stands for; with nested braces one may come twice."""
    braces = _PAIR.search(pattern)
    if not braces:
        yield pattern
        return
    first, last, step, listed = braces.groups()
    values = _numbers(first, last, step) if listed is None else listed.split(",")
    for value in values:
        yield from _expansions(pattern[: braces.start()] + value + pattern[braces.end() :])


def _numbers(first: str, last: str, step: str | None) -> Iterable[str]:
    """Returns the numbers of {first..last..step} as texts, padded if one end begins with 0."""
    start, end, stride = int(first), int(last), max(1, int(step or 1))
    numbers = range(start, end + 1, stride)
    if start > end:
        numbers = range(start, end - 1, -stride)
    padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return (f"{number:0{width}}" for number in numbers)
