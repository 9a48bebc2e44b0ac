"""Mutated tars: read in time, and equally from a file and a stream.

To repeat a case: pytest tests/data/test_fuzz.py --cases 1 --first-case NUMBER
"""

import contextlib
import io

from simplclip.data import read_tars
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.find_sources import Address, Source
from simplclip.data.read_tars import read_tar
from support.data import archives as make

SECONDS = 1.0  # CPU time


@contextlib.contextmanager
def harmless(what):
    """Context that fails with the name of the case for any error, and after SECONDS."""
    with make.in_time(SECONDS, what):
        try:
            yield
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def read(url):
    """Returns the files of the samples, or why they were not read, and the counts of damage."""
    skipped, files = Skipped(), []
    for sample in read_tar(Source(url, name="a"), skipped):
        for suffix, value in sample.items():
            if not suffix.startswith("__"):
                value = value.reason if isinstance(value, BrokenSample) else value
                files.append((f"{sample['__key__']}.{suffix}", value))
    return files, dict(skipped.counts)


def test_mutated_archives(tmp_path, monkeypatch, archives):
    data, opened = b"", read_tars._opened

    @contextlib.contextmanager
    def open_stream(url):
        if isinstance(url, Address):
            yield io.BytesIO(data), "r|"
        else:
            with opened(url) as (file, mode):
                yield file, mode

    monkeypatch.setattr(read_tars, "_opened", open_stream)
    seen = {"whole": 0, "accepted": 0, "damaged": 0}
    for number in archives:
        what, data, files = make.case(number)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(data)
        with harmless(what):
            local, streamed = read(str(path)), read(Address("http://host/a.tar"))
            assert local == streamed
            if files is not None:
                expected = [
                    (name, value) for name, value in files.items() if not name.endswith(".bin")
                ]
                assert local == (expected, {})
                seen["whole"] += 1
        seen["damaged" if local[1].get("damaged tar") else "accepted"] += 1
        path.unlink()
    print(seen)
    assert min(seen.values()) > 0 or len(archives) < 100
