"""Makes the golden files of a version: what it wrote, and what it read from that, for
test_golden_files.py.

python tests/golden/make.py tests/golden/0.1.0

    shards/     6 pairs with several captions and groups, packed from a folder
    taught/     sidecars of a teacher with two views of each image
    run/        last.pt after 3 of 5 steps of a distillation with pair matching and EMA; compressed,
                since most of it is zeros
    expected.npz    what `read` and the run's resuming gave
"""

import json
import lzma
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import simplclip
from simplclip import data, models, teacher, train
from simplclip.data.pack import pack
from simplclip.train import config

WORDS = ("red ring", "green ring", "blue ring", "red bar", "green bar", "blue bar")
VIEWS = 2
MODEL = {
    "name": "open_clip:ViT-B-32",
    "options": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "patch_size": 8, "head_width": 4},
        "text_cfg": {"context_length": 8, "layers": 1, "width": 8, "heads": 2},
        "simplify_options": {},
    },
}
RUN = {"device": "cpu", "precision": "fp32", "log_every": 1, "steps": 5}


def make(folder: Path) -> None:
    """Makes all in the current folder, and copies what is kept into a new `folder`."""
    rng = np.random.default_rng(0)
    Path("pairs").mkdir()
    for number, words in enumerate(WORDS):
        pixels = np.kron(
            rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8)
        )
        Image.fromarray(pixels).save(f"pairs/{number}.png")
        about = {"captions": [words, f"a picture of a {words}"], "group": words.split()[1]}
        Path(f"pairs/{number}.json").write_text(json.dumps(about))
    pack("pairs", "shards")

    # Embeddings of tokens that no caption has are zeros, which compress to nothing.
    torch.manual_seed(0)
    model = simplclip.create_model(MODEL["name"], **MODEL["options"])
    used = models.tokenizer(MODEL["name"], 8)(
        [f"a picture of a {words}" for words in WORDS]
    ).unique()
    weight = model.token_embedding.weight.data
    weight.copy_(torch.zeros_like(weight).index_copy(0, used, weight[used]))
    torch.save(model.state_dict(), "start.pt")

    shared = {"model": MODEL | {"checkpoint": "start.pt"}}
    pairs = {"train": "shards/*.tar", "batch_size": 4, "workers": 0, "augment": "affine"}
    train.run(
        config.from_dict(shared | {"data": pairs, "run": RUN | {"out": "teacher", "steps": 1}})
    )
    teacher.run("shards/*.tar", "taught", "teacher", views=VIEWS, config="teacher/config.yaml")
    distil = {"feature_weight": 1.0, "relational_weight": 1.0, "pm_weight": 0.3}
    learn = shared | {
        "data": pairs | {"sidecars": ["taught"], "captions_per_image": 2},
        "loss": distil,
    }
    learn |= {"optim": {"ema": 0.9, "warmup": 2}, "run": RUN | {"out": "run", "steps": 3}}
    train.run(config.from_dict(learn))
    last = lzma.compress(Path("run/last.pt").read_bytes())
    np.savez_compressed("expected.npz", **read(), **features(), losses=resumed())
    for kept in ("shards", "taught"):
        shutil.copytree(kept, folder / kept)
    (folder / "run").mkdir()
    (folder / "run" / "last.pt.xz").write_bytes(last)
    for kept in ("run/config.yaml", "expected.npz"):
        shutil.copy(kept, folder / kept)


def read() -> dict[str, np.ndarray]:
    """Returns a batch of all pairs of the shard, with the teacher's features and one of the views
    that it saw.
    """
    loader = data.Loader(
        "shards/*.tar",
        tokenizer=models.tokenizer(MODEL["name"], 8),
        transform=models.transforms(MODEL["name"], train=True, augment="affine", image_size=16),
        batch_size=len(WORDS),
        captions_per_image=2,
        teacher=True,
        sidecars=["taught"],
        shuffle=False,
    )
    batch = next(iter(loader))
    return {name: np.asarray(value) for name, value in batch.items() if name != "meta"}


def features() -> dict[str, np.ndarray]:
    """Returns what the run's averaged model makes of the pictures in the shard and of WORDS."""
    encoder = simplclip.load("run", device="cpu")
    images = list(data.held_out("shards/*.tar").pictures(range(len(WORDS))).values())
    return {
        "image_features": encoder.encode_image(images).numpy(),
        "text_features": encoder.encode_text(WORDS).numpy(),
    }


def resumed() -> np.ndarray:
    """Returns the losses of the steps after the checkpoint's."""
    train.run(config.load("run/config.yaml", ["run.steps=5"]), resume=True)
    rows = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    return rows["loss"][-2:]


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        make(target)
