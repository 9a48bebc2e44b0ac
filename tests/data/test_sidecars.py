"""Sidecars: only new files are written; they are joined by key during reading, in order; a misfit is noticed."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from pairs import digests, keys, loader, members, meta, npy, png, sample, write
from runs import bits

from simplclip import data
from simplclip.common import files
from simplclip.data import parts, shards
from simplclip.data.broken import Skipped
from simplclip.data.rewrite import rewrite
from simplclip.data.tar import Span

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

STAMP = {"teacher": {"name": "made up", "width": 6, "logit_scale": 10.0}}


def features(opened):
    """Returns features whose row r of sample n is n + r / 8 everywhere."""
    number = int(opened.files["__key__"][1:])
    rows = number + np.arange(1 + len(opened.captions))[:, None] / 8 + np.zeros(6)
    return {"teacher.npy": npy(rows.astype(np.float16))}


def teach(samples):
    return [features(opened) for opened in samples]


def recaption(samples):
    return [{"json": json.dumps({"captions": [f"new {s.files['__key__']}"]}).encode()} for s in samples]


def run(shards, out, process=teach, *, stamp=STAMP, sidecar=True, batch_size=4, **options):
    options |= {"stamp": stamp, "sidecar": sidecar, "batch_size": batch_size}
    return rewrite(str(shards), out, process, progress=False, **options)


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, start, stop in (("train-0", 0, 7), ("train-1", 7, 12)):
        write(source / f"{name}.tar", [sample(i) for i in range(start, stop)])
    (source / "meta.json").write_text(json.dumps({"format": "other", "seed": 3, "splits": {}}))
    return source


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def read(shard, *sidecars, skipped=None):
    found = shards.read_shard(str(shard), skipped or Skipped(), sidecars=sidecars)
    return {sample["__key__"]: sample for sample in found}


def test_only_what_is_new_is_written(folder, out):
    before = digests(folder)
    summary = run(folder / "*.tar", out)
    assert (summary["shards"], summary["written"], summary["samples"], summary["notes"]) == (2, 2, 12, [])
    assert list(members(out / "train-0.tar")) == [f"k{i:03d}.teacher.npy" for i in range(7)]
    assert digests(folder) == before
    found = meta(out)
    assert found.items() >= STAMP.items()
    assert "seed" not in found  # the entries of the data's own meta.json are not copied
    entry = found["splits"]["train"]["shards"]["train-1.tar"]
    assert (entry["samples"], entry["source"]) == (5, files.identity(folder / "train-1.tar"))


def test_files_are_joined_by_key_and_read_when_needed(folder, out, tmp_path):
    run(folder / "*.tar", out)
    run(folder / "*.tar", tmp_path / "captions", recaption, stamp={"caption": {}})
    joined = read(folder / "train-1.tar", out, tmp_path / "captions")
    plain = read(folder / "train-1.tar")
    assert list(joined) == list(plain)
    for key, files_ in joined.items():
        assert all(isinstance(value, Span) for suffix, value in files_.items() if not suffix.startswith("__"))
        found = shards.contents(files_)
        assert found["teacher.npy"] == members(out / "train-1.tar")[f"{key}.teacher.npy"]
        assert found["__url__"] == plain[key]["__url__"]
        assert found["png"] == shards.contents(plain[key])["png"]
        assert shards.parse(found).captions == [f"new {key}"]


def test_of_one_suffix_the_last_folder_counts(folder, tmp_path):
    for name in "ab":
        run(folder / "*.tar", tmp_path / name, lambda batch, name=name: [{"json": name.encode()} for _ in batch])
    for order in ("ab", "ba"):
        found = read(folder / "train-0.tar", *(tmp_path / name for name in order))
        assert {shards.contents(s)["json"] for s in found.values()} == {order[-1].encode()}
    # A later teacher's features replace the views of an earlier teacher, too.
    run(folder / "*.tar", tmp_path / "c", lambda batch: [f | {"views.json": b"[{}]"} for f in teach(batch)])
    run(folder / "*.tar", tmp_path / "d")
    assert "views.json" in read(folder / "train-0.tar", tmp_path / "d", tmp_path / "c")["k000"]
    assert "views.json" not in read(folder / "train-0.tar", tmp_path / "c", tmp_path / "d")["k000"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_shards_with_copies(folder, out, tmp_path, workers):
    run(folder / "*.tar", out)
    run(folder / "*.tar", tmp_path / "copies", sidecar=False)
    options = {"teacher": True, "workers": workers, "captions_per_image": 2, "drop_last": False}
    joined = loader(str(folder / "*.tar"), sidecars=[out], **options)
    batches = list(joined.epoch(1))
    assert bits(batches) == bits(list(loader(str(tmp_path / "copies" / "*.tar"), **options).epoch(1)))
    assert len(keys(batches)) == 12
    for batch in batches:
        assert [int(key[1:]) for key in batch["key"]] == batch["teacher_image"][:, 0].tolist()
    again = joined.epoch(1)
    next(again)
    assert bits(list(joined.epoch(1, 1, joined.state()))) == bits(batches[1:])


def test_compressed_data_have_plain_sidecars(folder, out):
    path = folder / "train-0.tar"
    (folder / "train-2.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    run(folder / "train-2.tar.gz", out)
    assert [p.name for p in out.glob("*.tar")] == ["train-2.tar"]
    found = read(folder / "train-2.tar.gz", out)
    assert len(found) == 7
    assert all("teacher.npy" in sample for sample in found.values())


def test_the_stamp_is_that_of_the_last_sidecars(folder, tmp_path):
    files_ = data.expand(str(folder / "*.tar"))
    for name, stamp in (("a", STAMP), ("b", {"teacher": STAMP["teacher"] | {"width": 8}}), ("c", {"caption": {}})):
        run(folder / "*.tar", tmp_path / name, stamp=stamp)
    a, b, c = (tmp_path / name for name in "abc")
    assert data.teacher_stamp(files_, [a, b, c])["width"] == 8
    assert data.teacher_stamp(files_, [b, a])["width"] == 6
    (folder / "meta.json").write_text(json.dumps({"teacher": STAMP["teacher"] | {"width": 9}}))
    assert data.teacher_stamp(files_, [c])["width"] == 9
    (folder / "meta.json").unlink()
    with pytest.raises(data.ShardError, match=r"no teacher is named in .*c/meta.json or .*in/meta.json"):
        data.teacher_stamp(files_, [c])


def test_what_is_missing_is_named(folder, out, monkeypatch):
    run(folder / "train-0.tar", out)
    message = r"shard '.*in/train-1.tar' has no sidecar '.*out/train-1.tar'; run the command"
    with pytest.raises(data.ShardError, match=message):
        read(folder / "train-1.tar", out)
    with pytest.raises(data.ShardError, match=message):
        loader(str(folder / "*.tar"), sidecars=[out])
    with pytest.raises(ValueError, match="sidecars: expected folders, got '.*none', which is none"):
        loader(str(folder / "*.tar"), sidecars=[out.parent / "none"])
    with pytest.raises(ValueError, match="sidecars: expected a list of folders, got"):
        loader(str(folder / "*.tar"), sidecars=str(out))
    (out / "train-1.tar").write_bytes((out / "train-0.tar").read_bytes())
    reader = loader(str(folder / "train-1.tar"), sidecars=[out], teacher=True)
    with pytest.raises(data.ShardError, match=r"sample 'k\d+' of shard '.*train-1.tar' has no teacher features"):
        list(reader.epoch(0))
    (out / "train-1.tar").write_bytes((out / "train-0.tar").read_bytes()[:1500])
    monkeypatch.setattr(parts, "RETRIES", ())
    with pytest.raises(data.ShardError, match=r"sidecar '.*out/train-1.tar' cannot be read: .*; make it again"):
        list(loader(str(folder / "train-1.tar"), sidecars=[out], on_error="stop").epoch(0))


def test_shards_that_have_changed_since_are_noticed(folder, out, tmp_path):
    run(folder / "*.tar", out)
    run(folder / "*.tar", tmp_path / "captions", recaption, stamp={"caption": {}})
    write(folder / "train-1.tar", [sample(i) for i in range(30, 60)])
    with pytest.raises(data.ShardError, match=r"'.*train-1.tar' has changed since its sidecar '.*out/train-1.tar' was made"):
        loader(str(folder / "*.tar"), sidecars=[out])
    with pytest.raises(data.ShardError, match=r"'.*train-1.tar' has changed since its sidecar '.*captions/train-1.tar'"):
        run(folder / "*.tar", out, sidecars=[tmp_path / "captions"])
    assert run(folder / "*.tar", out)["written"] == 1
    assert len(keys(loader(str(folder / "*.tar"), sidecars=[out], teacher=True, drop_last=False).epoch(0))) == 37


def test_features_are_made_again_where_the_captions_are_others(folder, out, tmp_path):
    captions = tmp_path / "captions"
    run(folder / "*.tar", captions, recaption, stamp={"caption": {}})
    assert run(folder / "*.tar", out)["written"] == 2
    for written in (2, 0):
        assert run(folder / "*.tar", out, sidecars=[captions])["written"] == written
    for row in loader(str(folder / "*.tar"), sidecars=[captions, out], teacher=True, batch_size=1).epoch(0):
        assert row["meta"][0]["captions"] == [f"new {row['key'][0]}"]
        assert row["teacher_text"].eq(int(row["key"][0][1:]) + 1 / 8).all()
    with pytest.raises(data.ShardError, match="features of 1 captions, but 3 captions: the captions have changed since"):
        list(loader(str(folder / "*.tar"), sidecars=[out], teacher=True).epoch(0))
    (captions / "train-1.tar").unlink()
    run(folder / "train-1.tar", captions, lambda b: [{"json": b'{"captions": ["x", "y"]}'}] * len(b), stamp={"caption": {}})
    assert run(folder / "*.tar", out, sidecars=[captions])["written"] == 1


def test_broken_samples_have_no_files_and_are_skipped_in_training(tmp_path, out):
    samples = [sample(0), ("k001", {"png": png(1)[:200], "txt": b"one"}), ("k002", {"png": b"no image", "txt": b"one"})]
    path = write(tmp_path / "a.tar", [*samples, ("k003", {"txt": b"one"}), sample(4)])
    summary = run(path, out)
    broken = {"truncated image": 1, "not an image": 1, "missing image": 1}
    assert dict(summary["skipped"].counts) == broken
    assert summary["notes"][0].startswith("Left out, or lost by damage: 3 skipped")
    assert list(members(out / "a.tar")) == ["k000.teacher.npy", "k004.teacher.npy"]
    reader = loader(path, sidecars=[out], teacher=True, batch_size=1)
    assert sorted(keys(reader.epoch(0))) == ["k000", "k004"]
    assert reader.skipped == broken


def test_a_key_that_comes_again_is_counted_not_mistaken(tmp_path, out):
    key, other = sample(0)[0], sample(1)[1]
    path = write(tmp_path / "a.tar", [sample(0), sample(2), (key, other)])
    assert run(path, out)["skipped"].counts == Counter({"duplicate key in tar": 1})
    skipped = Skipped()
    found = read(path, out, skipped=skipped)
    assert skipped.counts == Counter({"duplicate key in tar": 1})
    assert shards.contents(found[key])["png"] == sample(0)[1]["png"]
    assert len(read(path)) == 2  # three samples, but two keys
    assert len(list(shards.read_shard(path, Skipped()))) == 3


def test_sidecars_belong_to_tars_of_different_names(folder, out, tmp_path):
    run(folder / "*.tar", out)
    other = tmp_path / "other"
    other.mkdir()
    write(other / "train-0.tar", [sample(30)])
    both = [str(folder / "*.tar"), str(other / "*.tar")]
    with pytest.raises(ValueError, match="expected shards of different file names, got .*train-0.tar. and .*other"):
        loader(both, sidecars=[out])
    twice = [{"shards": str(folder / "train-0.tar"), "weight": 2}, str(folder / "train-1.tar")]
    found = keys(loader(twice, sidecars=[out], teacher=True, drop_last=False, batch_size=1).epoch(0))
    assert Counter(found) == Counter({f"k{i:03d}": 1 + (i < 7) for i in range(12)})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    (tmp_path / "images" / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="sidecars: expected tars, beside which they lie, got '.*images'"):
        loader(str(tmp_path / "images"), sidecars=[out])


def test_streams_have_sidecars_by_their_file_names(folder, out):
    run(folder / "*.tar", out)
    reader = loader(f"pipe:cat {folder / 'train-1.tar'}", sidecars=[out], teacher=True, batch_size=1)
    for batch in reader.epoch(0):
        assert batch["teacher_image"].eq(int(batch["key"][0][1:])).all()
