"""Packing again: after a stop, after a change of the source, into a folder with other files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simplclip.common.errors import InputError
from simplclip.data import pack
from support.data.packs import packed, skipped_of, write_images
from support.data.pairs import digests, meta, png, table
from support.programs import call, killed_at_any_point


def test_a_folder_whose_captions_change_is_another_source(tmp_path):
    write_images(tmp_path / "in", "1.png")
    for text in ("a cat", "a dog"):
        (tmp_path / "in/1.txt").write_text(text)
        os.utime(tmp_path / "in/1.txt", (len(text), ord(text[2])))
        if text == "a cat":
            assert packed(tmp_path / "in", tmp_path / "out") == ([("1", ["a cat"])], {})
    with pytest.raises(InputError, match="to hold what an earlier run made of the same"):
        packed(tmp_path / "in", tmp_path / "out")


WHOLE = {"samples": 7, "bytes": 1}


@pytest.mark.parametrize(
    "shards",
    [5, [], {"a": 5}, {"a": {"samples": "7", "bytes": 1}}, {"a": WHOLE | {"skipped": 5}}],
)
def test_another_meta_json_is_refused(tmp_path, rows, shards):
    packed(rows, tmp_path / "out")
    content = meta(tmp_path / "out") | {"splits": {"data": {"shards": shards}}}
    (tmp_path / "out/meta.json").write_text(json.dumps(content))
    message = "expected a new folder or that of an earlier run, got .* with another meta.json"
    with pytest.raises(InputError, match=message):
        packed(rows, tmp_path / "out")


def test_a_run_in_the_folder_of_its_data_does_not_change_them(tmp_path):
    """Its pictures have no captions beside them."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.txt").write_text("a cat")
    for name in ("1.png", "curves.png"):
        (tmp_path / "in" / name).write_bytes(png())
        assert packed(tmp_path / "in", tmp_path / "out") == ([("1", ["a cat"])], {})


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


def test_a_folder_that_holds_something_else_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.gitkeep").touch()
    table(tmp_path / "t.csv", [("none.png", "x")])
    with pytest.raises(InputError, match="got none that is usable in .*t.csv"):
        packed(tmp_path / "t.csv", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == []
    assert (tmp_path / "out/.gitkeep").exists()


def slow(path, *rest):
    path.with_suffix(f".{os.getpid()}").touch()
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["process", "parent"])
def test_a_process_that_is_killed(tmp_path, rows, monkeypatch, victim):
    """A dead process is an error; the others end with their parent even if that is killed."""
    monkeypatch.setattr(pack, "_write_shard", slow)
    (tmp_path / "out").mkdir()
    child = os.fork()
    if not child:
        message = r"a process died before .* the same command goes on where it was"
        with pytest.raises(pack.PackError, match=message):
            pack.pack(rows, tmp_path / "out", workers=2, progress=False)
        os._exit(7)
    deadline = time.monotonic() + 30
    while len(workers := [int(path.suffix[1:]) for path in (tmp_path / "out").glob("t-*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child if victim == "parent" else workers[0], signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (-signal.SIGKILL if victim == "parent" else 7)
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_packing_loads_neither_torch_nor_open_clip(tmp_path, rows):
    code = "import sys; from simplclip.commands.main import app; app(standalone_mode=False)"
    code += "; print({'torch', 'open_clip', 'PIL'} & {*sys.modules})"
    command = [sys.executable, "-c", code, "data", "pack", rows, "--out", tmp_path / "out"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.stdout.endswith("{'PIL'}\n"), run.stderr
