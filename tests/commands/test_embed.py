"""`simplclip embed`: features in files, and search in them by text and by image."""

import io
import tarfile

import numpy as np
import pytest
import tiny
import torch
from pairs import call, one_line, table, write
from PIL import Image
from trainer_runs import write_models

import simplclip
from simplclip import embedding
from simplclip.common.errors import InputError
from simplclip.data.loader import EmptyEpochError

NAMES = ("red ring", "green bar", "blue square", "крокодил 鳄鱼", "black wedge")


def drawn(i):
    return tiny.picture(list(tiny.COLOURS.values())[i % 4], tiny.SHAPES[i], size=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes two models, five pairs and three broken samples in shards, and the same images in a folder."""
    folder = tmp_path_factory.mktemp("embed")
    write_models(folder)
    torch.manual_seed(9)
    state = torch.load(folder / "tiny.bin", weights_only=True)
    torch.save(state | {"text_projection": torch.randn_like(state["text_projection"])}, folder / "other.pt")
    samples = [(f"k{i}", {"png": drawn(i), "txt": name.encode()}) for i, name in enumerate(NAMES)]
    bad = [("b1", {"png": b"no", "txt": b"x"}), ("b2", {"txt": b"alone"}), ("b3", {"png": drawn(0)[:60]})]
    write(folder / "a-0.tar", samples[:2] + bad)
    write(folder / "a-1.tar", samples[2:])
    images = folder / "images"
    images.mkdir()
    for i, name in enumerate(NAMES):
        (images / f"{name}.png").write_bytes(drawn(i))
    (images / f"{NAMES[0]}.txt").write_text("a caption beside it")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return f"open_clip:tiny/{folder / 'tiny.bin'}"


@pytest.fixture(scope="module")
def encoder(model):
    return simplclip.load(model, device="cpu")


@pytest.fixture(scope="module")
def expected(encoder):
    return encoder.encode_image([Image.open(io.BytesIO(drawn(i))) for i in range(5)])


def made(folder, out, source="a-{0,1}.tar", **options):
    options = {"workers": 0, "batch_size": 2, "device": "cpu"} | options
    return embedding.embed(str(folder / source), out, **options)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_features_are_those_of_encode_image(folder, model, encoder, expected, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(embedding, "_CHUNK", 2)
    got = made(folder, tmp_path / "f.npz", model=model, dtype=dtype, workers=2)
    assert (got["count"], got["width"], got["weights"]) == (5, encoder.width, encoder.fingerprint())
    assert got["skipped"].counts.total() == 3
    stored = embedding.Stored(tmp_path / "f.npz")
    assert len(stored) == 5
    close = {"rtol": 0, "atol": 1e-3 if dtype == "fp16" else 1e-5}
    torch.testing.assert_close(stored[:], expected, **close)
    torch.testing.assert_close(stored[1:3], expected[1:3], **close)
    if dtype == "fp16":
        assert torch.equal(stored[:], stored[:].half().float())
    rows = stored.rows([4, 0, 3])
    assert [*rows] == [0, 3, 4]
    assert rows[3] == {"key": "k3", "caption": NAMES[3], "shard": str(folder / "a-1.tar"), "image_path": ""}
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]  # nothing temporary is left


def test_find_is_exact_over_many_parts(folder, model, encoder, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("simplclip.retrieval.metrics._TILE_COLUMNS", 2)
    made(folder, tmp_path / "f.npz", model=model)
    query = str(folder / "images" / f"{NAMES[2]}.png")
    found = embedding.find(tmp_path / "f.npz", ["a ring", query], top=4, device="cpu")
    for text, features in (("a ring", encoder.encode_text("a ring")), (query, expected[2:3])):
        scores, order = (features @ expected.T)[0].topk(4)
        assert [hit.row for hit in found[text]] == order.tolist()
        assert [hit.score for hit in found[text]] == pytest.approx(scores.tolist(), abs=2e-3)
        assert [hit.caption for hit in found[text]] == [NAMES[i] for i in order.tolist()]
    assert found[query][0].key == "k2"
    assert len(embedding.find(tmp_path / "f.npz", "a ring", top=99, device="cpu")["a ring"]) == 5


def test_an_image_is_no_hit_of_its_own(folder, model, tmp_path, monkeypatch):
    """A table has as many rows of an image as captions, and none is a hit; another file with the same pixels is a hit."""
    images = [folder / "images" / f"{name}.png" for name in NAMES]
    copy = tmp_path / "copy.png"
    copy.write_bytes(images[2].read_bytes())
    table(tmp_path / "t.csv", [(image, f"caption {n}") for image in (*images, copy) for n in range(3)])
    embedding.embed(str(tmp_path / "t.csv"), tmp_path / "f.npz", model=model, workers=0, device="cpu")
    monkeypatch.chdir(folder)
    query = f"images/{NAMES[2]}.png"
    found = embedding.find(tmp_path / "f.npz", [query, "a ring"], top=4, device="cpu")
    assert [len(hits) for hits in found.values()] == [4, 4]
    assert {hit.image_path for hit in found[query][:3]} == {str(copy)}
    assert found[query][3].score < 0.999
    (all_others,) = embedding.find(tmp_path / "f.npz", query, top=99, device="cpu").values()
    assert len(all_others) == 15


def test_texts(folder, model, encoder, tmp_path):
    (tmp_path / "texts.txt").write_text("\ufeffкрокодил 鳄鱼\n\n a red ring \n", "utf-8")
    result = call(
        "embed", "--texts", tmp_path / "texts.txt", "--model", model, "--out", tmp_path / "t.npz", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert "2 texts" in result.output
    stored = embedding.Stored(tmp_path / "t.npz")
    texts = ["крокодил 鳄鱼", "a red ring"]
    assert [row["caption"] for row in stored.rows([0, 1]).values()] == texts
    torch.testing.assert_close(stored[:], encoder.encode_text(texts), rtol=0, atol=1e-3)
    image = folder / "images" / f"{NAMES[0]}.png"
    result = call("embed", tmp_path / "t.npz", "--find", image, "--find", "crocodile", "--picture", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert "крокодил 鳄鱼" in result.output
    assert Image.open(tmp_path / "p.png").width > 500


def test_the_command_finds_and_draws(folder, model, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)  # the stored path of the model is absolute
    options = ("--model", "open_clip:tiny/tiny.bin", "--workers", 0, "--device", "cpu")
    result = call("embed", "a-0.tar", "a-1.tar", *options, "--out", tmp_path / "f.npz")
    assert result.exit_code == 0, result.output
    assert "5 images" in result.output
    assert "3 skipped" in result.output
    monkeypatch.chdir(tmp_path)
    query = folder / "images" / f"{NAMES[3]}.png"
    result = call("embed", "f.npz", "--find", query, "--find", "$5 [red] ring", "--top", 3, "--picture", "hits.png")
    assert result.exit_code == 0, result.output
    assert "1.000" in result.output
    assert NAMES[3] in result.output
    assert "$5 [red] ring" in result.output
    assert Image.open("hits.png").width > 500


def test_images_are_found_again_or_said_to_be_gone(folder, model, tmp_path, monkeypatch):
    write(tmp_path / "s.tar", [(f"k{i}", {"png": drawn(i)}) for i in range(3)])
    lone = tmp_path / "lone.png"
    lone.write_bytes(drawn(3))
    embedding.embed([str(tmp_path / "s.tar"), str(folder / "images")], tmp_path / "f.npz", model=model, workers=0)
    hits = [h for h in embedding.find(tmp_path / "f.npz", "ring", top=99)["ring"] if h.shard]
    stream = f"pipe:touch {tmp_path / 'ran'}; cat {tmp_path / 's.tar'}"
    shard, gone = str(tmp_path / "s.tar"), str(tmp_path / "gone.png")
    places = [("x", shard, ""), ("k0", stream, ""), ("k0", "s.tar", ""), ("l", "", str(lone)), ("g", "", gone)]
    hits += [embedding.Hit(0.0, 10 + i, key, "", *place) for i, (key, *place) in enumerate(places)]
    monkeypatch.chdir(tmp_path)
    found = embedding.thumbnails(hits)
    assert {*found} == {hit.row for hit in hits[:3]} | {13}
    for hit in hits[:3]:
        assert found[hit.row].tobytes() == Image.open(io.BytesIO(drawn(int(hit.key[1])))).convert("RGB").tobytes()
    assert not (tmp_path / "ran").exists()
    shown = []
    monkeypatch.setattr(embedding, "draw_image", lambda axis, image, *place: shown.append(image.size))
    monkeypatch.setattr(embedding, "draw_text", lambda axis, x, y, text, *rest, **style: shown.append(text))
    (tmp_path / "s.tar").unlink()
    stored = embedding.Stored(tmp_path / "f.npz")
    embedding.picture(tmp_path / "hits.png", embedding.find(stored, "ring", top=99), stored.about)
    assert [size for size in shown if size == (24, 24)] == [(24, 24)] * 5
    assert sum("not found" in text for text in shown if isinstance(text, str)) == 3


def test_another_model_is_an_error_and_one_that_has_moved_may_be_named(folder, model, encoder, tmp_path):
    made(folder, tmp_path / "f.npz", model=model)
    other = f"open_clip:tiny/{folder / 'other.pt'}"
    line = one_line("embed", tmp_path / "f.npz", "--find", "a ring", "--model", other)
    assert f"open_clip:tiny with fingerprint {encoder.fingerprint()}, got open_clip:tiny" in line
    assert simplclip.load(other).fingerprint() in line
    assert embedding.find(tmp_path / "f.npz", "a ring", model=encoder)  # an encoder that is loaded already
    (tmp_path / "m.pt").write_bytes((folder / "tiny.bin").read_bytes())
    made(folder, tmp_path / "g.npz", model=f"open_clip:tiny/{tmp_path / 'm.pt'}")
    (tmp_path / "m.pt").rename(tmp_path / "moved.pt")
    line = one_line("embed", tmp_path / "g.npz", "--find", "a ring")
    assert "m.pt" in line
    assert "--model" in line
    result = call("embed", tmp_path / "g.npz", "--find", "a ring", "--model", f"open_clip:tiny/{tmp_path / 'moved.pt'}")
    assert result.exit_code == 0, result.output


def test_a_failure_leaves_the_earlier_file(folder, model, tmp_path, monkeypatch):
    def full(features, rows):
        raise OSError("No space left on device")

    made(folder, tmp_path / "f.npz", model=model)
    before = (tmp_path / "f.npz").read_bytes()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(EmptyEpochError, match="has no usable sample"):
        made(tmp_path, tmp_path / "f.npz", "empty.tar", model=model)
    with pytest.raises(InputError, match="expected at least one text, got none"):
        embedding.embed(texts=["", " "], out=tmp_path / "f.npz", model=model, device="cpu")
    monkeypatch.setattr(embedding.Features, "__getitem__", full)
    with pytest.raises(OSError, match="No space left"):
        made(folder, tmp_path / "f.npz", model=model)
    assert (tmp_path / "f.npz").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"f.npz", "empty.tar"}


def test_errors_are_one_line(folder, model, tmp_path):
    shard, out = folder / "a-1.tar", ("--out", tmp_path / "f.npz")
    np.savez(tmp_path / "theirs.npz", x=np.zeros(3))
    for arguments, message in (
        (("embed", shard, "--model", model, "--out", tmp_path / "f.csv"), "out: expected a name that ends in .npz"),
        (("embed", shard, *out), "expected --model and --out"),
        (("embed", "--model", model, *out), "source: expected images or texts, got neither"),
        (("embed", tmp_path / "gone", "--model", model, *out), "source: expected a file"),
        (("embed", shard, "--model", model, *out, "--dtype", "int8"), "dtype: expected fp16 or fp32"),
        (("embed", shard, "--picture", "x.png"), "--picture: expected --find"),
        (("embed", "--find", "x"), "--find: expected one file of features"),
        (("embed", tmp_path / "gone.npz", "--find", "x"), "features: no such file"),
        (("embed", tmp_path / "theirs.npz", "--find", "x"), "features: expected a file of simplclip embed"),
    ):
        assert message in one_line(*arguments)
    made(folder, tmp_path / "f.npz", model=model)
    assert "gone.jpg" in one_line("embed", tmp_path / "f.npz", "--find", "gone.jpg")
    assert "gone.txt" in one_line("embed", "--texts", "gone.txt", "--model", model, *out)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "expected a file in UTF-8" in one_line("embed", "--texts", tmp_path / "latin.txt", "--model", model, *out)
