"""What names tars: paths, patterns, weights, URLs of a server that fails, commands."""

import contextlib
import http.server
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest

from simplclip import data
from simplclip.common.errors import InputError
from support.data.pairs import one_pass, sample, write

FIRST, SECOND = ([f"k{i:03d}" for i in range(start, start + 12)] for start in (0, 12))


def shard(folder, first=0, count=12):
    """Writes a tar of samples with distinct keys."""
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder / f"train-{first:03d}.tar", map(sample, range(first, first + count)))


class Server(http.server.BaseHTTPRequestHandler):
    """A server of a folder. faults: name -> the fault of its requests."""

    def do_GET(self):
        name = self.path.split("?")[0].strip("/")
        self.server.asked[name] += 1
        fault = self.server.faults.get(name)
        path = self.server.folder / name
        if fault == "404" or not path.exists():
            return self.send_error(404)
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            return self.connection.close()
        return self.wfile.write(content)

    def log_message(self, *_):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture
def server(tmp_path):
    """Yields a local server of tmp_path / "served"."""
    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None
        server.folder = tmp_path / "served"
        server.faults = {}
        server.asked = Counter()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@NEEDS_CURL
def test_urls_with_brace_patterns_and_signatures(server):
    for number in (0, 12):
        shard(server.folder, number)
    assert one_pass(f"{server.url}/train-0{{00,12}}.tar?signature=a/b")[0] == FIRST + SECOND
    assert names(f"{server.url}/x.tar?signature=a/b") == ["x.tar"]
    assert server.asked == {"train-000.tar": 2, "train-012.tar": 1}  # the next pass has begun


@NEEDS_CURL
@pytest.mark.parametrize("fault", ["404", "cut"])
def test_a_server_that_fails_costs_the_rest_of_a_tar(server, fault):
    urls = [f"{server.url}/{os.path.basename(shard(server.folder, number))}" for number in (0, 12)]
    server.faults["train-012.tar"] = fault
    found, skipped = one_pass(urls)
    assert found[:12] == FIRST
    assert found[12:] == SECOND[: len(found) - 12]
    assert (len(found) < 24, dict(skipped.counts)) == (True, {"damaged tar": 1})
    with pytest.raises(data.ShardError, match=rf"shard '{urls[1]}' is damaged: .+"):
        one_pass(urls, on_error="stop")


@pytest.mark.parametrize(
    "command", ["cat {0}", "cat {0}; yes", "cat {0}; sleep 1", "cat {0} 2>/dev/null; exit 0"]
)
def test_the_output_of_a_command(tmp_path, command):
    """It may write on, or wait for something, after the end of the tar."""
    assert one_pass("pipe:" + command.format(shard(tmp_path)))[0] == FIRST


@pytest.mark.parametrize("command", ["head -c 9000 {0}; exit 3", "exit 3", "head -c 9000 {0}"])
def test_a_command_that_fails_or_ends_early_is_damage(tmp_path, command):
    tars = [shard(tmp_path / "other"), "pipe:" + command.format(shard(tmp_path))]
    found, skipped = one_pass(tars)
    assert 12 <= len(found) < 24
    assert skipped.counts == {"damaged tar": 1}


def urls(what):
    return [str(source.url) for source in data.sources_of(what)]


def test_paths_patterns_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = Path(shard(tmp_path)), Path(shard(tmp_path / "more", 12))
    for what in ("train-0{00..00}.tar", "*.tar", Path("train-000.tar")):
        assert urls(what) == ["train-000.tar"]
    assert urls(["*.tar", "more/*.tar"]) == ["train-000.tar", "more/train-012.tar"]
    assert urls("http://host/{1..2}.tar") == ["http://host/1.tar", "http://host/2.tar"]
    command = "pipe:cat {a,b}.tar | awk '{ print ${x} }'"
    assert urls(command) == [command.replace("{a,b}", name) for name in "ab"]
    weighted = data.sources_of(
        [{"shards": ["*.tar", {"shards": str(b), "weight": 0.5}], "weight": 3}, "more/*.tar"]
    )
    assert [source.weight for source in weighted] == [3, 1.5, 1]
    same = tmp_path / "more" / a.name
    same.write_bytes(a.read_bytes())
    assert names([a, same, b]) == [a.name, f"more/{a.name}", b.name]


def names(what):
    return [source.name for source in data.sources_of(what)]


def test_files_of_one_name_are_named_from_their_common_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/x", "b/x", "c"):
        shard(tmp_path / folder)
    three = ["a/x/train-000.tar", "b/x/train-000.tar", "c/train-000.tar"]
    assert names(three) == three
    # however a path is written
    assert names(["c/../a/x/train-000.tar", str(tmp_path / three[1])]) == three[:2]
    assert names([three[0], three[2], f"./{three[2]}"]) == [three[0], three[2], three[2]]
    assert names([three[2], f"./{three[2]}"]) == ["train-000.tar"] * 2
    assert names(["http://host/{a,b}/0.tar?signature=c/d"]) == ["a/0.tar", "b/0.tar"]
    assert names(["pipe:aws s3 cp s3://bucket/{a,b}/0.tar -"]) == ["a/0.tar", "b/0.tar"]
    same_path = ["http://host/get?file=0.tar", "http://host/get?file=1.tar"]
    assert names(same_path) == same_path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ([], "data: expected at least one path or pattern, got an empty list"),
        ("none.tar", "data: expected files, got 'none.tar', which does not exist"),
        ("none*.tar", "data: expected files, got 'none.*', which matches none"),
        (5, "data: expected a path, an http"),
        ({"shards": "x", "weight": 0}, "data: expected a weight above 0, got 0"),
        ("s3://bucket/x.tar", "data: expected .* of other places name a command, e.g. 'pipe:aws"),
        ("folder", "data: expected tars, not compressed, got 'folder'; `simplclip data pack`"),
        ("x.csv", "data: expected tars, not compressed, got 'x.csv'; `simplclip data pack`"),
        ("x.tar.gz", "data: expected tars, not compressed, got 'x.tar.gz'"),
        (Path("pipe:cat x.tar"), "data: expected files, got 'pipe:cat x.tar'"),
    ],
)
def test_what_names_no_tar(tmp_path, monkeypatch, what, message):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    for name in ("x.csv", "x.tar.gz"):
        Path(name).touch()
    with pytest.raises(InputError, match=message):
        data.sources_of(what, "data")
