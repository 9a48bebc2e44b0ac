"""examples/datacomp_dr.py: a synthetic tar in DataCompDR's layout becomes sidecars, whose views the
loader's transform replays.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from simplclip import models
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.samples import parse
from simplclip.data.shards import sources_of, teacher_stamp
from simplclip.data.sidecars import read_joined
from simplclip.data.transforms import OPERATIONS, pixels_of
from support.data import pairs
from support.programs import load_example

converter = load_example("datacomp_dr")

VIEWS, WIDTH = 4, 1536
CROPS = [[10, 20, 200, 180], [0, 0, 240, 320], [100, 5, 64, 90], [3, 7, 120, 120]]
# operations by their numbers, with their magnitudes
OPERATED = [[[1, 0.27], [7, -0.27]], [[3, -30.0], [0, 0.0]], [[10, 5.0], [5, 8.1]], None]


def picture(number):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize((320, 240), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def reinforcement(number):
    """The files that DataCompDR has of an uid."""
    rng = np.random.default_rng(number + 100)
    rows = {"image_emb": VIEWS, "text_emb": 4}  # numbers that bfloat16 has
    features = {
        name: torch.from_numpy(rng.standard_normal((count, WIDTH))).bfloat16().float().numpy()
        for name, count in rows.items()
    }
    return {
        "url.txt": b"https://example.com/a.jpg",
        "syn.json": json.dumps({"syn_text": [f"a {number}", "", f"b {number}"]}).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(list(zip(CROPS, OPERATED)))}).encode(),
        "json": json.dumps({"uid": f"u{number}", "sha256": "0"}).encode(),
    }, features


def test_captions_features_and_views_are_those_of_datacompdr(tmp_path, capsys):
    """Of two images, the second of which DataCompDR lacks."""
    size = {"original_width": 320, "original_height": 240}
    images = []
    for number in range(2):
        record = json.dumps({"uid": f"u{number}"} | size).encode()
        text = f"own {number}".encode()
        images.append((f"{number:09}", {"png": picture(number), "txt": text, "json": record}))
    files, features = reinforcement(0)
    np.savez(file := io.BytesIO(), **features)
    reinforced = [("u0", files | {"npz": file.getvalue()})]
    for name, samples in (("images", images), ("dr", reinforced)):
        (tmp_path / name).mkdir()
        pairs.write(tmp_path / name / "00000000.tar", samples)
    tars, out = str(tmp_path / "images" / "*.tar"), str(tmp_path / "out")
    command = [tars, "--dr", str(tmp_path / "dr"), "--out", out, "--workers", "0"]
    converter.main([*command, "--views", "3"])
    assert "not in DataCompDR" in capsys.readouterr().out
    (source,) = sources_of(tars)
    raw = next(iter(read_joined(source, Skipped(), [out])))
    pair = parse(raw, teacher=True)
    assert pair.captions == ["own 0", "a 0", "b 0"]
    rows = np.concatenate([features["image_emb"][:3], features["text_emb"][[0, 1, 3]]])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_array_equal(pair.features, rows.astype(np.float16))
    assert [view["crop"] for view in pair.views] == CROPS[:3]
    assert pair.views[1]["operations"] == [["TranslateX", -30.0], ["Identity", 0.0]]
    assert teacher_stamp([out])["width"] == WIDTH
    transform = models.transforms("open_clip:ViT-B-32", train=True)
    assert pixels_of(transform, pair, pair.views[0]).shape == (3, 224, 224)
    with pytest.raises(BrokenSample, match="bad teacher features"):
        pixels_of(transform, pair, pair.views[0] | {"operations": [["Fly", 1.0]]})


@pytest.mark.parametrize("name", OPERATIONS)
def test_views_replay_what_the_teacher_saw(name):
    """The teacher saw a PIL image, cropped, resized to 224 and changed by torchvision."""
    space = RandAugment()._augmentation_space(31, (224, 224))
    assert tuple(space) == OPERATIONS
    magnitudes, signed = space[name]
    magnitude = float(magnitudes[9]) if magnitudes.ndim else 0.0
    image = Image.open(io.BytesIO(picture(1)))
    transform = models.transforms("open_clip:ViT-B-32", train=True)
    for sign in {1, -1 if signed else 1}:
        operations = [[name, sign * magnitude], ["Identity", 0.0]]
        view = {"image": [240, 320], "crop": [10, 20, 200, 180], "size": [224, 224]}
        pixels = transform.apply(picture(1), view | {"operations": operations})
        seen = F.resized_crop(image, 10, 20, 200, 180, [224, 224], InterpolationMode.BICUBIC)
        seen = _apply_op(seen, name, sign * magnitude, InterpolationMode.NEAREST, fill=None)
        difference = (pixels.int() - F.pil_to_tensor(seen).int()).abs().float()
        assert difference.quantile(0.99) <= 4, name
        assert difference.mean() < 1, name
