"""Files that are written completely, also in a folder that other users can write to."""

import os
import resource
import signal
import stat

import pytest

from simplclip.common import files
from simplclip.common.errors import InputError
from simplclip.common.files import (
    check_writable,
    remove_leftovers,
    replacing,
    write_atomically,
)
from support.programs import forked


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch):
    """A link waits under a fixed name, and under the name that is drawn."""
    target, linked = tmp_path / "report.json", tmp_path / "linked"
    linked.write_text("kept")
    (tmp_path / ".report.json.tmp").symlink_to(linked)
    write_atomically(target, "written")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "5" * 2 * count)
    (tmp_path / f".report.json.{'5' * 16}.tmp").symlink_to(linked)
    with pytest.raises(FileExistsError):
        write_atomically(target, "new")
    assert (target.read_text(), linked.read_text()) == ("written", "kept")
    assert not target.is_symlink()


def test_names_cannot_be_guessed_and_nothing_is_left(tmp_path):
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / "a.bin") as file:
            seen.add(file.name)
    assert len(seen) == 20
    with pytest.raises(KeyError), replacing(tmp_path / "a.bin"):
        raise KeyError
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_other_files(tmp_path, mask):
    def make():
        os.umask(mask)
        write_atomically(tmp_path / "a", "text")

    assert forked(make) == 0
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_full_disk_leaves_the_former_file(tmp_path):
    (tmp_path / "a").write_text("former")

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="too large"):
            write_atomically(tmp_path / "a", bytes(5000))

    assert forked(fill) == 0
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "former"


def test_a_folder_that_cannot_be_written_to(tmp_path):
    check_writable(tmp_path / "new" / "run", "out")

    def refuse():
        os.chmod(tmp_path, 0o555)
        if os.geteuid() == 0:  # who can write everywhere
            os.seteuid(65534)
        message = "out: expected a folder that can be written to, got /"
        with pytest.raises(InputError, match=message):
            check_writable(tmp_path / "new" / "run", "out")

    assert forked(refuse) == 0
    assert not (tmp_path / "new").exists()


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    """A link is removed, but not its target."""
    number = "0123456789abcdef"
    ours = [f".a.tar.{number}.tmp", f".b.tar.{number}.tmp"]
    others = ["a.tar", f".c.txt.{number}.tmp", f"a.tar.{number}.tmp"]
    others += [".a.tar.tmp", ".a.tar.0123.tmp.bak"]
    for name in (ours[0], *others):
        (tmp_path / name).write_text("x")
    (tmp_path / ours[1]).symlink_to(tmp_path / "a.tar")
    remove_leftovers(tmp_path, lambda name: name.endswith(".tar"))
    assert {*os.listdir(tmp_path)} == {*others}
