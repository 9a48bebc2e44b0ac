"""Builds two domains of drawings with the same names: python domains.py --out data/emoji-domains

Nothing is downloaded, see sources.py. The old domain is Twemoji's flat, coloured drawings. The new
one is the black lines of OpenMoji's drawings, without their colours. Emoji whose lines are those of
another one, as flags, are left out. As shards, with the captions of build.py:

    old-train, old-valid, old-test    Twemoji's drawings
    new-train, new-valid, new-test    OpenMoji's lines

Both domains have the same emoji in a part, drawn by SEED, and no emoji is in two parts.
"""

import argparse
import json
import random
import shutil
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from PIL import Image
from shards import LICENSES, Drawing, write_split
from sources import Concept, FileVendor, concepts, square, vendors

SEED = 0
DOMAINS = {"old": "twemoji", "new": "openmoji"}
PARTS = {"test": 300, "valid": 150}  # emoji; the others are for training
CHANGED = "\nThe splits new-* are the black lines of OpenMoji's drawings, without their colours.\n"


class LineVendor:
    """The black lines of OpenMoji's drawings."""

    def __init__(self, openmoji: FileVendor) -> None:
        self.openmoji = openmoji

    def draw(self, concept: Concept) -> Image.Image:
        drawing = ET.fromstring(self.openmoji.files[concept.key].read_bytes())
        for layer in list(drawing):
            if not layer.get("id", "").startswith("line"):
                drawing.remove(layer)
        return self.openmoji.decode(ET.tostring(drawing))


def distinct(every: list[Concept], lines: LineVendor) -> list[Concept]:
    """Returns the concepts of which no other one has the same lines."""
    by_pixels = defaultdict(list)
    for concept in every:
        by_pixels[square(lines.draw(concept)).tobytes()].append(concept)
    return [same[0] for same in by_pixels.values() if len(same) == 1]


def build(out: Path) -> dict[str, int]:
    """Writes the shards to the folder `out`, unless they are there; returns samples by split."""
    meta = out / "meta.json"
    if meta.exists():
        return json.loads(meta.read_text())["samples"]
    lines = LineVendor(vendors()["openmoji"])
    drawers = {"twemoji": vendors()["twemoji"], "openmoji": lines}
    kept = distinct(concepts(), lines)
    random.Random(SEED).shuffle(kept)
    work = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    samples = {}
    for part, count in (PARTS | {"train": len(kept)}).items():
        drawn, kept = kept[:count], kept[count:]
        for domain, vendor in DOMAINS.items():
            split = f"{domain}-{part}"
            drawings: list[Drawing] = [(vendor, concept, concept) for concept in drawn]
            samples[split] = write_split(work, split, drawings, drawers)["samples"]
    (work / "LICENSES.md").write_text(LICENSES + CHANGED, "utf-8")
    (work / "meta.json").write_text(json.dumps({"samples": samples}, indent=1) + "\n", "utf-8")
    work.rename(out)
    return samples


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji-domains"))
    options = parser.parse_args(arguments)
    samples = build(options.out)
    counts = ", ".join(f"{split} {count:,}" for split, count in samples.items())
    print(f"data: {options.out}: {counts}")


if __name__ == "__main__":
    main()
