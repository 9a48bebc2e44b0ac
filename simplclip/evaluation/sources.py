"""Where held-out splits are read from: shards, clip-benchmark's folders, tables of images and captions, folders of classes.

`source` opens what a user names; docs/evaluation.md lists the forms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from simplclip.common.errors import InputError
from simplclip.data import parts_of, tables
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.shards import IMAGE_SUFFIXES, Sample, contents, file_bytes, image_of, not_empty, place_of, record_of
from simplclip.data.sources import Part, read_part
from simplclip.data.stream import Entry, Source
from simplclip.data.streams import is_stream
from simplclip.data.tar import Span
from simplclip.data.text import clean, json_of

TABLES = (".json", ".csv", ".tsv")
# names of columns and keys, by what they hold
_PATHS = ("filepath", "filename", "file_name", "image", "image_path", "path", "file", "image_name")
_CAPTIONS = ("captions", "caption", "sentences", "title", "text", "raw", "comment")


@dataclass
class Tars:
    """Samples of shards, or of whatever else `data.parts_of` takes.

    The captions are the json's, else the lines of txt; the label is that of cls, else the json's.

    limit: captions of a sample that count; 0: all. None: all lines of txt, but of a json the first, since the others may be
    other phrasings for training, or synthetic.
    bare: images without caption and label count too, also if their caption is broken.
    """

    parts: list[Part]
    limit: int | None = None
    classes: list[str] | None = None
    templates: list[str] | None = None
    bare: bool = False

    def __str__(self) -> str:
        return f"{len(self.parts)} shard(s), the first {self.parts[0].url!r},"

    @property
    def streamed(self) -> bool:
        return any(is_stream(part.url) for part in self.parts)

    def items(self, skipped: Skipped) -> Iterator[Sample]:
        return (sample for part in self.parts for sample in read_part(part, skipped, every=True))

    def place(self, item: Sample) -> str:
        return place_of(item)

    def open(self, item: Sample) -> Entry:
        url, image = item["__url__"], image_of(item)
        item = contents({name: item[name] for name in ("__key__", *IMAGE_SUFFIXES, "json", "txt", "cls") if name in item})
        try:
            captions, group, label = self._described(item)
        except BrokenSample:
            if not self.bare:
                raise
            captions, group, label = [], None, None
        encoded = image_of(item)
        if encoded is None:
            raise BrokenSample("missing image", "")
        entry = Entry(item["__key__"], encoded, captions, group, label)
        if isinstance(image, Span) and image.file != url:
            entry.image_path = os.path.abspath(image.file)
        else:
            entry.shard = url if is_stream(url) else os.path.abspath(url)
        return entry

    def _described(self, item: Sample) -> tuple[list[str], str | None, str | int | None]:
        """The captions, group and label of an image. Raises BrokenSample if there is neither caption nor label."""
        record = record_of(item)
        group, label = record.get("group"), record.get("label")
        label = _number(item["cls"]) if "cls" in item else label if label is None else clean(str(label))
        captions = self._captions(item, record)
        if not captions and label is None:
            given = "txt" in item or {"caption", "captions"} & record.keys()
            raise BrokenSample("empty caption" if given else "missing caption", "")
        return captions, None if group is None else str(group), label

    def _captions(self, item: Sample, record: dict[str, Any]) -> list[str]:
        several = record.get("captions")
        texts = not_empty([*(several if isinstance(several, list) else ()), record.get("caption")])
        if texts:
            return texts[: self.limit or (None if self.limit == 0 else 1)]
        try:
            return not_empty(item.get("txt", b"").decode("utf-8-sig").splitlines())[: self.limit or None]
        except UnicodeDecodeError as error:
            raise BrokenSample("caption not UTF-8", error) from None


@dataclass
class Table:
    """Images with one or more captions, read from a JSON or CSV file, see `table`."""

    name: str
    rows: list[tuple[str, list[str]]]  # path, captions
    images: Path
    classes: list[str] | None = None
    templates: list[str] | None = None
    broken: Skipped = field(default_factory=Skipped)  # rows that could not be read
    bare: bool = False  # images without captions count too

    def __str__(self) -> str:
        return f"{self.name} with images in {self.images}"

    def items(self, skipped: Skipped) -> Iterator[tuple[str, list[str]]]:
        skipped.merge(self.broken)
        return iter(self.rows)

    def place(self, item: tuple[str, list[str]]) -> str:
        return item[0]

    def open(self, item: tuple[str, list[str]]) -> Entry:
        if not item[1] and not self.bare:
            raise BrokenSample("missing caption", "")
        path = self.images / item[0]
        return Entry(item[0], _file(path), item[1], image_path=os.path.abspath(path))


@dataclass
class Folders:
    """A folder for each class with its images, as torchvision's ImageFolder: the classes are sorted by the folders' names."""

    root: Path
    folders: list[str] = field(default_factory=list)
    classes: list[str] | None = None
    templates: list[str] | None = None

    def __post_init__(self) -> None:
        self.folders = self.folders or sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        self.classes = self.classes or [clean(name.replace("_", " ")) for name in self.folders]

    def __str__(self) -> str:
        return f"the folder {self.root}"

    def items(self, skipped: Skipped) -> Iterator[tuple[int, str]]:
        for number, name in enumerate(self.folders):
            for file in sorted(os.listdir(self.root / name)):
                if file.lower().endswith(tables.IMAGES):
                    yield number, os.path.join(name, file)

    def place(self, item: tuple[int, str]) -> str:
        return item[1]

    def open(self, item: tuple[int, str]) -> Entry:
        path = self.root / item[1]
        return Entry(item[1], _file(path), [], None, item[0], image_path=os.path.abspath(path))


def _file(path: Path) -> bytes:
    try:
        return file_bytes(path)
    except OSError as error:
        raise BrokenSample("missing image", error) from None


def source(what: Any, *, captions: int | None = None, images: str | os.PathLike | None = None) -> Source:
    """The source that `what` names.

    shards                 what `data.parts_of` takes: paths, globs, brace patterns, URLs, a list of them
    FOLDER, FOLDER#SPLIT   a data set in clip-benchmark's layout: FOLDER/SPLIT/nshards.txt, FOLDER/classnames.txt ...; or
                           FOLDER/CLASS/IMAGE for each class
    FILE, FILE#SPLIT       .json: Karpathy's, COCO's, or a list of objects; .csv, .tsv: columns of paths and captions

    SPLIT: test by default. captions: the first captions of a sample that count, 0 for all; None for all, but one of a json in
    shards. images: folder of the images that a file names, by default its own.
    Raises InputError if nothing is found there, or a file has other contents.
    """
    if not isinstance(what, (str, os.PathLike)):
        return Tars(parts_of(what), captions)
    path, _, split = os.path.expanduser(os.fspath(what)).partition("#") if not os.path.exists(what) else (str(what), "", "")
    found: Source
    if path.endswith(TABLES):
        found = table(Path(path), split or "test", Path(images) if images else Path(path).parent, captions)
    elif os.path.isdir(path):
        found = _folder(Path(path), split or "test", captions)
    else:
        found = Tars(parts_of(what), captions)
    return found


def _folder(folder: Path, split: str, captions: int | None) -> Source:
    for root in (folder, folder.parent):
        shards = (folder / split if root == folder else folder) / "nshards.txt"
        if shards.is_file():
            number = shards.read_text(errors="replace").strip()
            if not number.isdecimal() or len(number) > 9 or not int(number):
                raise InputError(f"{shards}: expected the number of shards, got {number[:40]!r}")
            kind = _read(root / "dataset_type.txt") or ["classification"]
            if kind[0].lower() not in ("retrieval", "classification"):
                raise InputError(f"{root / 'dataset_type.txt'}: expected retrieval or classification, got {kind[0]!r}")
            parts = parts_of(shards.with_name(f"{i}.tar") for i in range(int(number)))
            names = "classnames.txt", "zeroshot_classification_templates.txt"
            return Tars(parts, captions, *(_read(root / name) for name in names))
    if sorted(folder.glob("*.tar")):
        raise InputError(f"data: expected shards, got the folder {str(folder)!r}: try its *.tar")
    found = Folders(folder)
    if not found.folders or next(found.items(Skipped()), None) is None:
        raise InputError(
            f"data: expected a folder with {split}/nshards.txt (clip-benchmark's layout) or with a folder of images for each "
            f"class, got {str(folder)!r}"
        )
    return found


def _read(file: Path) -> list[str] | None:
    if not file.is_file():
        return None
    try:
        return [clean(line) for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8, got {error}") from None


def table(file: Path, split: str, images: Path, captions: int | None = None) -> Table:
    """The images of a JSON or CSV file, in its order; rows of the same image are its captions. See `source`."""
    if not file.is_file():
        raise InputError(f"data: expected a file, got {str(file)!r}, which does not exist")
    broken = Skipped()
    pairs = _pairs_of_json(file, split) if file.suffix == ".json" else _pairs_of_csv(file, broken)
    rows: dict[str, list[str]] = {}
    for path, texts in pairs:
        rows.setdefault(path, []).extend(not_empty(texts))
    if not rows:
        but = f"; {broken}" if broken.counts else ""
        raise InputError(f"{file}: expected images with captions, got none of the split {split!r}{but}")
    found = [(path, texts[: captions or None]) for path, texts in rows.items()]
    return Table(str(file), found, images, broken=broken)


def _pairs_of_json(file: Path, split: str) -> Iterator[tuple[str, list[Any]]]:
    try:
        found = json_of(file.read_text("utf-8-sig"))
        entries = found["images"] if isinstance(found, dict) else found
        if isinstance(found, dict) and "annotations" in found:  # COCO's captions_val2017.json
            paths = {entry["id"]: _value(entry, _PATHS) for entry in entries}
            yield from ((str(paths[entry["image_id"]]), [entry["caption"]]) for entry in found["annotations"])
            return
        for entry in entries:
            if entry.get("split", split) != split:
                continue
            path = _value(entry, _PATHS)
            if "filepath" in entry and "filename" in entry:  # Karpathy's: a folder and a name
                path = os.path.join(entry["filepath"], entry["filename"])
            if not isinstance(path, str):
                raise TypeError(f"expected a path, got {str(path)[:40]!r}")
            texts = _value(entry, _CAPTIONS)
            texts = texts if isinstance(texts, list) else [texts]
            yield path, [text["raw"] if isinstance(text, dict) else text for text in texts]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: expected images with captions, as in Karpathy's or COCO's JSON, got another one: "
            f"{type(error).__name__}: {error}"
        ) from None


def _pairs_of_csv(file: Path, broken: Skipped) -> Iterator[tuple[str, list[Any]]]:
    for piece in tables.csv_pieces(str(file), tables.Columns(), "data"):
        for _, path, caption in piece.rows(str(file), broken):
            yield path, [caption]


def _value(entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    """What the first of `names` that `entry` has holds; LookupError without one."""
    found = [name for name in names if name in entry]
    if not found:
        raise LookupError(f"none of {', '.join(names)}")
    return entry[found[0]]


def _number(data: bytes) -> int:
    try:
        return int(data)
    except ValueError:
        raise BrokenSample("bad cls", f"expected the number of a class, got {data[:40]!r}") from None


def named(found: Source, names: list[str] | dict[str, str] | None, synsets: list[str] | None) -> Source:
    """The source with the names of its classes replaced by `names`: by number, or by the name of the folder.

    synsets: of `names` in order, if they are ImageNet's; folders with such names, all or some, get the right ones.
    """
    if names is None:
        return found
    if not isinstance(found, Folders):
        return replace(found, classes=list(names.values()) if isinstance(names, dict) else list(names))
    if synsets and set(found.folders) <= set(synsets):
        names = dict(zip(synsets, names))
    if not isinstance(names, dict):
        if len(names) != len(found.folders):
            raise InputError(
                f"classnames: expected a name for each of the {len(found.folders)} folders of {found.root}, got {len(names)}"
            )
        names = dict(zip(found.folders, names))
    if missing := [name for name in found.folders if name not in names]:
        raise InputError(f"classnames: expected a name for each folder of {found.root}, got none for {missing[0]!r}")
    return replace(found, classes=[names[name] for name in found.folders])
