"""Synthetic captions: the json of a sample, going on after a stop, and one error for bad input."""

import json

import pytest

from simplclip.teacher import caption
from support.data.pairs import digests, joined, meta, png, sample, write
from support.models import captioners
from support.programs import call, one_line

pytestmark = [pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    captioners.write(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes two shards; the second has captions in txt only, and a broken image."""
    folder = tmp_path_factory.mktemp("in")
    write(folder / "train-0.tar", [sample(i) for i in range(5)])
    in_txt = [(f"t{i}", {"png": png(i), "txt": f" it is {i}\n".encode()}) for i in range(3)]
    write(folder / "train-1.tar", [*in_txt, ("broken", {"png": png()[:60], "txt": b"x"})])
    return folder


def run(source, out, model, workers=0, **drawing):
    drawing = {"n": 2, "prompt": "", "max_tokens": 5, "seed": 0} | drawing
    options = {"batch_size": 4, "workers": workers, "progress": False}
    return caption.run(str(source), out, str(model), drawing, **options)


def test_new_captions_come_after_the_samples_own(source, model, tmp_path):
    summary = run(source / "*.tar", tmp_path / "out", model)
    assert (summary["samples"], summary["written"]) == (8, 2)
    assert summary["skipped"].counts.total() == 1
    before, after = joined(source / "*.tar"), joined(source / "*.tar", tmp_path / "out")
    assert after.pop("broken").captions == ["x"]
    for key, pair in after.items():
        own = before[key].captions
        assert pair.captions[: len(own)] == own
        assert len(set(pair.captions)) == len(own) + 2  # of 30,000 words none is drawn twice
        assert pair.record.get("group") == before[key].record.get("group")
        assert pair.encoded == before[key].encoded
    assert meta(tmp_path / "out")["caption"]["model"] == str(model)


def test_duplicates_and_empty_captions_are_dropped(tmp_path):
    record = {"label": "x", "captions": ["A red  Cat", "ß", 3]}
    files = {"png": png(), "json": json.dumps(record).encode()}
    pair = joined(write(tmp_path / "one.tar", [("k", files)]))["k"]
    drawn = ["a red cat", " ", "a  dog", "A DOG", "SS", "ein Hund"]
    found = json.loads(caption.with_captions(pair, drawn))
    assert found == {"label": "x", "captions": [*pair.captions, "a dog", "ein Hund"]}


def test_a_second_command_goes_on_and_draws_the_same(source, model, tmp_path):
    run(source / "*.tar", tmp_path / "whole", model, workers=2)
    run(source / "train-1.tar", tmp_path / "parts", model)
    assert run(source / "*.tar", tmp_path / "parts", model)["written"] == 1
    assert digests(tmp_path / "parts", "*.tar") == digests(tmp_path / "whole", "*.tar")
    run(source / "*.tar", tmp_path / "other", model, seed=1)
    assert digests(tmp_path / "other", "*.tar") != digests(tmp_path / "whole", "*.tar")


@pytest.mark.parametrize("kind", ["blip", "llava"])
def test_the_prompt_is_no_part_of_a_caption(source, tmp_path, kind):
    captioners.write(tmp_path / "model", kind)
    run(source / "train-1.tar", tmp_path / "out", tmp_path / "model", prompt="a photo of")
    for pair in list(joined(source / "train-1.tar", tmp_path / "out").values())[:3]:
        assert len(pair.captions) == 3
        assert not any("photo" in text or "answer" in text for text in pair.captions)


def test_command(source, model, tmp_path):
    command = ("caption", source / "train-0.tar", "--out", tmp_path / "out", "--max-tokens", 3)
    result = call(*command, "--model", model, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert "5 pairs" in result.output
    assert "to hold what an earlier run" in call(*command, "--model", model, "--n", 2).output
    line = one_line(*command, "--model", tmp_path)
    assert "model: expected an image-to-text model of transformers, got" in line
