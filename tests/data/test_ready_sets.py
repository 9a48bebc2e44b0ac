"""Sets that are on Hugging Face's hub as tars are read as they are: docs/data.md."""

import json

import pytest

from simplclip import models
from simplclip.data.loader import Loader
from support.data import pairs


@pytest.mark.parametrize("name", ["cc3m-train-{:04}.tar", "cc12m-train-{:04}.tar"])
def test_tars_that_img2dataset_wrote(name, tmp_path):
    """As pixparse's: the caption is in the json and in the txt; of some samples one is missing."""
    for shard in range(2):
        samples = []
        for number in range(4):
            key = f"{shard:04}{number:05}"
            about = {
                "caption": f"caption {key}",
                "url": f"https://example.com/{key}.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 64,
                "height": 48,
                "exif": "{}",
                "sha256": "0" * 64,
            }
            files = {"png": pairs.png(), "txt": f"caption {key}".encode()}
            if number == 2:
                files.pop("txt")
            if number == 3:
                about.pop("caption")
            samples.append((key, files | {"json": json.dumps(about).encode()}))
        pairs.write(tmp_path / name.format(shard), samples)
    model = "open_clip:ViT-B-32"
    loader = Loader(
        str(tmp_path / "*.tar"),
        tokenizer=list,
        transform=models.transforms(model, train=True),
        batch_size=8,
    )
    batch = next(iter(loader))
    assert sorted(batch["text"]) == sorted(f"caption {key}" for key in batch["key"])
    assert len({*batch["key"]}) == len({*batch["group"].tolist()}) == 8
