"""Turns the data that a user names into parts, each of which one worker reads in order. All commands use this module.

shards.py       tars
addresses.py    tars that are fetched, or made by a command
tables.py       CSV, TSV, parquet
annotations.py  JSON of Karpathy's and COCO's kind
folders.py      folders of images, with texts or by class, and clip-benchmark's layout
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import PurePath
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data.addresses import Address, is_address, name_of, names_address
from simplclip.data.annotations import SUFFIX, Annotated, annotated
from simplclip.data.braces import expanded
from simplclip.data.folders import IMAGES, clip_benchmark, folder, images
from simplclip.data.parts import Part, Tar
from simplclip.data.shards import ShardError, count_samples
from simplclip.data.sidecars import Folders
from simplclip.data.sidecars import check as check_shards
from simplclip.data.tables import SUFFIXES, Options, Rows, table

_OPTIONS = [field.name for field in fields(Options) if field.name != "split"]
_KEYS = ("shards", "weight", *_OPTIONS)
_PLAIN = Options()
_FORMS = "a path, an http(s) URL, pipe:COMMAND, a mapping with shards and weight, or a list of them"


def parts_of(what: Any, name: str = "shards", options: Options = _PLAIN) -> list[Part]:
    """Returns the parts of `what`, which a user names:

    - a tar, plain or compressed, by path, brace pattern (train-{000000..000003}.tar) or glob; patterns may also match the
      following files and folders;
    - the URL of tars, http:// or https://, with brace patterns, or pipe:COMMAND, whose output is a tar;
    - a list file (.txt) with one of these, but no pipe, in each line; its paths are relative to its folder;
    - a table (.csv, .tsv, .parquet) with a column of image paths and one of captions, see `tables.Options`;
    - a JSON file of Karpathy's or COCO's kind, or a list of objects; FILE.json#SPLIT names one of its splits;
    - a folder of images with KEY.txt or KEY.json beside KEY.jpg, also in its folders; if there are no such texts, the folders
      in it are classes;
    - a folder in clip-benchmark's layout; FOLDER#SPLIT names one of its splits;
    - image files by path or glob, or a list file of them, which have no captions;
    - a mapping of "shards" (one of these or a list), "weight" (how often an epoch has each sample; of a fraction a random
      share, drawn in each epoch), and for tables and JSON "image_key", "caption_key", "separator", "images";
    - a list of these, or of parts.

    A text that names an existing file is that file, whatever it begins with. Other texts may be URLs and commands; a
    pathlib.Path never is one.

    name: name of the argument in errors. Raises InputError if `what` does not exist or is none of these.
    """
    parts = list(_parts(what, name, options))
    if not parts:
        raise InputError(f"{name}: expected at least one path or pattern, got an empty list")
    return _titled(parts)


def expand(shards: Any, name: str = "shards") -> list[str]:
    """Returns the paths of local tars. Raises InputError as `parts_of` does, and for data other than local tars."""
    parts = parts_of(shards, name)
    for part in parts:
        if not part.is_local_tar:
            raise InputError(f"{name}: expected local tars, got {part.url!r}")
    return [part.url for part in parts]


def check_sidecars(parts: list[Part], folders: Folders) -> None:
    """Raises InputError if parts have no place for sidecars, and the errors of `sidecars.check`."""
    for part in parts if folders else ():
        if not isinstance(part, Tar):
            raise InputError(f"sidecars: expected tars, beside which they lie, got {part.url!r}")
    check_shards([part.url for part in parts], folders)


def count(parts: list[Part]) -> list[int] | None:
    """Counts the samples of each part, including broken ones; None if streams, or too many bytes, would have to be read."""
    tars = [part.url for part in parts if part.count is None]
    found = None if any(map(is_address, tars)) else count_samples(tars)
    if found is None:
        return None
    of_tars = iter(found)
    return [next(of_tars) if part.count is None else part.count for part in parts]


def epoch_size(parts: list[Part]) -> int | None:
    """Counts the samples of an epoch, by the weights of their parts; None as for `count`, or if a part is unreadable."""
    try:
        counts = count(parts)
    except (ShardError, OSError):
        return None
    return None if counts is None else int(sum(number * part.weight for number, part in zip(counts, parts)))


def matches(pattern: str, name: str) -> list[str]:
    """Returns the existing files and folders of a path, brace expression or glob. name: name of the argument in errors."""
    pattern = os.path.expanduser(pattern)
    found: list[str] = []
    for path in [pattern] if os.path.exists(pattern) else expanded(pattern, name):
        if os.path.exists(path):
            found.append(path)
        elif glob.has_magic(path):
            several = sorted(glob.glob(path))
            if not several:
                raise InputError(f"{name}: expected files, got the pattern {path!r}, which matches none")
            found += several
        else:
            raise InputError(f"{name}: expected a file, got {path!r}, which does not exist")
    return found


def _parts(what: Any, name: str, options: Options) -> Iterator[Part]:
    if isinstance(what, Part):
        yield what
    elif isinstance(what, (str, os.PathLike)):
        yield from _named(what, name, options)
    elif isinstance(what, Mapping):
        yield from _weighted(what, name, options)
    elif isinstance(what, Iterable):
        for one in what:
            yield from _parts(one, name, options)
    else:
        raise InputError(f"{name}: expected {_FORMS}, got {what!r}")


def _weighted(what: Mapping[str, Any], name: str, options: Options) -> Iterator[Part]:
    given = {key: value for key, value in what.items() if value is not None}
    if not given.keys() <= set(_KEYS) or "shards" not in given:
        raise InputError(f"{name}: expected a mapping with shards and, if need be, {', '.join(_KEYS[1:])}, got {dict(what)}")
    weight = given.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise InputError(f"{name}: expected a weight above 0, got {weight!r}")
    mine = {key: given[key] for key in _OPTIONS if key in given}
    parts = list(_parts(given["shards"], name, replace(options, **mine)))
    if mine and not any(isinstance(part, Rows | Annotated) for part in parts):
        raise InputError(
            f"{name}: expected a table or JSON, since {', '.join(_OPTIONS)} are of these, got {given['shards']!r}"
        )
    yield from (replace(part, weight=part.weight * weight) for part in parts)


def _typed_address(text: str | os.PathLike, listed: str | None = None) -> bool:
    """Whether a text is a URL or a command, and not the name of an existing file. listed: as for `_named`."""
    return isinstance(text, str) and names_address(text) and not os.path.exists(os.path.join(listed or "", text))


def addresses(what: Any) -> Iterator[str]:
    """Yields the URLs and commands in `what`, which a user named, and in its list files."""
    if isinstance(what, Mapping):
        yield from addresses(what.get("shards", ()))
    elif not isinstance(what, (str, os.PathLike)):
        for one in what:
            yield from addresses(one)
    elif _typed_address(what):
        yield str(what)
    else:
        try:
            found = matches(os.fspath(what), "shards")
        except InputError:  # no file that could be read
            return
        for path in found:
            if path.lower().endswith(".txt") and os.path.isfile(path):
                yield from (line for _, line in _lines(path) if _typed_address(line, os.path.dirname(path)))


def _named(text: str | os.PathLike, name: str, options: Options, listed: str | None = None) -> Iterator[Part]:
    """Yields the parts of a path, pattern, URL or command. listed: folder of the list file that names it, if one does."""
    what = os.fspath(text)
    if _typed_address(text, listed):
        if listed is not None and what.startswith("pipe:"):
            raise InputError(
                f"{name}: expected a path or URL in a list file, got {what!r}; commands are taken from the command line or "
                "the config alone"
            )
        yield from (Tar(url=Address(url)) for url in expanded(what, name, escape=False))
        return
    if "://" in what and not os.path.exists(os.path.join(listed or "", what)):
        raise InputError(
            f"{name}: expected {_FORMS}, got {what!r}; of other places the output of a command may be read, e.g. "
            "'pipe:aws s3 cp s3://BUCKET/NAME.tar -'"
        )
    place = what if listed is None else os.path.join(listed, os.path.expanduser(what))
    before, sharp, split = place.rpartition("#")
    if sharp and not os.path.exists(place) and (before.endswith(SUFFIX) or os.path.isdir(os.path.expanduser(before))):
        place, options = before, replace(options, split=split)
    found = matches(place, name)
    if _are_images(found):
        yield from images(found)
        return
    for path in found:
        low = path.lower()
        if os.path.isdir(path):
            yield from _of_folder(path, options, name, bool(sharp) and place == before)
        elif low.endswith(SUFFIXES):
            yield from table(path, options, name)
        elif low.endswith(SUFFIX):
            yield from annotated(path, options, name)
        elif not low.endswith(".txt"):
            yield Tar(url=path)
        elif listed is None:
            yield from _listed(path, name, options)
        else:
            raise InputError(f"{name}: expected no list file in a list file, got {path!r}")


def _of_folder(path: str, options: Options, name: str, split: bool) -> list[Part]:
    """Returns the parts of a folder. split: whether the user named a split."""
    path = path.rstrip(os.sep) or path
    found = clip_benchmark(path, options.split, name)
    if found is None and split:
        raise InputError(f"{name}: expected a split of a data set, got {path!r}, which has no {options.split}/nshards.txt")
    return folder(path, name) if found is None else found


def _listed(path: str, name: str, options: Options) -> Iterator[Part]:
    lines = _lines(path)
    if not lines:
        raise InputError(f"{name}: expected a list file with one path or URL a line, got {path!r}, which has none")
    place, names = os.path.dirname(path), [line for _, line in lines]
    if _are_images(names) and not any(_typed_address(line, place) for line in names):
        yield from images([os.path.join(place, os.path.expanduser(line)) for line in names])
        return
    for number, line in lines:
        yield from _named(line, f"{name}: line {number} of {path!r}", options, place)


def _are_images(paths: list[str]) -> bool:
    return all(path.lower().endswith(IMAGES) for path in paths)


def _lines(path: str) -> list[tuple[int, str]]:
    """Reads the lines of a list file, with their numbers, without empty lines and comments."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1)]
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _titled(parts: list[Part]) -> list[Part]:
    """Gives parts of different files with one name, such as a/000.tar and b/000.tar, titles that name their folders too.

    The samples of such files may have the same keys; the titles tell them apart.
    """
    urls: dict[str, set[str]] = {}
    for part in parts:
        urls.setdefault(name_of(part.url), set()).add(part.url)
    titles: dict[str, str] = {}
    for several in urls.values():
        if len(several) > 1:
            tails = [{url: "/".join(PurePath(url).parts[-depth:]) for url in several} for depth in (2, 3, 4, 5)]
            distinct = next((tail for tail in tails if len(set(tail.values())) == len(several)), {})
            titles |= {url: distinct.get(url, url) for url in several}
    return [replace(part, title=titles[part.url]) if part.url in titles else part for part in parts]
