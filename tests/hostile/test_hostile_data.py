"""Names, list files, patterns, tables, captions from elsewhere: each is read, counted or refused in one line; none runs."""

import json
import os
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from pairs import call, one_line, png, write

from simplclip import data, evaluation
from simplclip.common import plotting
from simplclip.common.errors import InputError
from simplclip.data import shards, text
from simplclip.data.addresses import is_address
from simplclip.data.broken import Skipped
from simplclip.data.parts import read_part


def read(source) -> list[str]:
    return [sample["__key__"] for part in data.parts_of(source) for sample in read_part(part, Skipped())]


NAMES = {
    "a command": "pipe:touch canary; cat a.tar",
    "a mapping": "{shards: 'pipe:touch canary'}.tar",
    "a command that ends in the name of a table": "pipe:touch canary; x.csv.tar",
    "the start of a URL": "http:.tar",
    "a substitution": "$(touch canary).tar",
    "a flag": "--out.tar",
    "a line end": "a\nb.tar",
    "an escape sequence": "\x1b]0;owned\x07\x1b[31m.tar",
    "no UTF-8": "\udcff\udcfe.tar",
    "markup": "[red][=] [link=x].tar",
    "a pattern": "{1..3}[a]*.tar",
    "a formula": "$\\frac{$.tar",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_file_is_a_file_whatever_it_is_called(tmp_path, name):
    samples = [("k", {"png": png(), "txt": b"x"}), (key := "[/red] \x1b[31m", {"png": b"", "txt": b"x"})]
    write(tmp_path / "here" / name, samples)
    assert read("*.tar") == read(name) == read(Path(name)) == read([name]) == ["k", key]
    (tmp_path / "here" / "list.txt").write_bytes(os.fsencode(f"#\n{name}\n"))
    assert "\n" in name or read("list.txt") == ["k", key]
    found = data.held_out("*.tar")
    assert [found.open(sample).captions for sample in found.samples(Skipped())] == [["x"], ["x"]]
    result = call("data", "report", "--workers", 1, "--sample", 2, "--", name)
    assert result.exit_code == 0, result.output
    assert "2 in 1 file," in result.output
    assert not {"\x1b", "\x07", "\udcff"} & {*result.output}


def test_a_folder_whose_name_begins_as_a_command(tmp_path):
    """The folder's shards do not become commands, not even missing shards."""
    folder = tmp_path / "here" / "pipe:touch canary;" / "test"
    folder.mkdir(parents=True)
    write(folder / "0.tar", [("k", {"png": png(), "txt": b"x", "cls": b"0"})])
    (folder / "nshards.txt").write_text("1")
    found = data.held_out("pipe:touch canary;")
    assert len(list(found.samples(Skipped()))) == 1
    for number in ("2", "99999999", "9" * 5000):
        (folder / "nshards.txt").write_text(number)
        with pytest.raises(InputError, match="1.tar', which does not exist|the number of shards"):
            data.held_out("pipe:touch canary;")


def test_what_a_pattern_finds_in_a_folder_called_http(tmp_path):
    Path("http:/x").mkdir(parents=True)
    write(tmp_path / "here/http:/x/a.tar", [("k", {"png": png(), "txt": b"x"})])
    assert read("http://x/a.tar") == read(data.expand("http://x/a.tar")) == ["k"]  # the file exists
    assert is_address(data.parts_of("http://x/*.tar")[0].url)  # no file has this name
    with pytest.raises(InputError, match=r"expected local tars, got 'http://x/\*.tar'"):
        data.expand("http://x/*.tar")


LISTS = {
    "a command": ("pipe:touch canary", "expected a path or URL in a list file"),
    "a list file": ("list.txt", "expected no list file in a list file"),
    "a file:// URL": ("file:///etc/passwd", "of other places the output of a command"),
    "an s3:// URL": ("s3://bucket/a.tar", "of other places the output of a command"),
    "a name with NUL": ("a\0.tar", "which does not exist"),
    "braces": ("{1..1000000000}.tar", "at most 1,000,000 names"),
    "escape sequences": ("\x1b[2J.tar", "which matches none"),
    "no line": ("# nothing", "which has none"),
}


@pytest.mark.parametrize(("line", "message"), LISTS.values(), ids=LISTS)
def test_a_list_file_is_refused_in_a_line(line, message):
    Path("list.txt").write_text(line)
    with pytest.raises(InputError, match=message):
        data.parts_of("list.txt")
    assert "\x1b" not in one_line("data", "pack", "list.txt", "--out", "packed")


PATTERNS = {
    "a range": "{1..1000000000}.tar",
    "a range of a URL": "http://127.0.0.1/{1..1000000000}.tar",
    "a range of 30 digits": f"{{0..{'9' * 30}}}.tar",
    "a range of 5,000 digits": f"{{0..{'9' * 5000}}}.tar",
    "a product": "http://127.0.0.1/" + "{a,b}" * 40,
    "a product within an alternative": "{" + "{a,b}" * 40 + ",c}.tar",
    "a closed brace too much": "http://127.0.0.1/a}.tar",
    "an open brace": "http://127.0.0.1/{a.tar",
    "nested braces": "{a," * 5000 + "}" * 5000,
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_of_too_many_names_is_refused(pattern):
    with pytest.raises(InputError, match=r"shards: expected (a pattern of at|a brace pattern|as many|braces in)") as error:
        data.parts_of(pattern)
    assert len(str(error.value)) < 400


def test_a_pattern_of_many_names_is_not():
    assert len(data.parts_of("http://host/{00000..09999}.tar")) == 10000
    assert len(data.parts_of("http://host/{{a,b}/{0..999},c/{a..d}}.tar")) == 2004


HEAD = b"filepath,title\n"
ROW = b"a.png,one\n"
LONG = b"a.png," + b"x" * 200_000 + b"\n"
# table -> its captions and counts, or the error
TABLES = {
    "latin-1": (HEAD + ROW + b"a.png,caf\xe9\n", (["one"], {"caption not UTF-8": 1})),
    "a mark of UTF-8": (b"\xef\xbb\xbf" + HEAD + ROW, (["one"], {})),
    "UTF-16": ("filepath,title\na.png,one\n".encode("utf-16"), "expected a table in UTF-8, got .* in UTF-16"),
    "old line ends": (b"filepath,title\ra.png,one\r", r"whose lines end in .* with \\r alone"),
    "a carriage return in a row": (HEAD + ROW + b"a.png,t\rw\n", (["one"], {"bad row": 1})),
    "a long caption": (HEAD + ROW + LONG + ROW, (["one", "one"], {"bad row": 1})),
    "NUL in a caption": (HEAD + ROW + b"a.png,t\0w\n", (["one", "t\ufffdw"], {})),
    "a surrogate in UTF-8": (HEAD + b"a.png,\xed\xa0\x80\n" + ROW, (["one"], {"caption not UTF-8": 1})),
    "a line of 40 MB": (HEAD + b"x" * 40_000_000 + b"\n" + ROW, (["one"], {"bad row": 0})),
    "a long header": (b"x" * 200_000 + b",title\n" + ROW, "with a line of columns, got .*field larger"),
    "no table": (b"\x89PNG\0\0\0\0\n" * 9, "expected a table with a column"),
    "empty": (b"", "expected a table with a column"),
}


@pytest.mark.parametrize(("content", "expected"), TABLES.values(), ids=TABLES)
def test_what_a_table_says_is_read_or_counted(content, expected):
    Path("a.png").write_bytes(png())
    Path("t.csv").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            data.parts_of("t.csv")
        return
    skipped = Skipped()
    samples = [sample for part in data.parts_of("t.csv") for sample in read_part(part, skipped)]
    assert [shards.parse(sample).captions[0] for sample in samples] == expected[0]
    assert skipped.counts.keys() == expected[1].keys()
    assert all(skipped.counts[reason] == number or not number for reason, number in expected[1].items())


PLACES = {
    "a command": "pipe:touch canary",
    "a URL": "http://127.0.0.1:9/a.png",
    "a name with NUL": "a\0.png",
    "a name that is too long": "a" * 5000,
    "a pipe that nobody writes to": "fifo.png",
    "a device without end": "/dev/zero",
    "a folder": ".",
    "another host's file": "//host/share/a.png",
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_a_table_names_is_a_file_or_counted(place):
    os.mkfifo("fifo.png")
    Path("a.png").write_bytes(png())
    Path("t.csv").write_text(f"filepath,title\na.png,one\n{place},two\n")
    skipped = Skipped()
    for part in data.parts_of("t.csv"):
        list(shards.usable(read_part(part, skipped), skipped))
    assert skipped.counts.total() == 1
    split = evaluation.Split(data.held_out("t.csv"), None, lambda image: torch.zeros(3, 2, 2))
    assert [len(batch) for batch in split.read(4)] == [1]
    assert split.skipped.counts == skipped.counts
    split.report().encode()


def files(**content):
    return {"png": png(), **{name: value if isinstance(value, bytes) else value.encode() for name, value in content.items()}}


WORDS = "0123456789abcdefghij" * 500_000
# files of a sample -> its captions, or the reason that is counted
SAMPLES = {
    "a lone surrogate": (files(json=r'{"caption": "a \ud800 b"}'), ["a \ufffd b"]),
    "a surrogate pair": (files(json=r'{"caption": "\ud83d\ude00"}'), ["😀"]),
    "a mark in txt": (files(txt=b"\xef\xbb\xbfone"), ["one"]),
    "NUL": (files(txt=b"a\0b"), ["a\ufffdb"]),
    "latin-1": (files(txt=b"caf\xe9"), "caption not UTF-8"),
    "UTF-16": (files(txt="one".encode("utf-16")), "caption not UTF-8"),
    "10 MB of a word": (files(txt=WORDS), [WORDS[: text.LONGEST]]),
    "10 MB of spaces": (files(txt=" " * 10_000_000), "empty caption"),
    "20 MB of a word": (files(txt=2 * WORDS), "file too large"),
    "20 MB of json": (files(json=json.dumps({"caption": 2 * WORDS})), "file too large"),
    "NaN and a key twice": (files(json='{"label": NaN, "caption": "x", "caption": "y", "group": Infinity}'), ["y"]),
    "lists in lists": (files(json='{"caption": ' + "[" * 100_000), "bad json"),
    "a number of 5,000 digits": (files(json='{"captions": 1' + "0" * 5000 + "}"), "bad json"),
    "a number for a caption": (files(json='{"caption": 5, "captions": [null, {}, "x"]}'), ["x"]),
    "a label of 5,000 digits": (files(json='{"caption": "x", "label": "1' + "0" * 5000 + '"}'), ["x"]),
    "no object": (files(json='["x"]'), "bad json"),
    "a formula": (files(txt=r"\$\frac{$ $_$ $"), [r"\$\frac{$ $_$ $"]),
    "markup and escapes": (files(txt="[/red] \x1b[31m"), ["[/red] \x1b[31m"]),
}


@pytest.mark.parametrize(("content", "expected"), SAMPLES.values(), ids=SAMPLES)
def test_captions_are_used_or_counted(content, expected):
    write("a.tar", [("k", content)])
    tokenizer = SimpleTokenizer(context_length=8)
    for found in (data.held_out("a.tar"), data.parts_of("a.tar")):
        skipped, captions = Skipped(), []
        if isinstance(found, list):
            for part in found:
                for opened in shards.usable(read_part(part, skipped), skipped):
                    captions += opened.captions
        else:
            split = evaluation.Split(found, tokenizer, lambda image: torch.zeros(3, 2, 2))
            try:
                list(split.read(4))
            except data.EmptyEpochError as error:
                str(error).encode()
            captions, skipped = split.captions, split.skipped
        assert (captions, dict(skipped.counts)) == (([], {expected: 1}) if isinstance(expected, str) else (expected, {}))
        assert captions == [] or tokenizer(captions).shape == (1, 8)
        assert len(str(skipped)) < 1000
        for caption in captions:
            json.dumps(caption, ensure_ascii=False).encode()
            figure, axis = plotting.sheet(4, 2, 1)
            plotting.draw_text(axis, 0, 0, plotting.wrapped(caption, 20, 2), 9)
            plotting.write(figure, Path("x.png"))


CLASSES = {
    "latin-1": ("c.txt", b"caf\xe9\nx\n", "expected imagenet or a file of names, got c.txt: .*utf-8"),
    "NUL": ("c.txt", b"a\nb\0\n", ["a", "b\ufffd"]),
    "marks and spaces": ("c.txt", b"\xef\xbb\xbfone\n\n two\n", ["one", "two"]),
    "20 MB of a name": ("c.txt", b"a\n" + b"b" * 20_000_000, ["a", "b" * text.LONGEST]),
}


@pytest.mark.parametrize(("name", "content", "expected"), CLASSES.values(), ids=CLASSES)
def test_names_of_classes(name, content, expected):
    Path(name).write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            evaluation.class_names(name)
    else:
        assert evaluation.class_names(name)[0] == expected
