"""Runs that pack a folder of pictures: what they say of broken ones, and other data on resume."""

import itertools
import json
import re

import pytest

from support.programs import call
from support.train import tiny
from support.train.runs import go

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leaves out the sheets of `simplclip evaluate`, which take long."""
    monkeypatch.setattr("simplclip.evaluation.run.write_sheet", lambda *_: None)


def picture_folder(folder, broken=()):
    """Writes a folder of the 24 pictures with captions; those numbers are cut."""
    folder.mkdir()
    for number, (colour, shape) in enumerate(itertools.product(tiny.COLOURS, tiny.SHAPES)):
        content = tiny.picture(tiny.COLOURS[colour], shape, size=64)
        if number in broken:
            content = content[: len(content) // 2]
        (folder / f"{colour}-{shape}.png").write_bytes(content)
        (folder / f"{colour}-{shape}.txt").write_text(f"{colour} {shape}")
    return folder


@pytest.mark.slow
def test_broken_pictures_are_counted_and_named_as_the_user_knows_them(tmp_path):
    """Those that train, and once those that are held out, in the words of `simplclip evaluate`."""
    photos = picture_folder(tmp_path / "photos", broken=range(0, 24, 3))
    changes = [f"data.train={photos}", "eval.hold_out=0.5", "eval.every=2"]
    text = go(tiny.settings(tmp_path, *changes))
    name = r"photos-000000.tar/(\d{9}), source photos/([a-z]+-[a-z]+)"
    sources = re.findall(rf"^data .* skipped: .* \(first: {name}: ", text, re.M)
    assert sources
    (line,) = re.findall("^evaluation (held_out: .* skipped: .*)$", text, re.M)
    sources += re.findall(name, line)
    names = sorted(path.stem for path in photos.glob("*.png"))
    assert {names[int(number)] for number, _ in sources} == {source for _, source in sources}
    result = call("evaluate", tmp_path / "run", "--device", "cpu", "--workers", 0)
    assert line in result.output


@pytest.mark.slow
def test_captions_are_shown_and_those_that_are_cut_are_counted(tmp_path):
    """In training, where their names are the user's, and by `simplclip evaluate`."""
    photos = picture_folder(tmp_path / "photos")
    for text in photos.glob("red-*.txt"):
        text.write_text(20 * "red ")
    text = go(tiny.settings(tmp_path, f"data.train={photos}", "eval.hold_out=0.5", "run.steps=1"))
    assert len(re.findall(r"^caption +photos/(\w+)-(\w+): (\1 \2|red red.*)$", text, re.M)) == 3
    cut = (
        "captions looked at are cut, since they have more than 16 tokens with start and end; write"
    )
    assert re.search(rf"^warning    .*% of \d+ {cut}", text, re.M)
    result = call("evaluate", tmp_path / "run", "--device", "cpu", "--workers", 0)
    assert re.search(rf"^warning: held_out: [1-9]\S+% of \d+ {cut}", result.output, re.M)
    left_out = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert cut in left_out["splits"]["held_out"]["left_out"][0]
