"""Mutated tars and indices: read in time, with no error but that of a torn shard, and equally from a file and a stream.

To repeat a case: pytest tests/data/test_fuzz.py --cases 1 --first-case NUMBER
"""

import contextlib
import io
import random
import tarfile
import warnings

import archives as make

from simplclip import data
from simplclip.data import build_index, index, report, shards
from simplclip.data.addresses import Address
from simplclip.data.broken import BrokenSample, ShardError, Skipped
from simplclip.data.shards import contents, read_shard

SECONDS = 1.0  # CPU time


@contextlib.contextmanager
def harmless(what):
    """Context that fails with the name of the case for any error, and after SECONDS."""
    with make.in_time(SECONDS, what):
        try:
            yield
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def read(url, **options):
    """Returns the samples of a shard with their files or damage, and the counts; None if the shard cannot be opened."""
    skipped, found = Skipped(), []
    try:
        for sample in read_shard(url, skipped, every=True, **options):
            try:
                found.append(contents(sample) | {"__url__": ""})
            except BrokenSample as broken:
                found.append(broken.args[0])
    except ShardError:
        return None
    return found, dict(skipped.counts)


def test_mutated_archives(tmp_path, monkeypatch, archives):
    data = b""
    monkeypatch.setattr(shards, "opened", lambda url: contextlib.nullcontext(io.BytesIO(data)))
    seen = {"whole": 0, "accepted": 0, "torn": 0, "not opened": 0}
    for number in archives:
        what, data, files, ending = make.case(number)
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(data)
        with harmless(what):
            local = read(str(path))
            streamed = read(Address(f"http://host/{number}{ending}"))
            assert local == streamed
            if files is not None:
                found = {
                    f"{s['__key__']}.{suffix}": s[suffix] for s in local[0] for suffix in s if not suffix.startswith("__")
                }
                assert (found, local[1]) == (files, {})
                with tarfile.open(path) as same:
                    assert {m.name: same.extractfile(m).read() for m in same if m.isreg()} == files
            if local is not None and number % 3 == 0:
                index.write(index.paths(str(path))[0], *build_index.inspect_shard(str(path)))
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    assert read(str(path)) == local
        seen["not opened" if local is None else "torn" if local[1].get("torn tar") else "accepted"] += 1
        seen["whole"] += files is not None
        path.unlink()
    print(seen)
    assert min(seen.values()) > 0 or len(archives) < 100


def test_mutated_indices(tmp_path, archives):
    """An unused index is named in a warning, and samples are those of the headers. A used index does no harm."""
    used = 0
    for number in archives:
        draw = random.Random(f"index/{number}")
        _, files = whole = make.whole(draw)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(whole[0])
        names = index.paths(str(path))[0]
        index.write(names, *build_index.inspect_shard(str(path)))
        what, changed = make.changed_index(names.read_bytes(), draw)
        names.write_bytes(changed)
        with harmless(f"case {number}: {what}"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = read(str(path))
            said_of_members = len(said)
            assert type(index.count(str(path)) or 0) is int
            summary = report.summarise(*data.parts_of(str(path)))
            assert summary.sums["samples"] >= 0
            assert all("is not used" in str(one.message) for one in said)
            assert said_of_members or found is not None
            if said_of_members:
                assert found == read(str(path), indexed=False)
        used += not said
        path.unlink()
    assert used < len(archives) or len(archives) < 100
