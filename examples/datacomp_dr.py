"""Makes sidecars of DataCompDR: its synthetic captions, teacher's features and augmentations.

    python examples/datacomp_dr.py 'images/*.tar' --dr DataCompDR-12M --out reinforced
    simplclip train siclip2-s0 --set data.train='images/*.tar' --set 'data.sidecars=[reinforced]'

images/NAME.tar          images with their captions, as img2dataset writes them of DataComp-12M; the
                         key, or "uid" in the json, is DataComp's uid
DataCompDR-12M/NAME.tar  of apple/DataCompDR-12M or -12M-bf16: UID.syn.json, UID.paug.json and
                         UID.npz or UID.pth.gz, the same uids

A sample gets its own caption and the synthetic ones, of which an epoch draws one, and the first
--views of the stored augmentations (a crop and two operations of RandAugment), which training
replays. The features are those of two ViT-L-14, side by side: 1,536 numbers, which take 3 kB for
each view and caption. Read the data's licence first.
"""

import argparse
import functools
import gzip
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simplclip.data.errors import BrokenSample
from simplclip.data.images import open_image
from simplclip.data.samples import (
    TEACHER,
    TEACHER_JSON,
    Pair,
    clean,
    digest_of_features,
    digests_of,
)
from simplclip.data.sidecars import write_sidecars
from simplclip.data.transforms import OPERATIONS

TEACHERS = "ViT-L-14 (openai), ViT-L-14 (datacomp_xl_s13b_b90k)"
LOGIT_SCALE = 100.0  # of both teachers, as in DataCompDR's training
SIDE = 224  # pixels of an augmented image, to which its shifts refer

Reinforced = dict[str, tarfile.TarInfo]  # the files of an uid, by suffix


@functools.lru_cache(1)
def opened(path: str) -> tuple[tarfile.TarFile, dict[str, Reinforced]]:
    """Opens a tar of DataCompDR; returns it and its members by uid."""
    tar = tarfile.open(path)  # noqa: SIM115, since later samples read from it
    members: dict[str, Reinforced] = {}
    for member in tar:
        uid, _, suffix = os.path.basename(member.name).partition(".")
        members.setdefault(uid, {})[suffix] = member
    return tar, members


def reinforcement(path: str, uid: str) -> tuple[list[str], list, np.ndarray, np.ndarray]:
    """Returns synthetic captions, augmentations and features of an uid: images', captions'."""
    tar, members = opened(path)

    def content(suffix: str) -> bytes:
        return tar.extractfile(members[uid][suffix]).read()

    captions = json.loads(content("syn.json"))["syn_text"]
    augmentations = json.loads(content("paug.json"))["param_aug"]
    if isinstance(augmentations, str):
        augmentations = json.loads(augmentations)
    if "npz" in members[uid]:
        with np.load(io.BytesIO(content("npz")), allow_pickle=False) as arrays:
            features = [arrays["image_emb"], arrays["text_emb"]]
    else:
        file = io.BytesIO(gzip.decompress(content("pth.gz")))
        tensors = torch.load(file, weights_only=True)
        features = [tensors[name].float().numpy() for name in ("image_emb", "text_emb")]
    return captions, augmentations, *features


def unit(rows: np.ndarray) -> np.ndarray:
    """Returns rows of norm 1, float32."""
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass
class Prepare:
    """Makes the files of a sample's sidecar, in workers."""

    dr: Path
    views: int

    def __call__(self, pair: Pair) -> dict[str, bytes]:
        uid = str(pair.record.get("uid") or pair.key)
        try:
            path = self.dr / os.path.basename(pair.url)
            synthetic, augmentations, images, texts = reinforcement(str(path), uid)
        except KeyError:
            raise BrokenSample("not in DataCompDR", uid) from None
        # the first of the features is that of the sample's own caption
        captions = [pair.captions[0], *map(clean, synthetic)]
        kept = [number for number, caption in enumerate(captions) if caption]
        pair.captions = [captions[number] for number in kept]
        views = [self.view(pair, each) for each in augmentations[: self.views]]
        rows = unit(np.concatenate([images[: self.views], texts[kept]]))
        np.save(file := io.BytesIO(), rows.astype(np.float16), allow_pickle=False)
        npy = file.getvalue()
        about: dict[str, Any] = digests_of(pair)
        about |= {"views": views, "features": digest_of_features(npy, views)}
        return {
            "json": json.dumps(pair.record | {"captions": pair.captions}).encode(),
            TEACHER: npy,
            TEACHER_JSON: json.dumps(about).encode(),
        }

    def view(self, pair: Pair, augmentation: list) -> dict[str, Any]:
        """Returns a stored augmentation, [crop, [[operation, magnitude], ...]], as a view."""
        crop, operations = augmentation
        # img2dataset may have resized the image, whose original size DataCompDR's crops refer to
        size = [pair.record.get(f"original_{name}") for name in ("height", "width")]
        if None in size:
            size = list(open_image(pair.encoded).size[::-1])
        return {
            "image": size,
            "crop": crop,
            "size": [SIDE, SIDE],
            "operations": [[OPERATIONS[number], size] for number, size in operations or ()],
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", nargs="+", help="tars of images: paths or patterns")
    parser.add_argument("--dr", type=Path, required=True, help="folder of DataCompDR's tars")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sidecars")
    parser.add_argument("--views", type=int, default=10, help="of 30 in 12M (default: 10)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args(arguments)
    if not any(options.dr.glob("*.tar")):
        parser.error(f"--dr: expected a folder with tars of DataCompDR, got {options.dr}")
    if options.views < 1:
        parser.error(f"--views: expected at least 1, got {options.views}")
    stamp = {
        "name": f"DataCompDR: {TEACHERS}",
        "width": 1536,
        "logit_scale": LOGIT_SCALE,
        "views": {"number": options.views, "augment": "DataCompDR's"},
    }
    write_sidecars(
        options.images,
        options.out,
        Prepare(options.dr, options.views),
        list,
        stamp={"teacher": stamp},
        batch_size=64,
        workers=options.workers,
        title="DataCompDR",
    )


if __name__ == "__main__":
    main()
