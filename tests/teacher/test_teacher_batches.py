"""Batches with a teacher's features and several captions for each image."""

import json

import numpy as np
import pytest
import torch
from pairs import equal, loader, npy, sample, text_of, write

from simplclip import data

WIDTH = 6


def features_of(number: int, captions: int) -> np.ndarray:
    """Row r of sample n is n + r / 8 everywhere, so that a row says where it is from."""
    return (number + np.arange(1 + captions)[:, None] / 8 + np.zeros(WIDTH)).astype(np.float16)


def taught(number, features=None):
    key, files = sample(number)
    return key, files | {"teacher.npy": features or npy(features_of(number, 3))}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write(tmp_path_factory.mktemp("taught") / "train-0.tar", [taught(i) for i in range(10)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("captions", [1, 2, 3, 5])
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_rows_are_those_of_the_image_and_of_the_captions_drawn(shard, captions, workers):
    reader = loader(shard, teacher=True, captions_per_image=captions, workers=workers, drop_last=False)
    seen = 0
    for batch in reader.epoch(0):
        count = len(batch["key"])
        wanted = (count,) if captions == 1 else (count, captions)
        assert batch["text"].shape == (*wanted, 12)
        assert batch["teacher_image"].shape == (count, WIDTH)
        assert batch["teacher_text"].shape == (*wanted, WIDTH)
        assert batch["teacher_text"].dtype == torch.float16
        for i, (key, record) in enumerate(zip(batch["key"], batch["meta"])):
            number = int(key[1:])
            assert batch["teacher_image"][i].eq(number).all()
            texts = [text_of(row) for row in batch["text"][i].reshape(captions, -1)]
            rows = batch["teacher_text"][i].reshape(captions, WIDTH)
            assert len(set(texts)) == min(captions, 3)
            for text, row in zip(texts, rows):
                assert row.eq(number + (1 + record["captions"].index(text)) / 8).all()
        seen += count
    assert seen == 10


def test_one_caption_is_drawn_as_without_a_teacher(shard):
    plain, taught = (list(loader(shard, teacher=teacher).epoch(3)) for teacher in (False, True))
    assert equal(plain, [{k: v for k, v in batch.items() if not k.startswith("teacher")} for batch in taught])


def test_skipped_batches_and_two_captions(shard):
    reader = loader(shard, teacher=True, captions_per_image=2, drop_last=False)
    assert equal(list(reader.epoch(1))[2:], list(reader.epoch(1, skip_batches=2)))


def test_captions_drawn_differ_by_epoch(shard):
    reader = loader(shard, captions_per_image=2, shuffle=False)
    first, second = (torch.cat([batch["text"] for batch in reader.epoch(e)]) for e in (0, 1))
    assert first.shape == second.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (sample(1), r"sample 'k001' of shard '.*a.tar' has no teacher features .*simplclip teacher"),
        (taught(1, npy(features_of(1, 2))), "features of 2 captions, but 3 captions: the captions have changed"),
    ],
)
def test_features_that_are_not_the_samples(tmp_path, second, message):
    path = write(tmp_path / "a.tar", [taught(0), second])
    with pytest.raises(data.ShardError, match=message):
        list(loader(path, teacher=True, batch_size=1).epoch(0))
    assert len(list(loader(path, batch_size=1).epoch(0))) == 2


@pytest.mark.parametrize(
    "damaged",
    [npy(features_of(1, 3))[:40], b"x" * 40, npy(np.zeros((4, 2))), npy(np.array([{"a": 1}], dtype=object))],
    ids=["cut", "garbage", "float64", "pickle"],
)
def test_damaged_features_are_a_broken_sample(tmp_path, damaged):
    path = write(tmp_path / "a.tar", [taught(0), taught(1, damaged)])
    reader = loader(path, teacher=True, batch_size=1)
    assert [batch["key"] for batch in reader.epoch(0)] == [["k000"]]
    assert reader.skipped == {"bad teacher features": 1}


def test_the_stamp_of_a_folder(tmp_path):
    for name, stamp in (("a", {"width": 6, "logit_scale": 10}), ("b", {"width": 6, "logit_scale": 11}), ("c", {"width": 6})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps({"teacher": {"name": "t"} | stamp}))
    path = lambda *names: [str(tmp_path / name / "x.tar") for name in names]  # noqa: E731
    assert data.teacher_stamp(path("a", "a")) == {"name": "t", "width": 6, "logit_scale": 10.0}
    with pytest.raises(data.ShardError, match="features of one teacher, got different ones in '.*a' and '.*b'"):
        data.teacher_stamp(path("a", "b"))
    for names in (("c",), ("none",)):
        with pytest.raises(data.ShardError, match=r"meta.json names no teacher; make them by `simplclip teacher`"):
            data.teacher_stamp(path(*names))
