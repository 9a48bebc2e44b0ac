"""examples/datacomp_dr.py: a synthetic tar in DataCompDR's layout becomes sidecars, exactly."""

import gzip
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
from simplclip.data.find_sources import sources_of
from simplclip.data.loader import Loader
from simplclip.data.read_meta import teacher_stamp
from simplclip.data.read_tars import read_tar
from simplclip.data.samples import TEACHER, parse
from simplclip.data.transforms import OPERATIONS
from simplclip.data.views import pixels_of
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


def npz(features):
    np.savez(file := io.BytesIO(), **features)
    return {"npz": file.getvalue()}


def pth(features):
    tensors = {name: torch.from_numpy(rows).bfloat16() for name, rows in features.items()}
    torch.save(tensors, file := io.BytesIO())
    return {"pth.gz": gzip.compress(file.getvalue())}


@pytest.fixture(params=[npz, pth], ids=["float32", "bf16"])
def folders(request, tmp_path):
    """Four images, the third of which DataCompDR lacks, in another order than its samples."""
    images, reinforced = [], []
    for number in range(4):
        about = {"uid": f"u{number}"} if number else {}
        files = {"png": picture(number), "txt": f"own {number}".encode()}
        files["json"] = json.dumps(about | {"original_width": 320, "original_height": 240}).encode()
        images.append((f"{number:09}" if number else "u0", files))
        if number != 2:
            files, features = reinforcement(number)
            reinforced.insert(0, (f"u{number}", files | request.param(features)))
    for name, samples in (("images", images), ("dr", reinforced)):
        (tmp_path / name).mkdir()
        pairs.write(tmp_path / name / "00000000.tar", samples)
    return tmp_path


def test_captions_features_and_views_are_those_of_datacompdr(folders, capsys):
    out, images = folders / "out", str(folders / "images" / "*.tar")
    command = [images, "--dr", str(folders / "dr"), "--out", str(out), "--workers", "0"]
    converter.main([*command, "--views", "3"])
    assert "not in DataCompDR" in capsys.readouterr().out
    (source,) = sources_of(images)
    samples = [
        sample for sample in read_tar(source, Skipped(), sidecars=[out]) if TEACHER in sample
    ]
    taught = {sample["__key__"]: parse(sample, teacher=True) for sample in samples}
    assert list(taught) == ["u0", "000000001", "000000003"]
    for number, pair in zip((0, 1, 3), taught.values()):
        assert pair.captions == [f"own {number}", f"a {number}", f"b {number}"]
        _, features = reinforcement(number)
        rows = np.concatenate([features["image_emb"][:3], features["text_emb"][[0, 1, 3]]])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_array_equal(pair.features, rows.astype(np.float16))
        assert [view["crop"] for view in pair.views] == CROPS[:3]
        assert [view["operations"] for view in pair.views] == [
            [["ShearX", 0.27], ["Color", -0.27]],
            [["TranslateX", -30.0], ["Identity", 0.0]],
            [["Posterize", 5.0], ["Rotate", 8.1]],
        ]
    stamp = teacher_stamp([out])
    assert (stamp["width"], stamp["logit_scale"]) == (WIDTH, 100)

    transform = models.transforms("open_clip:ViT-B-32", train=True)
    options = {"tokenizer": models.tokenizer("open_clip:ViT-B-32"), "transform": transform}
    batch = next(iter(Loader(images, sidecars=[out], teacher=True, batch_size=3, **options)))
    assert batch["teacher_image"].shape == batch["teacher_text"].shape == (3, WIDTH)

    before = (out / "00000000.tar").read_bytes()
    (out / "00000000.tar").unlink()
    converter.main([*command, "--views", "3"])
    assert (out / "00000000.tar").read_bytes() == before


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


def test_an_unknown_operation_breaks_the_sample_alone(folders):
    (source,) = sources_of(str(folders / "images" / "*.tar"))
    pair = parse(next(iter(read_tar(source, Skipped()))))
    transform = models.transforms("open_clip:ViT-B-32", train=True)
    view = {
        "image": [240, 320],
        "crop": [0, 0, 9, 9],
        "size": [224, 224],
        "operations": [["Fly", 1.0]],
    }
    with pytest.raises(BrokenSample, match="bad teacher features"):
        pixels_of(transform, pair, view)
