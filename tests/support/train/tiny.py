"""A tiny training: shards of coloured patterns, features of a teacher, and a config."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from simplclip.train import config
from support.data import pairs

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "bar", "cross", "ring", "wedge")
MODEL = {"text_cfg": {"layers": 1, "width": 64, "heads": 2}}
IMAGE_SIZE = 24  # half of siclip-tiny's: a step takes a third of the time


def picture(colour: tuple[int, int, int], shape: str, size: int = 16) -> bytes:
    """Returns a PNG with a pattern in a colour on white. The name of the shape is its seed."""
    inside = np.random.default_rng(list(shape.encode())).random((size // 4, size // 4)) < 0.5
    inside = inside.repeat(4, axis=0).repeat(4, axis=1)
    data = io.BytesIO()
    Image.fromarray(np.where(inside[..., None], colour, 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def teacher_features(captions: list[str], width: int) -> np.ndarray:
    """Returns a teacher's features of the image and each caption, float16 [1 + C, D̂]."""
    clean = np.random.default_rng(list(captions[0].encode())).standard_normal(width)
    noise = np.random.default_rng(1).standard_normal((1 + len(captions), width))
    features = clean + 0.3 * noise
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


def write_shard(path: Path, copies: int = 1, teacher: int = 0) -> str:
    """Writes 24 concepts, each `copies` times. teacher: width of features in a sidecar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples, taught = [], []
    for copy, name, shape in itertools.product(range(copies), COLOURS, SHAPES):
        caption = f"{name} {shape}"
        record = {"captions": [caption, f"a {caption}"], "group": caption, "label": name}
        files = {"png": picture(COLOURS[name], shape), "json": json.dumps(record).encode()}
        key = f"{copy}-{name}-{shape}"
        samples.append((key, files))
        if teacher:
            features = teacher_features(record["captions"], teacher)
            taught.append((key, {"teacher.npy": pairs.npy(features)}))
    if teacher:
        stamp = {"name": "made up", "width": teacher, "logit_scale": 10.0}
        write_teacher(path.parent / "teacher", path.name, taught, stamp)
    return pairs.write(path, samples)


def write_teacher(folder: Path, name: str, samples: list, stamp: dict) -> None:
    """Writes a sidecar of a teacher's features, and its meta.json."""
    folder.mkdir(exist_ok=True)
    pairs.write(folder / name, samples)
    (folder / "meta.json").write_text(json.dumps({"teacher": stamp}))


def settings(folder: Path, *changes: str, teacher: int = 0) -> config.Config:
    """Returns the config of a run of 7 steps, with 3 batches of 8 an epoch."""
    return config.load(write_config(folder, teacher), changes)


def write_config(folder: Path, teacher: int = 0) -> str:
    """Writes the config, and the shard that it names unless there is one."""
    shard = folder / "data" / "train-0.tar"
    if not shard.exists():
        write_shard(shard, teacher=teacher)
    run = {"out": str(folder / "run"), "steps": 7, "precision": "fp32", "device": "cpu"}
    run |= {"log_every": 1, "save_every": 100}
    sidecars = [str(shard.parent / "teacher")] if teacher else []
    values = config.from_dict(
        {
            "model": {"name": "siclip-tiny", "image_size": IMAGE_SIZE, "options": MODEL},
            "data": {"train": str(shard), "sidecars": sidecars, "batch_size": 8, "workers": 0},
            "loss": {"pm_weight": 1.0},
            "optim": {"warmup": 2},
            "run": run,
        }
    )
    path = folder / "config.yaml"
    path.write_text(values.to_yaml())
    return str(path)
