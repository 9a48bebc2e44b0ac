"""Packing again: after a stop, after a change of the source, into a folder with other files."""

import os

import pytest

from simplclip.common.errors import InputError
from simplclip.data import pack
from support.data.packs import packed, skipped_of
from support.data.pairs import digests, png, table
from support.programs import call, killed_at_any_point


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Writes a table of 10 rows, every third of them bad; a shard has 4 rows."""
    monkeypatch.setattr(pack, "SAMPLES", 4)
    (tmp_path / "in").mkdir()
    for number in range(10):
        (tmp_path / f"in/{number}.png").write_bytes(png(number) if number % 3 else b"none")
    lines = [(f"{number}.png", f"number {number}") for number in range(10)]
    return table(tmp_path / "in/t.csv", lines)


@pytest.mark.slow
def test_killed_at_any_point(tmp_path, rows):
    def work(out, step):
        step()
        pack.pack(rows, out, workers=1, progress=False)

    killed_at_any_point(tmp_path, work, 40)
    assert skipped_of(tmp_path / "whole").counts["not an image"] == 4
    pack.pack(rows, tmp_path / "parallel", workers=3, progress=False)
    assert digests(tmp_path / "parallel") == digests(tmp_path / "whole")


def test_shards_are_found_again_until_the_source_changes(tmp_path, rows):
    command = ("data", "pack", rows, "--out", tmp_path / "out")
    first = call(*command)
    assert first.exit_code == 0, first.output
    assert "packed 6 samples of t.csv in 3 shards" in first.output
    damage = "4 skipped: 4 not an image (first: t.csv/000000000: 4 bytes of none of the formats"
    assert damage in first.output
    before = digests(tmp_path / "out")
    assert "kept 6 samples of t.csv" in call(*command).output
    assert digests(tmp_path / "out") == before
    (tmp_path / "out/t-000001.tar").unlink()
    assert "packed 6 samples" in call(*command).output
    assert digests(tmp_path / "out") == before
    for more in (["--caption-key", "title"], []):
        output = call(*command, *more).output
        assert "to hold what an earlier run made of the same" in output
        assert "remove it or choose another folder" in output
        os.utime(rows, (0, 0))
    (tmp_path / "out/meta.json").write_text('{"splits": 5}')
    output = call(*command).output
    assert "which holds other files (meta.json)" in output


def test_a_folder_that_holds_something_else_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.gitkeep").touch()
    table(tmp_path / "t.csv", [("none.png", "x")])
    with pytest.raises(InputError, match="got none that is usable in .*t.csv"):
        packed(tmp_path / "t.csv", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".gitkeep"]
