"""Packs data, and reads the shards."""

import json

from simplclip.data import pack, write_tars
from simplclip.data.rows import Options
from support.data.pairs import members, meta


def samples(shards):
    """Returns the files of the samples of shards, by key."""
    found = {}
    for shard in shards:
        for name, content in members(shard).items():
            found.setdefault(name[:9], {})[name[10:]] = content
    return found


def skipped_of(out):
    return write_tars.skipped_in(meta(out)["splits"]["data"]["shards"].values())


def packed(source, out, options=Options(), **more):  # noqa: B008
    """Returns (name, captions) of each sample, and what was left out."""
    shards = pack.pack(source, out, options, progress=False, **more)
    records = [json.loads(sample["json"]) for sample in samples(shards).values()]
    skipped = dict(skipped_of(out).counts)
    return [(record["source"].partition("/")[2], record["captions"]) for record in records], skipped
