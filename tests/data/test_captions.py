"""What is said of captions before they are trained."""

import json
import os

import pytest

from simplclip import data
from simplclip.data import read_tars
from simplclip.data.captions import FEW, SomeCaptions
from support.data.pairs import png, write


def some(captions, groups=None):
    found = SomeCaptions()
    for number, caption in enumerate(captions):
        found.add(f"photos/{number}", [caption], groups and groups[number])
    return found


def test_examples_are_spread_and_counted():
    found = some([f"caption {n // 2}" for n in range(101)])
    assert found.counts() == "101 images looked at have 51 different captions"
    lines = [f"photos/{n}: caption {n // 2}" for n in (0, 50, 100)]
    assert [*found.examples()] == lines
    assert [*some(["x"]).examples()] == ["photos/0: x"]
    long = SomeCaptions()
    long.add("a", ["one", "two\x1b[2J" + 90 * "x"], None)
    assert [*long.examples()] == ["a: one | two\\x1b[2J" + 77 * "x" + "..."]
    assert not [*SomeCaptions().examples()]
    assert SomeCaptions().warning() is None


CLASSES = [str(number % 2) for number in range(100)]


@pytest.mark.parametrize(
    ("found", "warning"),
    [
        (some(100 * ["val2017"]), "all images looked at have the caption 'val2017'"),
        (some(100 * ["cat"], 100 * ["cat"]), "all images looked at have the caption 'cat'"),
        (some(["cat"]), None),
        (some(CLASSES), "50 images for each different caption: images with one caption are each"),
        (some(CLASSES, CLASSES), None),  # of a folder of classes
        (some(CLASSES, [f"{n}.png" for n in range(100)]), "50 images for each different caption"),
        (some([str(n % 10) for n in range(10 * FEW)]), None),
        (some([str(n % 10) for n in range(10 * FEW + 1)]), "10 images for each different caption"),
    ],
)
def test_few_captions_are_a_warning_but_for_groups(found, warning):
    said = found.warning()
    assert said is warning is None or said.startswith(warning)


def test_captions_of_the_first_to_the_last_tar(tmp_path):
    for number in range(30):
        numbers = range(10 * number, 10 * number + 10)
        samples = [(str(n), {"txt": b"caption %d" % n, "png": png()}) for n in numbers]
        write(tmp_path / f"{number:02}.tar", samples)
    found = data.some_captions(str(tmp_path / "*.tar"), most=24)
    first = [int(caption.split()[1]) for caption in found.all]
    assert first == [10 * (29 * place // 7) + n for place in range(8) for n in range(3)]
    assert found.names[0] == "00.tar/0"
    assert len(data.some_captions(str(tmp_path / "00.tar"), most=24).names) == 10
    mixed = [f"pipe:cat {tmp_path}/00.tar", str(tmp_path / "01.tar")]
    assert data.some_captions(mixed).all == [f"caption {n}" for n in range(10, 20)]
    streams = [f"pipe:cat {tmp_path}/{name}.tar" for name in ("02", "03")]
    assert data.some_captions(streams, most=32).all == [f"caption {n}" for n in range(20, 24)]


def test_captions_beside_damage(tmp_path, monkeypatch):
    """Large images are not read; what is broken is left out, and ends nothing."""
    read = []
    contents = read_tars._contents

    def counted(archive, member, limit):
        found = contents(archive, member, limit)
        read.append((member.name, type(found) is bytes))
        return found

    monkeypatch.setattr(read_tars, "_contents", counted)
    monkeypatch.setattr(read_tars, "RETRIES", ())
    large = png(size=(200, 200))
    record = json.dumps({"captions": ["one", "two"], "source": "photos/a", "group": 7}).encode()
    samples = [
        ("a", {"png": large, "json": record}),
        ("b", {"png": large, "json": b"{"}),
        ("c", {"png": large}),
        ("d", {"png": large, "txt": (1 << 17) * b"x"}),
        ("e", {"png": large, "json": b'{"source": 3}', "txt": b"last"}),
        ("f", {"png": large, "txt": b"cut off"}),
    ]
    shard = write(tmp_path / "a.tar", samples)
    os.truncate(shard, os.path.getsize(shard) - len(large) // 2)
    found = data.some_captions(shard)
    things = ["group 7", "image a.tar/e"]
    assert found == SomeCaptions(["photos/a", "a.tar/e"], [["one", "two"], ["last"]], things)
    assert not any(whole for name, whole in read if name.endswith("png"))
    assert not data.some_captions("pipe:false").names
    (tmp_path / "side").mkdir()
    write(tmp_path / "side/a.tar", [("a", {"json": b'{"caption": "another"}'})])
    assert data.some_captions(shard, [str(tmp_path / "side")]).all == ["another", "last"]
    assert not data.some_captions(shard, [str(tmp_path / "none")]).names, "the loader says why"
