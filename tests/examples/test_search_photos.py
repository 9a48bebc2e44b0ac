"""examples/search_photos.py on a folder of small photos: a photo finds itself, and only new and
changed photos are encoded.
"""

import io
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import simplclip
from support.models.open_clip_models import write_models
from support.programs import load_example
from support.train import tiny

search = load_example("search_photos")


@pytest.fixture
def model(tmp_path):
    write_models(tmp_path)
    return f"open_clip:tiny/{tmp_path / 'tiny.bin'}"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "WORKERS", 0)
    monkeypatch.setattr(search, "HITS", 3)
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for shape in tiny.SHAPES[:4]:
        picture = tiny.picture(tiny.COLOURS["red"], shape, size=24)
        (folder / "trip" / f"{shape}.png").write_bytes(picture)
    (folder / "notes.txt").write_text("no photo")
    (folder / "broken.jpg").write_bytes(b"no photo either")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    return folder


def test_photos_are_found_and_drawn(photos, model, tmp_path, capsys):
    query = str(photos / "trip" / "ring.png")
    ring = Image.open(io.BytesIO(tiny.picture(tiny.COLOURS["blue"], "ring", size=24)))
    # encoded as a file is, resized before its alpha goes
    ring.putalpha(Image.effect_noise(ring.size, 200))
    ring.save(photos / "trip" / "ring.png")
    picture = str(tmp_path / "hits.png")
    queries = ["--find", query, "$5 [red] ring"]
    search.main([str(photos), "--model", model, *queries, "--picture", picture])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"weights: {model}"
    assert "searching 5 photos" in printed
    assert any(line.startswith(f"skipped {photos / 'broken.jpg'}") for line in printed)
    hits = printed[printed.index(query) + 1 :]
    assert hits[0].split() == ["1.000", query]
    scores = [float(line.split()[0]) for line in hits[:3]]
    assert scores == sorted(scores, reverse=True)
    assert hits[3] == "$5 [red] ring"
    assert Image.open(picture).width > 400
    with np.load(tmp_path / "photos.npz") as stored:
        assert len(stored["paths"]) == 5
        paths = [str(path) for path in stored["paths"]]
        expected = simplclip.load(model, device="cpu").encode_image(paths)
        np.testing.assert_allclose(stored["features"], expected, atol=1e-3)


@pytest.mark.parametrize("source", ["gone/last.pt", "open_clip:ViT-B-32/gone.bin"])
def test_a_model_that_is_not_there_ends_in_one_line(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"--model: \w+: expected .+, got .*gone") as end:
        search.main(["photos", "--model", source, "--find", "a cat"])
    assert "\n" not in end.value.code


@pytest.mark.parametrize(
    ("source", "step", "expected"),
    [
        ("run/best.pt", 25, "run/best.pt, step 25"),
        ("run", 50, "run/last.pt, step 50"),
        ("open_clip:tiny/tiny.bin", None, "open_clip:tiny/tiny.bin"),
    ],
)
def test_the_weights_are_named(tmp_path, monkeypatch, source, step, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").touch()
    assert search.weights_of(SimpleNamespace(source=source, step=step)) == expected


def test_only_new_and_changed_photos_are_encoded_and_another_model_encodes_all(
    photos, model, tmp_path, monkeypatch
):
    search.main([str(photos), "--model", model, "--find", "a ring"])
    (photos / "new.png").write_bytes(tiny.picture(tiny.COLOURS["green"], "bar", size=24))
    (photos / "trip" / "bar.png").unlink()
    changed = photos / "trip" / "square.png"
    changed.write_bytes(tiny.picture(tiny.COLOURS["blue"], "square", size=25))
    opened = mock.Mock(side_effect=search.opened)
    monkeypatch.setattr(search, "opened", opened)
    search.main([str(photos), "--model", model, "--find", "a ring"])
    encoded = [photos / "broken.jpg", photos / "gone.jpg", photos / "new.png", changed]
    assert opened.call_args_list == [mock.call(str(path)) for path in encoded]
    state = torch.load(tmp_path / "tiny.bin", weights_only=True)
    state["text_projection"] = torch.randn_like(state["text_projection"])
    torch.save(state, tmp_path / "other.pt")
    opened.reset_mock()
    other = f"open_clip:tiny/{tmp_path / 'other.pt'}"
    search.main([str(photos), "--model", other, "--find", "a ring"])
    assert opened.call_count == 6
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty: expected photos"):
        search.main([str(tmp_path / "empty"), "--model", model, "--find", "a ring"])


@pytest.mark.parametrize("query", ["nix.jpg", "NIX.TIFF", "photos/beach"])
def test_a_path_of_no_photo_is_not_searched_as_words(tmp_path, capsys, query):
    with pytest.raises(SystemExit):
        search.main([str(tmp_path), "--model", "none", "--find", "a dot. a car", query])
    message = f"expected words or the path of a photo, got no file {query!r}"
    assert message in capsys.readouterr().err


def test_names_that_are_not_utf8_long_queries_and_a_folder_that_cannot_be_written(
    photos, model, tmp_path, monkeypatch, capsys
):
    latin = b"caf\xe9.png".decode(errors="surrogateescape")
    (photos / latin).write_bytes(tiny.picture(tiny.COLOURS["red"], "ring"))
    (photos / latin).with_suffix(".jpg").write_bytes(b"no photo")

    def refuse(path):
        raise PermissionError(f"no writing to {path}")

    monkeypatch.setattr(search, "replacing", refuse)
    long = "a red ring " * 30
    picture = str(tmp_path / "hits.png")
    query = str(photos / latin)
    search.main([str(photos), "--model", model, "--find", long, query, "--picture", picture])
    printed = capsys.readouterr().out
    printed.encode()
    assert f"the features are not kept: no writing to {tmp_path / 'photos.npz'}" in printed
    hits = printed[printed.index(long) :].splitlines()
    assert hits[5].split() == ["1.000", str(photos / r"caf\udce9.png")]
    assert Image.open(picture).width > 400
    assert not (tmp_path / "photos.npz").exists()
