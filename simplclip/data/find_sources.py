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

_FORMS = "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"
_NO_TAR = (".csv", ".tsv", ".parquet", ".json", ".gz", ".tgz", ".bz2", ".xz", ".zst")
_MOST = 1_000_000  # names of a pattern, which may come with a run from elsewhere
_BRACES = 20  # pairs of braces in a pattern
_PAIR = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})(?:\.\.(\d{1,18}))?|([^{}]*,[^{}]*))\}")


class Address(str):
    """An http(s) URL, which is fetched, or pipe:COMMAND, which is run; the path of a file stays a
    plain str.

    Only `sources_of` makes addresses, from what a user typed.
    """


@dataclass(frozen=True)
class Source:
    """A tar. weight: how often it comes in a pass over the data. name: in messages and seeds; it
    stays if the data move.
    """

    url: str
    weight: float = 1.0
    name: str = ""


def name_of(url: str) -> str:
    """Returns the file name of a path or URL, or the last tar that a command names."""
    return os.path.basename(_path_of(url))


def _path_of(url: str) -> str:
    """Returns the path whose end names a tar.

    The query of a URL, which may be a signature that changes, is left out.
    """
    if not isinstance(url, Address):
        return url
    if url.startswith("http"):
        return urlsplit(url).netloc + urlsplit(url).path
    return [url, *re.findall(r"\S+\.tar\b", url)][-1]


def _ends(urls: Iterable[str]) -> dict[str, str]:
    """Returns the names of tars: the shortest ends of their paths that differ, which stay if the
    data move.
    """
    names = {url: name_of(url) for url in urls}
    same_name: dict[str, list[str]] = defaultdict(list)
    for url, name in names.items():
        same_name[name].append(url)
    for urls in filter(lambda urls: len(urls) > 1, same_name.values()):
        whole = [url if isinstance(url, Address) else os.path.abspath(url) for url in urls]
        paths = [_path_of(url).split("/") for url in whole]
        ends = (
            ["/".join(path[-length:]) for path in paths]
            for length in range(2, max(map(len, paths)) + 1)
        )
        names |= zip(urls, next((end for end in ends if len({*end}) == len({*whole})), whole))
    return names


def sources_of(what: Any, name: str = "shards") -> list[Source]:
    """Returns the tars of `what`, which a user names:

    - a tar by path, brace pattern (train-{000000..000003}.tar) or glob;
    - the URL of tars, http:// or https://, with brace patterns, or pipe:COMMAND, whose output is a
      tar;
    - a mapping of "shards" (one of these or a list) and "weight" (how often its shards come in a
      pass over the data; of a fraction a random share, drawn in each pass);
    - a list of these.

    A text that names an existing file is that file, whatever it begins with. A pathlib.Path is
    never a URL or command. name: name of the argument in errors. Raises InputError if `what` does
    not exist or is none of these.
    """
    sources = list(_sources(what, name))
    if not sources:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    # samples of a/000.tar and b/000.tar may have the same keys
    names = _ends(source.url for source in sources)
    return [replace(source, name=names[source.url]) for source in sources]


def in_words(sources: Iterable[Any]) -> str:
    """Names sources in messages: "'a.tar' (and 3 more files)"."""
    first, *more = dict.fromkeys(source.url for source in sources)
    return repr(str(first)) + (
        f" (and {len(more)} more file{'s' * (len(more) > 1)})" if more else ""
    )


def _sources(what: Any, name: str) -> Iterator[Source]:
    if isinstance(what, (str, os.PathLike)):
        yield from map(Source, _urls(what, name))
    elif isinstance(what, Mapping):
        if "shards" not in what or not what.keys() <= {"shards", "weight"}:
            raise InputError(
                f"{name}: expected a mapping with shards and, if need be, weight, got {dict(what)}"
            )
        weight = what.get("weight", 1.0)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, (int, float))
            or not 0 < weight < math.inf
        ):
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
        patterns = [path]
    elif isinstance(text, str) and what.startswith(("pipe:", "http://", "https://")):
        yield from map(Address, _expanded(what, name))
        return
    elif "://" in what:
        hint = f"of other places name a command, e.g. 'pipe:aws s3 cp {what} -'"
        raise InputError(f"{name}: expected {_FORMS}, got {what!r}; {hint}")
    else:
        patterns = _expanded(path, name)
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        if not paths:
            reason = "which matches none" if glob.has_magic(pattern) else "which does not exist"
            raise InputError(f"{name}: expected files, got {pattern[:200]!r}, {reason}")
        for tar in paths:
            if os.path.isdir(tar) or tar.lower().endswith(_NO_TAR):
                hint = (
                    "`simplclip data pack` makes them of a table, a JSON file or a folder of images"
                )
                raise InputError(f"{name}: expected tars, not compressed, got {tar!r}; {hint}")
            yield tar


def _expanded(pattern: str, name: str) -> list[str]:
    """Expands braces; others, such as awk's, stay. braceexpand, which webdataset uses, would hang
    at very many names.
    """
    names = list(islice(_names(pattern), _MOST + 1)) if pattern.count("{") <= _BRACES else []
    if not 0 < len(names) <= _MOST:
        raise InputError(
            f"{name}: expected a brace pattern of at most {_MOST:,} names, got {pattern[:200]!r}"
        )
    return list(dict.fromkeys(names))


def _names(pattern: str) -> Iterator[str]:
    """Yields the names of a pattern; of braces in braces it expands the inner ones first, which may
    yield a name twice.
    """
    braces = _PAIR.search(pattern)
    if not braces:
        yield pattern
        return
    first, last, step, listed = braces.groups()
    parts: Iterable[str]
    if listed is None:
        padded = any(len(end) > 1 and end[0] == "0" for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        start, end = int(first), int(last)
        sign = 1 if start <= end else -1
        parts = (
            f"{number:0{width}}"
            for number in range(start, end + sign, sign * max(1, int(step or 1)))
        )
    else:
        parts = listed.split(",")
    for part in parts:
        yield from _names(pattern[: braces.start()] + part + pattern[braces.end() :])
