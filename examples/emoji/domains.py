"""Builds two domains of drawings with the same names, for benchmarks/finetune.yaml.

    python examples/emoji/domains.py --out data/emoji-domains

The old domain is Twemoji's flat, coloured drawings. The new one is the black lines of OpenMoji's
drawings. Emoji whose lines are those of another one, as flags, are left out. As shards, with the
captions of build.py:

    old-train, old-valid, old-test    Twemoji's drawings
    new-train, new-valid, new-test    OpenMoji's lines

Both domains have the same emoji in a part, and no emoji is in two parts.
"""

import argparse
import random
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

from build import SEED, Concept, Drawing, Vendor, concepts, vendors, write

PARTS = {"test": 300, "valid": 150}  # emoji; the others are for training
NOTE = "\nThe splits new-* are the black lines of OpenMoji's drawings, without their colours.\n"


def without_colours(svg: bytes) -> bytes:
    """Returns a drawing of OpenMoji with its layers of lines alone."""
    drawing = ET.fromstring(svg)
    for layer in list(drawing):
        if not layer.get("id", "").startswith("line"):
            drawing.remove(layer)
    return ET.tostring(drawing)


def distinct(every: list[Concept], lines: Vendor) -> list[Concept]:
    """Returns the concepts of which no other one has the same lines."""
    by_pixels = defaultdict(list)
    for concept in every:
        by_pixels[lines.draw(concept).tobytes()].append(concept)
    return [same[0] for same in by_pixels.values() if len(same) == 1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/emoji-domains"))
    options = parser.parse_args(arguments)
    drawers = vendors()
    kept = concepts(drawers)
    render = drawers["openmoji"].decode
    drawers["openmoji"].decode = lambda svg: render(without_colours(svg))
    kept = distinct(kept, drawers["openmoji"])
    random.Random(SEED).shuffle(kept)
    splits: dict[str, list[Drawing]] = {}
    for part, count in (PARTS | {"train": len(kept)}).items():
        drawn, kept = kept[:count], kept[count:]
        for domain, vendor in (("old", "twemoji"), ("new", "openmoji")):
            splits[f"{domain}-{part}"] = [(vendor, concept, concept) for concept in drawn]
    write(options.out, splits, drawers, NOTE)


if __name__ == "__main__":
    main()
