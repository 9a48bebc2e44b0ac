"""Findings about a device: later processes use them, and they never disturb work that does not need them."""

import json
import os
import resource
import signal
import warnings

import pytest
import torch
from pairs import forked

from simplclip.common import machine
from simplclip.common.errors import UserError

pytestmark = pytest.mark.usefixtures("cache")


def test_kernels_count_wherever_they_lie():
    """As in an editable installation, the package has no folder kernels."""
    names = {"/".join(path.parts[-3:]) for path in machine.computing()}
    assert {"kernels/similarity/forward.py", "simplclip/ops/backends.py"} <= names


def test_links_to_nothing_do_not_count(tmp_path, monkeypatch):
    """Emacs makes a dangling link beside a file that is being edited."""
    monkeypatch.setattr(machine, "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / ".#op.py").symlink_to("somebody@somewhere.1")
    assert ".#op.py" not in {path.name for path in machine.computing()}
    machine._build.__wrapped__()


def test_sections_are_stored_apart_and_known_again(cache):
    assert machine.known("failed", "cpu") == {}
    file = machine.store("failed", "cpu", {"an op": "a reason"})
    machine.store("tuned", "cpu", {"rows": 7})
    assert machine.known("failed", "cpu") == {"an op": "a reason"}
    machine.store("failed", "cpu", {})
    assert json.loads(file.read_text()) == {"tuned": {"rows": 7}, "machine": machine.describe("cpu")}
    assert machine.known("failed", "cuda") == machine.known("failed", "meta") == {}
    assert os.listdir(cache) == [file.name]


def test_another_build_or_torch_knows_nothing(monkeypatch):
    machine.store("failed", "cpu", {"an op": "a reason"})
    for attribute, value in (("_build", lambda: "other"), ("cpu_name", lambda: "another processor")):
        with monkeypatch.context() as patched:
            patched.setattr(machine, attribute, value)
            machine.forget()
            assert machine.known("failed", "cpu") == {}, attribute
    with monkeypatch.context() as patched:
        patched.setenv("SIMPLCLIP_CPU_ISA", "baseline")
        machine.forget()
        assert machine.known("failed", "cpu") == {}
    machine.forget()
    assert machine.known("failed", "cpu") == {"an op": "a reason"}


OTHER = ({"failed": [1]}, {"failed": {"a": [1]}}, {"tuned": {"choices": {"a": [1]}}}, {"tuned": {"measured": [3]}}, [1, 2], 3)


@pytest.mark.parametrize(
    "content", [b'{"failed": {', b"\xff\xfe", b"", b"[" * 100_000, *(json.dumps(other).encode() for other in OTHER)]
)
def test_a_damaged_file_is_told_ignored_and_replaced(content):
    file = machine.store("tuned", "cpu", {"rows": 7})
    file.write_bytes(content)
    machine.forget()
    with pytest.warns(UserWarning, match=f"{file}: expected what an earlier process found out, got .*; it is ignored"):
        assert machine.known("tuned", "cpu") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert machine.known("tuned", "cpu") == {}  # a second reading does not warn again
    with pytest.warns(UserWarning, match="it is ignored"):
        machine.store("failed", "cpu", {"an op": "a reason"})
    assert json.loads(file.read_text()).keys() == {"failed", "machine"}


def test_a_full_disk_leaves_the_former_file(cache):
    file = machine.store("tuned", "cpu", {"rows": 7})
    before = file.read_text()

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(
            UserError, match=f"^{file}: expected to write .*, got File too large; SIMPLCLIP_CACHE names another"
        ):
            machine.store("failed", "cpu", {"an op": "long" * 1000})
        assert machine.known("tuned", "cpu") == {"rows": 7}

    assert forked(fill) == 0
    assert (os.listdir(cache), file.read_text()) == ([file.name], before)


def test_a_folder_that_cannot_be_made(cache):
    cache.write_text("a file")
    assert machine.known("failed", "cpu") == {}
    with pytest.raises(UserError, match="expected to write .*, got File exists; SIMPLCLIP_CACHE names another folder"):
        machine.store("failed", "cpu", {"an op": "a reason"})


def test_without_a_home_folder(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SIMPLCLIP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(machine.Path, "home", home)
    with pytest.warns(UserWarning, match="the cache folder: .* got Could not determine home directory"):
        assert machine.known("failed", "cpu") == {}
    with pytest.raises(UserError, match="^the cache folder: expected to write .* got Could not determine home directory"):
        machine.store("failed", "cpu", {"an op": "a reason"})


def test_the_description_is_plain():
    found = machine.describe("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in found.values())
