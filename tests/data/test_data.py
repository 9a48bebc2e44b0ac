"""Batches of training, with and without a teacher's features: order, resuming and failures for any number of workers."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg
from pairs import COUNT, SIZE, augment, keys, loader, npy, png, resize, sample, text_of, tokenizer, write
from runs import bits

from simplclip import data
from simplclip.data import parts
from simplclip.data.transforms import ImageTransform

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


WIDTH = 6  # of the features
ALL = [f"k{i:03d}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    """Writes three shards of unequal size, so that workers run out at different times."""
    folder = tmp_path_factory.mktemp("shards")
    for shard, (start, stop) in enumerate(((0, 5), (5, 19), (19, COUNT))):
        write(folder / f"train-{shard:06d}.tar", [sample(i) for i in range(start, stop)])
    return str(folder / "train-{000000..000002}.tar")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_hold_what_the_shards_hold(pattern, workers):
    batches = list(loader(pattern, workers=workers, drop_last=False).epoch(0))
    assert [len(b["key"]) for b in batches] == [4, 4, 4, 4, 4, 3]
    assert sorted(keys(batches)) == ALL
    found = {name: (tuple(value.shape), value.dtype) for name, value in batches[0].items() if isinstance(value, torch.Tensor)}
    assert found == {
        "image": ((4, 3, SIZE, SIZE), torch.float32),
        "text": ((4, 12), torch.int64),
        "group": ((4,), torch.int64),
    }
    for batch in batches:
        for key, row, record in zip(batch["key"], batch["text"], batch["meta"]):
            assert text_of(row) in record["captions"]
            assert record["group"] == int(key[1:]) // 2


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_drop_last_drops_less_than_a_batch_whatever_the_workers(pattern, workers):
    reader = loader(pattern, workers=workers)
    batches = list(reader.epoch(0))
    assert [len(b["key"]) for b in batches] == [4] * 5 == [4] * reader.batches_per_epoch
    assert len(set(keys(batches))) == 20
    assert "20 samples used, 3 left over" in reader.report()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "count"), [(2, COUNT), (3, COUNT), (3, 2)])
def test_fewer_shards_than_workers_share_the_samples(tmp_path, workers, count):
    path = write(tmp_path / "one.tar", [sample(0), *(sample(i) for i in range(count))])  # files of the first sample twice
    reader = loader(path, workers=workers, batch_size=2, drop_last=False)
    assert sorted(keys(reader.epoch(0))) == ALL[:count]
    assert reader.skipped == {"duplicate file in tar": 3}  # counted by one worker
    first = next(loader(path, workers=workers, batch_size=2, shuffle=False).epoch(0))["key"]
    assert count == 2 or len({int(key[1:]) % workers for key in first}) == 1


def test_shuffle_mixes_over_the_whole_epoch_and_differs_by_epoch_and_seed(pattern):
    orders = [keys(loader(pattern, seed=s, drop_last=False).epoch(e)) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert all(order != sorted(order) for order in orders)
    assert keys(loader(pattern, shuffle=False, drop_last=False).epoch(3)) == ALL
    # The shuffle is one of the whole epoch, not of each shard: each half has samples of all shards.
    many = [keys(loader(pattern, drop_last=False).epoch(e)) for e in range(8)]
    assert any(int(order[0][1:]) >= 5 and int(order[1][1:]) < 5 for order in many)


def test_caption_and_augmentation_do_not_depend_on_workers(pattern):
    alone, several = (
        {
            key: (text_of(batch["text"][i]), batch["image"][i].tolist())
            for batch in loader(pattern, workers=workers, drop_last=False, batch_size=3).epoch(2)
            for i, key in enumerate(batch["key"])
        }
        for workers in (0, 2)
    )
    assert alone == several


def test_every_caption_is_drawn_and_augmentation_changes_by_epoch(pattern):
    reader = loader(pattern, drop_last=False)
    drawn, images = Counter(), []
    for epoch in range(12):
        batches = list(reader.epoch(epoch))
        drawn.update(text_of(row)[-1] for batch in batches for row in batch["text"])
        images += [b["image"][i] for b in batches for i, key in enumerate(b["key"]) if key == "k003"]
    assert set(drawn) == {"a", "b", "c"}
    assert min(drawn.values()) > 12 * COUNT / 6
    assert all(not torch.equal(images[0], image) for image in images[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_numbers_are_left_alone_and_change_nothing(pattern, workers):
    def seed(number):
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002

    def draws():
        return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002

    found = []
    for number in (3, 4):
        seed(number)
        expected = draws()
        seed(number)
        found.append(list(loader(pattern, workers=workers).epoch(1)))
        assert draws() == expected
    assert bits(found[0]) == bits(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_skip_batches_gives_the_rest_of_the_epoch(pattern, workers, drop_last):
    reader = loader(pattern, workers=workers, drop_last=drop_last, batch_size=3)
    whole, report = list(reader.epoch(1)), reader.report()
    for skip in (0, 1, len(whole) - 1, len(whole)):
        assert bits(list(reader.epoch(1, skip_batches=skip))) == bits(whole[skip:])
        assert reader.report() == report
    with pytest.raises(ValueError, match=f"skip_batches: expected at most {len(whole)}.*got {len(whole) + 1}"):
        list(reader.epoch(1, skip_batches=len(whole) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_skips_without_decoding(tmp_path, monkeypatch, workers):
    """The epoch also has broken samples and a shard that cannot be read."""
    broken = ("k100", {"png": png()[:40], "txt": b"torn"})
    paths = [write(tmp_path / f"{i}.tar", [sample(3 * i), broken, sample(3 * i + 1), sample(3 * i + 2)]) for i in range(7)]
    monkeypatch.setattr(parts, "RETRIES", ())
    os.rename(paths[3], tmp_path / "gone")
    (tmp_path / "3.tar").touch()  # the loader checks that it is there
    make = lambda **options: loader(paths, batch_size=3, workers=workers, drop_last=False, shuffle_buffer=4, **options)  # noqa: E731
    reader, states, whole = make(), [], []
    for batch in reader.epoch(1):
        whole.append(batch)
        states.append(reader.state())
    report = reader.report()
    assert reader.skipped == {"not an image": 6, "unreadable shard": 1}

    calls = Counter()

    def counted(image):
        calls["augmented"] += 1
        return augment(image)

    def tokens(texts):
        calls["tokenized"] += len(texts)
        return tokenizer(texts)

    torch.save(states, tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    for number, state in enumerate(states, 1):
        again = make(transform=counted, tokenizer=tokens)
        calls.clear()
        assert bits(list(again.epoch(1, number, state))) == bits(whole[number:])
        assert again.report() == report
        assert bits(again.state()) == bits(reader.state())
        rest = sum(len(batch["key"]) for batch in whole[number:])
        assert workers or rest <= calls["tokenized"] <= calls["augmented"] <= rest + 2  # leftover samples too
    for path in paths[4:]:  # leaves fewer batches than the run has had
        os.remove(path)
        open(path, "w").close()
    assert list(make().epoch(1, len(whole), states[-1])) == []


def test_a_state_of_another_place_or_batch_size_is_not_used(pattern):
    reader = loader(pattern)
    whole = list(reader.epoch(0))
    state = reader.state()
    assert bits(list(reader.epoch(0, 2, state))) == bits(whole[2:])
    smaller = loader(pattern, batch_size=2)
    assert bits(list(smaller.epoch(0, 10, state))) == bits(list(smaller.epoch(0))[10:])


def test_interrupting_the_process_group_leaves_workers_to_the_trainer(pattern):
    def interrupt(image):
        os.kill(os.getpid(), signal.SIGINT)
        return resize(image)

    assert len(keys(loader(pattern, workers=1, transform=interrupt).epoch(0))) == 20


def test_a_worker_that_dies_while_other_batches_are_read(pattern):
    """A worker of training dies during an evaluation. Training restarts the worker; the evaluation is not affected."""
    whole = keys(loader(pattern, workers=1, batch_size=1).epoch(0))
    reader = loader(pattern, workers=1, batch_size=1)
    batches = reader.epoch(0)
    found = keys([next(batches)])
    (victim,) = multiprocessing.active_children()

    def kill(image):
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
        return resize(image)

    other = loader(pattern, workers=1, transform=kill)
    assert len(keys(other.epoch(0))) == 20
    assert other.restarts == []
    assert found + keys(batches) == whole
    assert len(reader.restarts) == 1


def test_a_failing_transform_names_the_sample(pattern):
    def fail(image):
        raise TypeError("no such image")

    with pytest.raises(RuntimeError, match=r"'k000' of shard '.*train-000000\.tar': TypeError: no such image"):
        next(loader(pattern, transform=fail, shuffle=False).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_without_a_batch_says_why(tmp_path, workers):
    path = write(tmp_path / "a.tar", [sample(0), ("broken", {"png": b"", "txt": b"x"})])
    with pytest.raises(data.EmptyEpochError, match=r"epoch 3 .*a\.tar.* 1 usable.*batch_size 2 .*1 not an image"):
        list(loader(path, batch_size=2, workers=workers).epoch(3))
    empty = write(tmp_path / "b.tar", [])
    with pytest.raises(data.EmptyEpochError, match="0 usable"):
        list(loader(empty, batch_size=2, workers=workers).epoch(0))


@pytest.mark.slow
def test_an_abandoned_epoch_leaves_no_trace(pattern):
    reader = loader(pattern, workers=2, batch_size=2)
    whole = list(reader.epoch(0))
    next(reader.epoch(0))
    assert bits(list(reader.epoch(0))) == bits(whole)


@pytest.mark.parametrize(
    ("name", "least", "got"),
    [
        ("batch_size", 1, 0),
        ("batch_size", 1, 2.5),
        ("captions_per_image", 1, 0),
        ("workers", 0, -1),
        ("shuffle_buffer", 1, 0),
        ("epoch", 0, -1),
        ("skip_batches", 0, -2),
    ],
)
def test_bad_counts(pattern, name, least, got):
    epoch = {"epoch": 0} | {name: got} if name in ("epoch", "skip_batches") else {}
    with pytest.raises(ValueError, match=f"{name}: expected an integer of at least {least}, got {got}"):
        loader(pattern, **({} if epoch else {name: got})).epoch(**epoch)


def features_of(number: int, captions: int) -> np.ndarray:
    """Returns features whose row r of sample n is n + r / 8 everywhere, so that a row identifies its sample."""
    return (number + np.arange(1 + captions)[:, None] / 8 + np.zeros(WIDTH)).astype(np.float16)


def taught(number, features=None):
    key, files = sample(number)
    return key, files | {"teacher.npy": features or npy(features_of(number, 3))}


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return write(tmp_path_factory.mktemp("taught") / "train-0.tar", [taught(i) for i in range(10)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("captions", [1, 2, 3, 5])
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
    assert bits(plain) == bits([{k: v for k, v in batch.items() if not k.startswith("teacher")} for batch in taught])


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


def test_the_stamp_of_a_folder(tmp_path):
    for name, stamp in (("a", {"width": 6, "logit_scale": 10}), ("b", {"width": 6, "logit_scale": 11}), ("c", {"width": 6})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps({"teacher": {"name": "t"} | stamp}))
    path = lambda *names: [str(tmp_path / name / "x.tar") for name in names]  # noqa: E731
    assert data.teacher_stamp(path("a", "a")) == {"name": "t", "width": 6, "logit_scale": 10.0}
    with pytest.raises(data.ShardError, match="features of one teacher, got different ones in '.*a' and '.*b'"):
        data.teacher_stamp(path("a", "b"))
    for names in (("c",), ("none",)):
        with pytest.raises(data.ShardError, match=r"no teacher is named in .*meta.json; make them by `simplclip teacher`"):
            data.teacher_stamp(path(*names))


AUGMENTED = ImageTransform(PreprocessCfg(size=8), AugmentationCfg())


@pytest.mark.parametrize("transform", [AUGMENTED, lambda image: torch.zeros(3, 2, 2)], ids=["ours", "a caller's"])
def test_max_pixels(tmp_path, transform):
    path = write(tmp_path / "a.tar", [sample(0), ("large", {"png": png(size=(30, 20)), "txt": b"x"})])
    reader = loader(path, transform=transform, batch_size=1, max_pixels=599)
    assert keys(reader.epoch(0)) == ["k000"]
    assert reader.skipped == {"image too large": 1}
    assert len(keys(loader(path, transform=transform, batch_size=1, max_pixels=600).epoch(0))) == 2
