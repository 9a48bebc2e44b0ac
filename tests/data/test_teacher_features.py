"""The loader reads a teacher's features, which belong to the captions that it draws."""

import json
import math
import re
import zlib

import numpy as np
import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg

from simplclip import data
from simplclip.data.samples import digest_of, digest_of_features
from simplclip.data.transforms import ImageTransform
from support.data.pairs import (
    features_of,
    keys,
    loader,
    npy,
    png,
    resize,
    sample,
    take,
    text_of,
    write,
)
from support.train.runs import bits


def taught(number, content=None, /, **about):
    key, files = sample(number)
    about = {"teacher.json": json.dumps(about).encode()} if about else {}
    return key, files | {"teacher.npy": content or npy(features_of(number)), **about}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write(tmp_path_factory.mktemp("taught") / "train-0.tar", [taught(i) for i in range(10)])


@pytest.mark.parametrize("captions", [1, 2, 3, 5])
def test_rows_are_those_of_the_image_and_of_the_captions_drawn(shard, captions):
    (batch,) = take(loader(shard, teacher=True, captions_per_image=captions, batch_size=10), 1)
    wanted = (10,) if captions == 1 else (10, captions)
    assert batch["text"].shape == (*wanted, 12)
    assert batch["teacher_image"].shape == (10, 6)
    assert batch["teacher_text"].shape == (*wanted, 6)
    assert batch["teacher_text"].dtype == torch.float16
    for i, (key, record) in enumerate(zip(batch["key"], batch["meta"])):
        number = int(key[1:])
        assert batch["teacher_image"][i].eq(number).all()
        texts = [text_of(row) for row in batch["text"][i].reshape(captions, -1)]
        assert len(set(texts)) == min(captions, 3)
        for text, row in zip(texts, batch["teacher_text"][i].reshape(captions, 6)):
            assert row.eq(number + (1 + record["captions"].index(text)) / 8).all()


def test_one_caption_is_drawn_as_without_a_teacher(shard):
    plain, taught = (take(loader(shard, teacher=teacher), 5) for teacher in (False, True))
    for batch in taught:
        del batch["teacher_image"], batch["teacher_text"]
    assert bits(plain) == bits(taught)


# of sample 1
CAPTIONS = digest_of(["1 a", "1 b", "1 c"])
CRCS = {number: f"{zlib.crc32(png(number)):08x}" for number in (1, 2)}
DIGESTS = [digest_of_features(npy(features_of(1)), views) for views in (None, [{}])]
OTHER_CAPTIONS = "teacher features of other captions"


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (taught(1, npy(features_of(1, 2))), OTHER_CAPTIONS),
        (taught(1, captions=digest_of(["1 a", "1 b", "2 c"])), OTHER_CAPTIONS),
        (taught(1, captions=CAPTIONS), None),
        (taught(1, captions=CAPTIONS, image=CRCS[1]), None),
        (taught(1, captions=CAPTIONS, image=CRCS[2]), "teacher features of another image"),
        (taught(1, features=DIGESTS[1]), "bad teacher features"),
        (taught(1, features=DIGESTS[0]), None),
        (taught(1, npy(features_of(1, 4)), captions=CAPTIONS, views=[{}, {}]), None),
    ],
)
def test_features_that_are_not_the_samples(tmp_path, second, reason):
    path = write(tmp_path / "a.tar", [taught(0), second])
    transform = AUGMENTED if "views" in str(second) else resize
    reader = loader(path, teacher=True, batch_size=1, transform=transform)
    assert set(keys(take(reader, 4))) == ({"k000", "k001"} if reason is None else {"k000"})
    assert set(reader.skipped.counts) == ({reason} if reason else set())
    assert set(keys(take(loader(path, batch_size=1), 4))) == {"k000", "k001"}


def test_a_sample_without_features_ends_the_run(tmp_path):
    path = write(tmp_path / "a.tar", [taught(0), sample(1)])
    message = r"sample 'k001' of shard '.*a.tar' has no teacher features .*simplclip teacher"
    with pytest.raises(data.ShardError, match=message):
        take(loader(path, teacher=True, batch_size=1), 2)


def test_the_stamp_of_a_folder(tmp_path):
    stamps = {"a": {"teacher": {"logit_scale": 10}}, "b": {"teacher": {"logit_scale": 11}}, "c": {}}
    for name, content in stamps.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps(content | {"splits": {}}))
    assert data.teacher_stamp([tmp_path / "a"]) == {"logit_scale": 10}
    assert data.teacher_stamp([tmp_path / name for name in stamps]) == {"logit_scale": 11}
    for folders in ([tmp_path / "c"], []):
        message = r"data.sidecars: expected a teacher's features, .*got \["
        with pytest.raises(data.ShardError, match=message):
            data.teacher_stamp(folders)


INFINITE = features_of(1)
INFINITE[2, 3] = math.inf


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npy(INFINITE), r"expected finite float16 \[V \+ C, D\], got float16"),
        (npy(features_of(1))[:150], "EOF: reading array data"),
        (npy(features_of(1).astype(float)), r"expected finite float16 .*, got float64"),
        (npy(np.array([[print, 1]], object)), "Object arrays cannot be loaded"),
        (b"x", "."),
    ],
)
def test_features_that_are_damaged_break_their_sample(tmp_path, content, why):
    path = write(tmp_path / "a.tar", [taught(0), taught(1, content)])
    reader = loader(path, teacher=True, batch_size=1)
    assert set(keys(take(reader, 4))) == {"k000"}
    assert re.search(rf"bad teacher features \(first: a.tar/k001: .*{why}", str(reader.skipped))


def test_an_image_that_broke_after_the_teacher_ran_is_counted(tmp_path):
    key, files = taught(1, captions=CAPTIONS, image=CRCS[1])
    path = write(tmp_path / "a.tar", [taught(0), (key, files | {"png": png(1)[:200]})])
    reader = loader(path, teacher=True, batch_size=1)
    assert set(keys(take(reader, 3))) == {"k000"}
    assert set(reader.skipped.counts) == {"truncated image"}


AUGMENTED = ImageTransform(PreprocessCfg(size=8), AugmentationCfg())


VIEWS = [5, {"crop": "x"}, {"affine": []}, {"colour": [9] * 9}, {"image": [1, 2], "crop": [5]}]
VIEWS += [{"image": [12, 12], "crop": crop} for crop in ([0, 0, 400, 12], [0, -1, 12, 12])]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_that_cannot_be_replayed_breaks_its_sample(tmp_path, view):
    samples = [taught(0), taught(1, captions=CAPTIONS, views=[view])]
    path = write(tmp_path / "a.tar", samples)
    reader = loader(path, teacher=True, batch_size=1, transform=AUGMENTED)
    assert set(keys(take(reader, 3))) == {"k000"}
    assert reader.skipped.counts["bad teacher features"] >= 2
