"""Sources of pairs: lists, URLs of a server that fails in every way, commands; weights; states; dead workers."""

import contextlib
import errno
import http.server
import json
import os
import shutil
import socket
import threading
import time
from collections import Counter

import pytest
from pairs import augment, keys, loader, png, sample, table, write
from runs import bits

from simplclip import data
from simplclip.common.errors import InputError
from simplclip.data import addresses, folders, parts, tables, tar
from simplclip.data.broken import Skipped
from simplclip.data.parts import read_part

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def shard(folder, first=0, count=12):
    """Writes a tar of samples with distinct keys."""
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder / f"train-{first:03d}.tar", [sample(i) for i in range(first, first + count)])


def everything(source, **options):
    """Returns the keys of an epoch, and the loader."""
    reader = loader(source, **{"drop_last": False, "batch_size": 5} | options)
    return sorted(keys(reader.epoch(0))), reader


def names(first, count):
    return [f"k{i:03d}" for i in range(first, first + count)]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(parts, "RETRIES", (0.01, 0.02))


class Server(http.server.BaseHTTPRequestHandler):
    """A server of a folder. faults: name -> faults of its next requests, in order; the last fault stays."""

    def do_GET(self):
        name = self.path.split("?")[0].strip("/")
        self.server.asked[name] += 1
        waiting = self.server.faults.get(name, ["none"])
        fault = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        path = self.server.folder / name
        if fault == "404" or not path.exists():
            return self.send_error(404)
        content = path.read_bytes()
        self.send_response(200)
        if fault != "chunked":
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
        if fault == "slow":  # sends nothing for a while
            self.server.release.wait(20)
            return None
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(content) // 2, content[: len(content) // 2]))
            return self.connection.close()
        if fault in ("cut", "reset"):
            self.wfile.write(content[: len(content) // 2])
            if fault == "reset":
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return self.connection.close()
        return self.wfile.write(content)

    def log_message(self, *_):
        pass

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()


@pytest.fixture
def server(tmp_path):
    """Yields a local server of tmp_path / "served"."""
    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        server.handle_error = lambda *_: None
        server.folder, server.faults, server.asked = tmp_path / "served", {}, Counter()
        server.release = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_urls_with_brace_patterns(server, workers):
    for number in range(3):
        shard(server.folder, 12 * number)
    source = f"{server.url}/train-0{{00,12,24}}.tar"
    found, reader = everything(source, workers=workers)
    assert found == names(0, 36)
    assert reader.batches_per_epoch is None  # counting would need a download
    local = loader(str(server.folder / "*.tar"), drop_last=False, batch_size=5, workers=workers)
    assert bits(list(reader.epoch(1))) == bits(list(local.epoch(1)))  # batches are the same as from files


def test_compressed_tars_and_signed_urls(server):
    path = shard(server.folder)
    os.system(f"gzip -k {path}")
    for url in (f"{server.url}/train-000.tar.gz", f"{server.url}/train-000.tar?signature=a/b"):
        assert everything(url)[0] == names(0, 12)
    assert [part.name for part in data.parts_of(url)] == ["train-000.tar"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["404", "cut", "reset", "chunked", "slow"])
@pytest.mark.parametrize("mends", [True, False])
def test_a_server_that_fails(server, quick, monkeypatch, fault, mends):
    monkeypatch.setattr(addresses, "TIMEOUT", 0.5)
    broken, whole = shard(server.folder), shard(server.folder, 12)
    server.faults["train-000.tar"] = [fault, "none"] if mends else [fault]
    urls = [f"{server.url}/{os.path.basename(path)}" for path in (broken, whole)]
    found, reader = everything(urls)
    assert server.asked["train-000.tar"] == (2 if mends else 3)
    if mends:
        assert (found, reader.skipped) == (names(0, 24), {})
        return
    assert reader.skipped == {"unreadable shard": 1}
    read = [key for key in found if key < "k012"]
    assert [key for key in found if key >= "k012"] == names(12, 12)
    assert read == names(0, len(read))  # samples before the break are used
    assert (0 < len(read) < 12) == (fault in ("cut", "reset", "chunked"))
    reason = {"404": "HTTP Error 404", "slow": "sent nothing for 0.5 seconds", "cut": "bytes before the end"}
    assert reason.get(fault, "cannot be read to its end") in reader.report()
    with pytest.raises(data.ShardError, match=rf"shard '{urls[0]}' cannot be (opened|read to its end): "):
        everything(urls, on_error="stop")


def test_a_retry_goes_on_behind_what_was_given_and_counts_damage_once(server, quick):
    double = [sample(0), ("k001", sample(1)[1]), ("k001", {"txt": b"again"}), *(sample(i) for i in range(2, 40))]
    write(server.folder / "a.tar", double)
    server.faults["a.tar"] = ["cut", "cut", "none"]
    skipped = Skipped()
    (part,) = data.parts_of(f"{server.url}/a.tar")
    assert [found["__key__"] for found in read_part(part, skipped)] == names(0, 40)
    assert skipped.counts == {"duplicate file in tar": 1}
    assert server.asked["a.tar"] == 3


@pytest.mark.parametrize("mends", [True, False])
def test_a_disk_that_fails_is_no_damage(tmp_path, quick, monkeypatch, mends):
    shard(tmp_path)
    original, asked = tar.members, []

    def failing(path):
        asked.append(path)
        for number, member in enumerate(original(path)):
            if number == 9 and not (mends and asked[1:]):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield member

    monkeypatch.setattr(tar, "members", failing)
    found, reader = everything(str(tmp_path / "*.tar"))
    assert len(asked) == (2 if mends else 3)
    assert reader.skipped == ({} if mends else {"unreadable shard": 1})
    assert found == names(0, 12 if mends else len(found))
    assert found


def test_commands(tmp_path, quick):
    for first in (0, 12):
        shard(tmp_path, first)
    # The second shard is named like a file; the first command runs on after its tar has ended.
    found, reader = everything(
        [f"pipe:cat {tmp_path}/train-000.tar; sleep 60", f"pipe:gzip -c {tmp_path}/train-{{012,012}}.tar"]
    )
    assert found == sorted(names(0, 12) + 2 * names(12, 12))
    assert reader.skipped == {}
    local = loader([f"{tmp_path}/train-000.tar"], drop_last=False)
    assert bits(list(loader(f"pipe:cat {tmp_path}/train-000.tar", drop_last=False).epoch(0))) == bits(list(local.epoch(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "used", "reason"),
    [
        ("head -c 30000 {}; exit 3", True, "exit code 3"),
        ("head -c 30000 {}; sleep 9", True, "wrote nothing for 0.5 seconds"),
        ("head -c 30000 {}; exec >&-; sleep 9", True, "did not end in 0.5 seconds"),
        ("exit 4", False, "exit code 4"),
        ("cat /no/such/file", False, "exit code 1"),
    ],
)
def test_commands_that_fail(tmp_path, quick, monkeypatch, command, used, reason):
    monkeypatch.setattr(addresses, "TIMEOUT", 0.5)
    began = time.monotonic()
    tar = shard(tmp_path, count=40)
    source = f"pipe:echo >> {tmp_path}/runs; {command.format(tar)}"
    found, reader = everything([source, shard(tmp_path, 50)])
    read = [key for key in found if key < "k050"]
    assert found == names(0, len(read)) + names(50, 12)
    assert (0 < len(read) < 40) == used
    assert reader.skipped == {"unreadable shard": 1}
    assert reason in reader.report()
    assert (tmp_path / "runs").read_text() == "\n" * 3  # one line for the first try and two more for retries
    assert time.monotonic() - began < 8


def test_list_files(tmp_path, server):
    shard(server.folder)
    shard(tmp_path / "a", 12)
    shard(tmp_path / "b", 24)
    shard(tmp_path / "b", 36)
    lines = [
        "# mine",
        f"{server.url}/train-000.tar",
        "",
        "a/train-012.tar",
        f"{tmp_path}/b/train-0{{24,36}}.tar  ",
        "a/*.tar",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert everything(tmp_path / "list.txt")[0] == sorted(names(0, 48) + names(12, 12))
    assert everything({"shards": str(tmp_path / "list.txt"), "weight": 2})[0] == sorted(2 * (names(0, 48) + names(12, 12)))


def test_a_command_is_taken_from_the_caller_alone(tmp_path):
    """Data from elsewhere must not run commands: only the caller may give one."""
    evil = f"pipe:touch {tmp_path}/harm; cat {shard(tmp_path)}"
    (tmp_path / "list.txt").write_text(f"train-000.tar\n{evil}\n")
    with pytest.raises(
        InputError, match=r"shards: line 2 of '.*list.txt': .*got 'pipe:.*from the command line or the config"
    ):
        everything(str(tmp_path / "list.txt"))
    table(tmp_path / "first.csv", [[evil, "x"]])
    with pytest.raises(InputError, match=r"shards: expected paths of images, got first.csv/000000000: 'pipe:.*"):
        everything(str(tmp_path / "first.csv"))
    (tmp_path / "a.png").write_bytes(png())
    table(tmp_path / "later.csv", [["a.png", "x"], [evil, "x"], ["http://host/a.png", "x"]])
    found, reader = everything(str(tmp_path / "later.csv"))
    assert (found, reader.skipped) == (["000000000"], {"not a local file": 2})
    (tmp_path / "names").mkdir()
    write(tmp_path / "names" / "pipe:touch harm.tar", [sample(0)])  # a file with this name is read as a file
    assert everything(str(tmp_path / "names" / "*.tar"))[0] == names(0, 1)
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers"), [("url", 2), ("pipe", 0), ("csv", 2), ("folder", 0), ("weighted", 2), ("weighted", 0), ("list", 2)]
)
def test_states_and_skipping(tmp_path, server, monkeypatch, kind, workers, quick):
    """Each kind of source is skipped and resumed with something broken in it."""
    monkeypatch.setattr(tables, "ROWS", 3)
    monkeypatch.setattr(folders, "ROWS", 3)
    for first in (0, 12, 24):
        shard(server.folder, first, 11)
    write(server.folder / "train-100.tar", [sample(100), ("bad", {"png": b"", "txt": b"x"}), sample(101)])
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(png(number) if number % 7 else b"broken")
        (folder / f"{number}.txt").write_text(f"{number} a")
    table(tmp_path / "t.csv", [[f"files/{number}.png", f"{number} a"] for number in range(20)])
    (tmp_path / "list.txt").write_text("served/*.tar\nt.csv\n")
    tars = str(server.folder / "train-{000,012,024,100}.tar")
    source = {
        "url": [f"{server.url}/train-{{000,012,024,100}}.tar", f"{server.url}/none.tar"],
        "pipe": f"pipe:cat {tars}",
        "csv": str(tmp_path / "t.csv"),
        "folder": str(folder),
        "weighted": [{"shards": tars, "weight": 1.6}, {"shards": [str(tmp_path / "t.csv")], "weight": 0.5}],
        "list": str(tmp_path / "list.txt"),
    }[kind]
    reader = loader(source, workers=workers, batch_size=3, drop_last=False, shuffle_buffer=5)
    whole, states = [], []
    for batch in reader.epoch(1):
        whole.append(batch)
        states.append(reader.state())
    report = reader.report()
    assert reader.skipped
    again = loader(source, workers=workers, batch_size=3, drop_last=False, shuffle_buffer=5)
    for number in {1, len(whole) // 2, len(whole)}:
        for state in (None, states[number - 1]):
            assert bits(list(again.epoch(1, number, state))) == bits(whole[number:])
            assert again.report() == report


@pytest.mark.slow
def test_weights_are_how_often_an_epoch_has_a_sample(tmp_path):
    many = write(tmp_path / "a.tar", [sample(i) for i in range(400)])
    few = write(tmp_path / "b.tar", [sample(i) for i in range(400, 410)])
    for weight in (2, 0.25, 2.5):
        reader = loader([{"shards": many, "weight": weight}, few], drop_last=False, batch_size=64)
        drawn = []
        for epoch in range(3):
            counts = Counter(keys(reader.epoch(epoch)))
            assert all(counts[f"k{i:03d}"] == 1 for i in range(400, 410))
            several = Counter(counts[f"k{i:03d}"] for i in range(400))
            least = int(weight)
            assert several.keys() <= {least, least + 1}
            share = several[least + 1] / 400
            assert share == pytest.approx(weight - least, abs=0.08 if weight != 2 else 0)
            drawn.append(frozenset(key for key, count in counts.items() if count > least and key < "k400"))
        assert len(set(drawn)) == (1 if weight == 2 else 3)  # each epoch draws other samples
    assert loader([{"shards": many, "weight": 2.5}, few], batch_size=10).batches_per_epoch == 101
    # A sample that comes twice is augmented twice, and its captions are drawn twice.
    (batch,) = loader({"shards": few, "weight": 2}, batch_size=20).epoch(0)
    assert len({image.sum().item() for image in batch["image"]}) == 20


def test_samples_of_files_of_the_same_name_are_not_the_same(tmp_path):
    """img2dataset gives shards (00000.tar) and samples the same names in each data set."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plain = [(f"{i}", {"png": png(), "txt": b"x"}) for i in range(3)]
        write(tmp_path / name / "00000.tar", plain)
    both = str(tmp_path / "{a,b}" / "00000.tar")
    (batch,) = loader(both, batch_size=6).epoch(0)
    assert len(set(batch["group"].tolist())) == 6
    assert [part.name for part in data.parts_of(both)] == ["a/00000.tar", "b/00000.tar"]
    (alone,) = loader(str(tmp_path / "a" / "00000.tar"), batch_size=3, shuffle=False).epoch(0)
    shutil.move(tmp_path / "a", tmp_path / "moved")  # the group ignores the folder if the file's name is unique
    (moved,) = loader(str(tmp_path / "moved" / "00000.tar"), batch_size=3, shuffle=False).epoch(0)
    assert bits(alone) == bits(moved)


def test_what_is_not_a_source(tmp_path):
    here = str(tmp_path)
    shard(tmp_path / "tars")
    shard(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "list.txt").write_text("tars/train-000.tar\nmissing.tar\n")
    (tmp_path / "nested.txt").write_text("list.txt\n")
    table(tmp_path / "other.csv", [["a", "b"]], ("id", "url"))
    table(tmp_path / "empty.csv", [])
    (tmp_path / "no.parquet").write_bytes(b"hello")
    for name, text in (("cut", "[1"), ("bare", '[{"image": "a.png"}]'), ("object", '{"a": 1}'), ("none", "[]")):
        (tmp_path / f"{name}.json").write_text(text)
    several = [{"image": "a.png", "caption": "x", "split": split} for split in ("train", "val")]
    (tmp_path / "several.json").write_text(json.dumps(several))
    for split in ("test", "val"):
        (tmp_path / "benchmark" / split).mkdir(parents=True)
        (tmp_path / "benchmark" / split / "nshards.txt").write_text("1")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png())
    for bad, message in (
        ([], "shards: .*empty list"),
        (7, "shards: expected a path, an http.*, got 7"),
        (f"{here}/no-*.tar", r"shards: expected files, got the pattern '.*no-\*.tar', which matches none"),
        (f"{here}/train-{{000..001}}.tar", r"shards: expected a file, got '.*train-001.tar', which does not exist"),
        (f"{here}/empty", "shards: expected a folder of images,? .*, got '.*empty', which has no image$"),
        (f"{here}/tars", r"shards: .*tars', which has no image \(try its \*.tar\)"),
        (f"{here}/none.txt", "shards: expected a list file with one path or URL a line, got '.*none.txt'"),
        (f"{here}/list.txt", r"shards: line 2 of '.*list.txt': expected a file, got '.*missing.tar', which does not exist"),
        (f"{here}/nested.txt", "shards: line 1 of '.*': expected no list file in a list file, got '.*list.txt'"),
        (
            f"{here}/other.csv",
            "shards: expected a table with a column filepath or .*image_key.*, got '.*' with .* 'id', 'url'",
        ),
        (f"{here}/empty.csv", "shards: expected a table with rows, got '.*empty.csv', which has none"),
        (f"{here}/no.parquet", "shards: expected .*no.parquet'"),
        (f"{here}/cut.json", "shards: expected images with captions, as in Karpathy's .*cut.json', .*: JSONDecodeError"),
        (f"{here}/bare.json", "bare.json', another one: LookupError: none of captions, caption, sentences"),
        (f"{here}/object.json", "object.json', another one: KeyError: 'images'"),
        (f"{here}/none.json", "shards: expected images with captions, got none in '.*none.json'"),
        (f"{here}/several.json", "shards: expected one of the splits train, val, as .*several.json#train, got none"),
        (f"{here}/several.json#test", "shards: expected images with captions, got none of the split 'test' in"),
        (f"{here}/benchmark", "shards: expected one of the splits test, val, as .*benchmark#test, got none"),
        (f"{here}/photos#val", "shards: expected a split of a data set, got '.*photos', which has no val/nshards.txt"),
        ("s3://bucket/a.tar", "shards: expected a path, .*got 's3://bucket/a.tar'; .*'pipe:aws s3 cp"),
        ({"shard": "a"}, r"shards: expected a mapping with shards and, .* weight, .*got \{'shard': 'a'\}"),
        ({"shards": f"{here}/tars/*", "weight": 0}, "shards: expected a weight above 0, got 0"),
        ({"shards": f"{here}/tars/*", "weight": float("nan")}, "shards: expected a weight above 0, got nan"),
        ({"shards": f"{here}/tars/*", "image_key": "x"}, "shards: expected a table or JSON, since image_key, .*got '.*tars"),
    ):
        with pytest.raises(InputError, match=message):
            loader(bad)
    with pytest.raises(InputError, match="^data.train: expected a file"):
        data.parts_of("nowhere.tar", "data.train")


class Killer:
    """A transform that kills its process the first `times` times that it meets `key`; a file counts the kills."""

    def __init__(self, path, at, times):
        self.path, self.at, self.times = path, at, times

    def __call__(self, image):
        if image.getpixel((0, 0)) == self.at:
            with open(self.path, "ab") as file:
                file.write(b"x")
            if os.path.getsize(self.path) <= self.times:
                os.kill(os.getpid(), 9)
        return augment(image)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("first", [0, 4])
def test_a_killed_worker_is_started_again_and_the_batches_are_the_same(tmp_path, workers, first):
    paths = [shard(tmp_path, 12 * number) for number in range(5)]
    broken = write(tmp_path / "broken.tar", [("b", {"png": b"", "txt": b"x"}), sample(90)])
    options = {"workers": workers, "batch_size": 4, "drop_last": False, "shuffle_buffer": 8}
    undisturbed = loader([*paths, broken], **options)
    whole = list(undisturbed.epoch(0))
    at = data.shards.decode_pil(png(31)).getpixel((0, 0))
    reader = loader([*paths, broken], transform=Killer(tmp_path / "count", at, 2), **options)
    assert bits(list(reader.epoch(0, first))) == bits(whole[first:])
    assert len(reader.restarts) == 2
    assert "killed by signal" in reader.restarts[0]
    assert "of epoch 0" in reader.restarts[0]
    assert reader.report() == undisturbed.report()
    assert bits(reader.state()) == bits(undisturbed.state())
    always = loader([*paths, broken], transform=Killer(tmp_path / "count", at, 99), **options)
    with pytest.raises(
        data.WorkerError,
        match="data.workers: a loader process died .*killed by signal SIGKILL.*fewer data.workers or a smaller",
    ):
        list(always.epoch(0))
    assert len(always.restarts) == 3
