"""Batches with a teacher's features and several captions for each image."""

import io
import json

import numpy as np
import pytest
import torch
from pairs import equal, loader, sample, text_of, write

from simplclip import data

WIDTH = 6


def features_of(number: int, captions: int) -> np.ndarray:
    """Row r of sample n is n + r / 8 everywhere, so that a row says where it is from."""
    return (number + np.arange(1 + captions)[:, None] / 8 + np.zeros(WIDTH)).astype(np.float16)


def taught(number, captions=None, features=None):
    key, files = sample(number, captions)
    count = len(json.loads(files["json"])["captions"])
    buffer = io.BytesIO()
    np.save(buffer, features_of(number, count) if features is None else features)
    return key, files | {"teacher.npy": buffer.getvalue()}


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


def test_a_sample_without_features_is_an_error_that_says_how_to_make_them(tmp_path):
    path = write(tmp_path / "a.tar", [taught(0), sample(1)])
    with pytest.raises(
        data.ShardError, match=r"sample 'k001' of shard '.*a.tar' has no teacher features .*simplclip teacher"
    ):
        list(loader(path, teacher=True, batch_size=1).epoch(0))
    assert len(list(loader(path, batch_size=1).epoch(0))) == 2


def test_captions_that_changed_since_are_an_error(tmp_path):
    path = write(tmp_path / "a.tar", [taught(0, features=features_of(0, 2))])
    with pytest.raises(data.ShardError, match="features of 2 captions, but 3 captions: the captions have changed"):
        list(loader(path, teacher=True, batch_size=1).epoch(0))


@pytest.mark.parametrize("damage", [lambda b: b[:40], lambda b: b"x" * 40, lambda b: _saved(np.zeros((4, 2)))])
def test_damaged_features_are_a_broken_sample(tmp_path, damage):
    key, files = taught(1)
    path = write(tmp_path / "a.tar", [taught(0), (key, files | {"teacher.npy": damage(files["teacher.npy"])})])
    reader = loader(path, teacher=True, batch_size=1)
    assert [batch["key"] for batch in reader.epoch(0)] == [["k000"]]
    assert reader.skipped == {"bad teacher features": 1}


def _saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_pickle_is_not_read(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    key, files = taught(0)
    path = write(tmp_path / "a.tar", [(key, files | {"teacher.npy": buffer.getvalue()}), taught(1)])
    reader = loader(path, teacher=True, batch_size=1)
    assert len(list(reader.epoch(0))) == 1
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


def test_bad_count():
    with pytest.raises(ValueError, match="captions_per_image: expected an integer of at least 1, got 0"):
        loader("x.tar", captions_per_image=0)
