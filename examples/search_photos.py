"""Searches a folder of photos by text or by another photo, and draws what it finds.

    python examples/search_photos.py photos --model open_clip:ViT-B-32/openai \
        --find "a red car" beach.jpg --picture hits.png

Features are kept in photos.npz beside the folder, float16 [N, D] with N paths, times and sizes:
another search encodes new and changed photos only.
"""

import argparse
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import simplclip
from simplclip.common.errors import UserError, visible
from simplclip.common.files import replacing
from simplclip.common.plotting import any_text, shortened, write
from simplclip.data.images import IMAGE_SUFFIXES

SUFFIXES = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
WORKERS = min(4, os.cpu_count() or 1)  # processes that decode photos
HITS = 8  # of each query


def opened(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        # in its own mode, which the model's transform expects
        return ImageOps.exif_transpose(image)


class Photos(torch.utils.data.Dataset):
    """Paths of photos and their pixels, None for one that cannot be read."""

    def __init__(self, paths: list[str], transform: Callable) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[str, torch.Tensor | None]:
        path = self.paths[number]
        try:
            return path, self.transform(opened(path))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            print(visible(f"skipped {path}: {error}"))
            return path, None


def version_of(path: str | Path) -> tuple[int, int]:
    """Returns the time and the size of a file, of which one changes when the file does.

    (0, 0) of a link to nothing, which is skipped later.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def stored_features(file: Path, model: str, versions: dict[str, tuple]) -> dict[str, np.ndarray]:
    """Returns the features of unchanged photos by path; {} if another model's are stored."""
    if not file.exists():
        return {}
    with np.load(file) as stored:
        if stored["model"] != model or "versions" not in stored:
            return {}
        rows = zip(map(str, stored["paths"]), stored["versions"].tolist(), stored["features"])
        return {path: row for path, version, row in rows if versions.get(path) == tuple(version)}


def features_of(folder: Path, encoder: Any) -> tuple[list[str], torch.Tensor]:
    """Returns the paths of N photos and features float32 [N, D]; encodes what is not stored."""
    file = folder.parent / f"{folder.name}.npz"
    model = encoder.fingerprint()
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    versions = {path: version_of(path) for path in paths}
    features = stored_features(file, model, versions)
    photos = Photos([path for path in paths if path not in features], encoder.preprocess)
    for batch in torch.utils.data.DataLoader(photos, 64, num_workers=WORKERS, collate_fn=list):
        batch = {path: pixels for path, pixels in batch if pixels is not None}
        if batch:
            rows = encoder.encode_image(torch.stack([*batch.values()]))
            features |= zip(batch, rows.cpu().half().numpy())
            print(f"encoded {len(features)} of {len(paths)} photos")
    if not (paths := [path for path in paths if path in features]):
        raise SystemExit(f"{folder}: expected photos, got none that can be read")
    rows = np.stack([features[path] for path in paths])
    arrays = {"paths": np.array(paths), "versions": np.array([versions[path] for path in paths])}
    try:
        with replacing(file) as stream:
            np.savez(stream, features=rows, model=model, **arrays)
    except OSError as error:  # of a folder that is read-only, or full
        print(f"the features are not kept: {error}")
    return paths, torch.from_numpy(rows).float()


def weights_of(encoder: Any) -> str:
    """Returns the file or folder of an encoder's weights, with the step of training if known."""
    file = encoder.source
    if Path(file, "last.pt").is_file():  # a run without a best.pt
        file = os.path.join(file, "last.pt")
    return file if encoder.step is None else f"{file}, step {encoder.step}"


def draw(picture: str, hits: dict[str, list[tuple[float, str]]]) -> None:
    """Draws the hits of each query in a row behind the query, with scores, folders and names."""
    columns = 1 + max(map(len, hits.values()))
    with any_text():
        figure = Figure(figsize=(1.5 * columns, 2 * len(hits)), layout="constrained")
        for row, (query, photos) in zip(
            figure.subplots(len(hits), columns, squeeze=False), hits.items()
        ):
            for axis in row:
                axis.axis("off")
            if os.path.isfile(query):
                row[0].imshow(shown(query))
            row[0].set_title(wrapped(query), fontsize=9, weight="bold")
            for axis, (score, path) in zip(row[1:], photos):
                axis.imshow(shown(path))
                name = "/".join(Path(path).parts[-2:])
                axis.set_title(wrapped(f"{score:.2f} {name}"), fontsize=8)
        write(figure, Path(picture))


def wrapped(text: str) -> str:
    """Returns text in at most three short lines."""
    return "\n".join(textwrap.wrap(shortened(text, 60), 20))


def shown(path: str) -> Image.Image:
    return ImageOps.contain(opened(path).convert("RGBA"), (256, 256))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="a run, export or open_clip:NAME/TAG")
    parser.add_argument(
        "--find", nargs="+", required=True, metavar="QUERY", help="texts, or paths of photos"
    )
    parser.add_argument("--picture", help="PNG with the hits")
    options = parser.parse_args(arguments)
    for query in options.find:
        path_like = "/" in query or Path(query).suffix.lower() in SUFFIXES
        if path_like and not os.path.isfile(query):
            parser.error(f"--find: expected words or the path of a photo, got no file {query!r}")
    try:
        encoder = simplclip.load(options.model)
    except (UserError, OSError) as error:
        raise SystemExit(visible(f"--model: {error}")) from None
    print(f"weights: {weights_of(encoder)}")
    paths, features = features_of(options.folder, encoder)
    print(f"searching {len(paths)} photos")
    hits = {}
    for query in options.find:
        if os.path.isfile(query):
            row = encoder.encode_image(opened(query))
        else:
            row = encoder.encode_text(query)
        scores, indices = (row.cpu() @ features.T)[0].topk(min(HITS, len(paths)))
        nearest = [paths[index] for index in indices.tolist()]
        hits[query] = list(zip(scores.tolist(), nearest))
        lines = [f"  {score:.3f}  {path}" for score, path in hits[query]]
        print(visible("\n".join([query, *lines]), keep="\n"))
    if options.picture:
        draw(options.picture, hits)


if __name__ == "__main__":
    main()
