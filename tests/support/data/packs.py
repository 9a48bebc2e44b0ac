"""Writes tables, packs data, and reads the shards."""

import json

import pytest

from simplclip.data import pack
from simplclip.data.rows import Options
from support.data.pairs import members, meta, png


def write_parquet(path, columns, **options):
    """Writes {name: values} as a parquet file, and returns its path; skips without pyarrow."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_images(folder, *names):
    """Writes a picture of noise at each FOLDER/NAME, the n-th of seed n."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def samples(shards):
    """Returns the files of the samples of shards, by key."""
    found = {}
    for shard in shards:
        for name, content in members(shard).items():
            found.setdefault(name[:9], {})[name[10:]] = content
    return found


def skipped_of(out):
    return pack.skipped_in(meta(out)["splits"]["data"]["shards"].values())


def packed(source, out, options=Options(), **more):  # noqa: B008
    """Returns (name, captions) of each sample, and what was left out."""
    shards = pack.pack(source, out, options, progress=False, **more)
    records = [json.loads(sample["json"]) for sample in samples(shards).values()]
    skipped = dict(skipped_of(out).counts)
    return [(record["source"].partition("/")[2], record["captions"]) for record in records], skipped
