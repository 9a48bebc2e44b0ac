"""Names, patterns, captions from elsewhere: each is read, counted or refused; none runs."""

import json
from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer

from simplclip import data, evaluation
from simplclip.common.errors import InputError
from simplclip.data import samples
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.shards import read_tar
from support.data.pairs import png, write
from support.evaluation import batches_of, index_of


def read(source) -> list[str]:
    return [
        sample["__key__"] for tar in data.sources_of(source) for sample in read_tar(tar, Skipped())
    ]


NAMES = {
    "a command": "pipe:touch canary; cat a.tar",
    "a substitution": "$(touch canary).tar",
    "a flag": "--out.tar",
    "a line end": "a\nb.tar",
    "an escape sequence": "\x1b]0;owned\x07\x1b[31m.tar",
    "no UTF-8": "\udcff\udcfe.tar",
    "markup": "[red][=] [link=x].tar",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_file_is_a_file_whatever_it_is_called(tmp_path, name):
    samples = [
        ("k", {"png": png(), "txt": b"x"}),
        (key := "[/red] \x1b[31m", {"png": b"", "txt": b"x"}),
    ]
    write(tmp_path / "here" / name, samples)
    assert read("*.tar") == read(name) == read(Path(name)) == read([name]) == ["k", key]
    ((_, (row,), _),), skipped = batches_of(data.held_out("*.tar"))
    assert (row.captions, row.position) == (["x"], 0)
    assert not {"\x1b", "\x07"} & {*str(skipped)}


def test_a_folder_whose_name_begins_as_a_command(tmp_path):
    """The folder's shards do not become commands, not even missing shards."""
    folder = tmp_path / "here" / "pipe:touch canary;" / "test"
    folder.mkdir(parents=True)
    write(folder / "0.tar", [("k", {"png": png(), "txt": b"x", "cls": b"0"})])
    (folder / "nshards.txt").write_text("1")
    found = data.held_out("pipe:touch canary;")
    assert len(batches_of(found)[0]) == 1
    for number in ("2", "9" * 5000):
        (folder / "nshards.txt").write_text(number)
        with pytest.raises(InputError, match="1.tar', which does not exist|number of shards"):
            data.held_out("pipe:touch canary;")


def test_names_in_a_meta_json_are_not_run(tmp_path):
    write(tmp_path / "here" / "a.tar", [("k", {"png": png(), "txt": b"x"})])
    name = "pipe:touch canary"
    entry = {"samples": 1, "bytes": 1, "source": {"bytes": 1}}
    content = {"splits": {"x": {"shards": {name: entry}}}, "packed": name, "source": name}
    Path("meta.json").write_text(json.dumps(content))
    assert data.dataset_size("a.tar") is None
    assert read("*.tar") == ["k"]


def files(**content):
    texts = {name: text.encode() for name, text in content.items() if isinstance(text, str)}
    return {"png": png()} | content | texts


WORDS = "0123456789abcdefghij" * 5_000
# files of a sample -> its captions, or the reason that is counted
SAMPLES = {
    "a lone surrogate": (files(json=r'{"caption": "a \ud800 b"}'), ["a ? b"]),
    "a surrogate pair": (files(json=r'{"caption": "\ud83d\ude00"}'), ["😀"]),
    "latin-1": (files(txt=b"caf\xe9"), "caption not UTF-8"),
    "a long word": (files(txt=WORDS), [WORDS[: samples.LONGEST]]),
    "lists in lists": (files(json='{"caption": ' + "[" * 100_000), "bad json"),
    "a number of 5,000 digits": (files(json='{"captions": 1' + "0" * 5000 + "}"), "bad json"),
    "no object": (files(json='["x"]'), "bad json"),
    "markup and escapes": (files(txt="[/red] \x1b[31m"), ["[/red] \x1b[31m"]),
}


@pytest.mark.parametrize(("content", "expected"), SAMPLES.values(), ids=SAMPLES)
def test_captions_are_used_or_counted(content, expected):
    write("a.tar", [("k", content)])
    tokenizer = SimpleTokenizer(context_length=8)
    expected = ([], {expected: 1}) if isinstance(expected, str) else (expected, {})
    skipped, captions = Skipped(), []
    for sample in read_tar(data.sources_of("a.tar")[0], skipped):
        try:
            captions += samples.parse(sample).captions
        except BrokenSample as broken:
            skipped.add(broken.reason, "a.tar/k", broken.args[1])
    assert (captions, dict(skipped.counts)) == expected
    index = index_of(data.held_out("a.tar"))
    str(index.data.nothing_usable(index.skipped)).encode()
    assert (index.captions, dict(index.skipped.counts)) == expected
    assert captions == [] or tokenizer(captions).shape == (1, 8)
    assert len(str(skipped)) < 1000
    for caption in captions:
        json.dumps(caption, ensure_ascii=False).encode()


def test_names_of_classes_in_latin_1_are_refused():
    write("a.tar", [("k", {"png": png(), "cls": b"0"})])
    Path("c.txt").write_bytes(b"caf\xe9\nx\n")
    message = "expected imagenet or a file of names, got c.txt: .*utf-8"
    with pytest.raises(InputError, match=message):
        evaluation.named(data.held_out("a.tar"), "c.txt")
