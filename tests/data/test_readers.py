"""Every kind of input in every reader: its keys, captions and labels, or the one sentence of the error."""

import functools
import gzip
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from captioners import NAME, build, register
from pairs import call, loader, one_line, png, resize, table, text_of, write
from trainer_runs import write_models

import simplclip
from simplclip import data, embedding, teacher
from simplclip.commands.options import named_splits
from simplclip.common.errors import InputError
from simplclip.data import pack, report
from simplclip.data.broken import Skipped
from simplclip.teacher import caption

ROWS = [("img/a.png", "one"), ("img/a.png", "two"), ("img/sub/b.png", "three")]
OF_IMAGES = [("img/a.png", ["one", "two"], None), ("img/sub/b.png", ["three"], None)]
OF_ROWS = [(f"{number:09d}", [text], None) for number, (_, text) in enumerate(ROWS)]
OF_TAR = [("k0", ["one", "two"], "x"), ("k1", ["three"], None), ("k2", ["four"], None)]
BARE, FIRST, MERGED = "bare", "first", "merged"  # no captions; evaluation takes a json's first; it joins rows
KINDS = {
    "tar": ("t/p-0.tar", OF_TAR, FIRST),
    "compressed tar": ("z/p-0.tar.gz", OF_TAR, FIRST),
    "braces": ("t/p-{0..0}.tar", OF_TAR, FIRST),
    "glob": ("t/*.tar", OF_TAR, FIRST),
    "list file": ("list.txt", OF_TAR, FIRST),
    "URL": ("URL/t/p-0.tar", OF_TAR, FIRST),
    "command": ("pipe:cat t/p-0.tar", OF_TAR, FIRST),
    "mapping": ({"shards": "t/p-0.tar", "weight": 1.0}, OF_TAR, FIRST),
    "CSV": ("rows.csv", OF_ROWS, MERGED),
    "CSV in a list file": ("tables.txt", OF_ROWS, MERGED),
    "TSV": ("rows.tsv", OF_ROWS, MERGED),
    "parquet": ("rows.parquet", OF_ROWS, MERGED),
    "CSV with title and caption": ("both.csv", OF_ROWS, MERGED),
    "CSV with other columns": (
        {"shards": "other.csv", "image_key": "where", "caption_key": "what", "separator": ";", "images": "img"},
        OF_ROWS, MERGED,
    ),
    "Karpathy's JSON": ("karpathy.json#val", OF_IMAGES, None),
    "COCO's JSON": ("coco.json", OF_IMAGES, None),
    "JSON list": ("list.json", OF_IMAGES, None),
    "JSON of rows": ("rows.json", OF_IMAGES, None),
    "folder with texts": ("texts", [("a", ["one", "two"], "x"), ("b", ["three"], None)], FIRST),
    "folder by class": ("classes", [("cat_x/1.png", None, 0), ("cat_x/2.png", None, 0), ("dog/1.png", None, 1)], BARE),
    "images": ("img/*.png", [("HERE/img/a.png", None, None)], BARE),
    "list of images": ("images.txt", [("HERE/img/a.png", None, None), ("HERE/img/sub/b.png", None, None)], BARE),
    "clip-benchmark": ("benchmark", [("s0", None, 1), ("s1", None, 0)], BARE),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("readers")
    for place in ("t", "z", "img/sub", "texts", "classes/cat_x", "classes/dog", "benchmark/test"):
        (here / place).mkdir(parents=True)
    record = {"captions": ["one", "two"], "group": "g", "label": "x"}
    files = [{"json": json.dumps(record).encode()}, {"txt": b"three"}, {"json": b'{"caption": "four"}', "txt": b"no"}]
    tar = write(here / "t/p-0.tar", [(f"k{i}", {"png": png(i), **more}) for i, more in enumerate(files)])
    (here / "z/p-0.tar.gz").write_bytes(gzip.compress(Path(tar).read_bytes()))
    (here / "list.txt").write_text("\ufeff# one\nt/p-0.tar\n", "utf-8")
    (here / "tables.txt").write_text("rows.csv\n")
    for number, name in enumerate(
        ("img/a", "img/sub/b", "texts/a", "texts/b", *(f"classes/{x}" for x in ("cat_x/1", "cat_x/2", "dog/1")))
    ):
        (here / f"{name}.png").write_bytes(png(number))
    table(here / "rows.csv", ROWS)
    table(here / "rows.tsv", ROWS, separator="\t")
    table(here / "both.csv", [(path, "no", text) for path, text in ROWS], ("filepath", "title", "caption"))
    table(here / "other.csv", [(text, path.removeprefix("img/")) for path, text in ROWS], ("what", "where"), ";")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    paths, texts = map(list, zip(*ROWS))
    parquet.write_table(pyarrow.table({"caption": texts, "image_path": paths}), here / "rows.parquet")
    split = [
        {"filepath": "img", "filename": "a.png", "split": "val"},
        {"filepath": "img/sub", "filename": "b.png", "split": "val"},
    ]
    for entry, (_, captions, _) in zip(split, OF_IMAGES):
        entry["sentences"] = [{"raw": f" {text} "} for text in captions]
    other = {"filename": "gone.png", "split": "train", "sentences": [{"raw": "not of this split"}]}
    images = [{"id": 7 + i, "file_name": path} for i, (path, _, _) in enumerate(OF_IMAGES)]
    said = [{"image_id": 7 + (path != "img/a.png"), "caption": text} for path, text in ROWS]
    for name, content in (
        ("karpathy", {"images": [other, *split]}),
        ("coco", {"images": images, "annotations": said}),
        ("list", [{"image": path, "captions": captions} for path, captions, _ in OF_IMAGES]),
        ("rows", [{"filepath": path, "caption": text} for path, text in ROWS]),
    ):
        (here / f"{name}.json").write_text("\ufeff" * (name == "list") + json.dumps(content), "utf-8")
    (here / "texts/a.json").write_text(json.dumps(record))
    (here / "texts/b.txt").write_text("\ufeffthree", "utf-8")
    (here / "images.txt").write_text("img/a.png\nimg/sub/b.png\n")
    for shard in range(2):
        write(here / f"benchmark/test/{shard}.tar", [(f"s{shard}", {"png": png(shard), "cls": b"%d" % (1 - shard)})])
    (here / "benchmark/test/nshards.txt").write_text("2\n")
    (here / "benchmark/classnames.txt").write_text("a cat\nthe dog\n")
    write_models(here)
    register(here)
    coca = build()
    (here / "coca.pt").touch()
    torch.manual_seed(3)
    torch.save(open_clip.create_model("tiny").state_dict(), here / "tiny.pt")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=here)
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        patch = pytest.MonkeyPatch()
        patch.setattr(caption, "load_model", lambda *_, **options: coca)
        tokenizer = caption.tokenizer_of(coca, NAME)
        patch.setattr(caption, "tokenizer_of", lambda *_: tokenizer)
        yield here, f"http://127.0.0.1:{server.server_address[1]}"
        patch.undo()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def encoder(folder):
    return simplclip.load("open_clip:tiny", folder[0] / "tiny.pt", device="cpu")


def train(what, out, encoder):
    batches = loader(what, batch_size=1, shuffle=False, captions_per_image=2).epoch(0)
    return [(batch["key"][0], {text_of(row) for row in batch["text"][0]}) for batch in batches]


def evaluate(what, out, encoder):
    found = data.held_out(what).batches(resize, 2, Skipped(), workers=0)
    return [(sample.key, sample.captions, sample.label) for _, _, several in found for sample in several]


def written(what, out):
    """Yields the samples that training reads from the sidecars in `out`, and from shards beside `out` if there are any."""
    shards = f"{out}.shards/*.tar" if Path(f"{out}.shards").exists() else what
    for part in data.parts_of(shards):
        for sample in data.parts.read_part(part, Skipped(), sidecars=[out]):
            if {"teacher.npy", "json"} & sample.keys():
                yield data.shards.parse(sample, teacher="teacher.npy" in sample)


def teach(what, out, encoder):
    teacher.write(what, out, encoder, progress=False)
    found = [
        (one.record.get("source", f"/{one.key}").partition("/")[2], one.captions, one.features.shape)
        for one in written(what, out)
    ]
    assert all(shape == (1 + len(captions), 16) for _, captions, shape in found)
    return [(key, captions) for key, captions, _ in found]


def describe(what, out, encoder):
    options = {"checkpoint": "coca.pt", "n": 1, "max_tokens": 4, "progress": False, "device": "cpu"}
    caption.run(what, out, NAME, **options)
    assert all(one.record["synthetic"] == 1 for one in written(what, out))
    return [(one.record.get("source", f"/{one.key}").partition("/")[2], one.captions[:-1]) for one in written(what, out)]


def embed(what, out, encoder):
    embedding.embed(what, out.with_suffix(".npz"), model=encoder, workers=0)
    found = np.load(out.with_suffix(".npz"))
    return [*zip(found["key"].tolist(), found["caption"].tolist())]


def summarise(what, out, encoder):
    return report.run(what, sample=0, workers=1, progress=False)["samples"]


def packed(what, out, encoder):
    found = [sample for shard in pack.pack(what, out, progress=False) for sample in data.shards.read_shard(shard, Skipped())]
    pairs = [data.shards.parse(sample) for sample in found]
    return [(one.record["source"].partition("/")[2], one.captions) for one in pairs if one.image.size == (12, 12)]


def expected(reader, samples, how, local):
    """Returns the result or error that a reader must give."""
    if reader is summarise:
        return len(samples)
    if reader is embed:
        return [(key, captions[0] if captions else "") for key, captions, _ in samples]
    if reader is evaluate:
        if how == MERGED:
            return [("000000000", ["one", "two"], None), ("000000002", ["three"], None)]
        if all(captions is None and label is None for _, captions, label in samples):
            return f"has no usable sample; {len(samples)} skipped: {len(samples)} missing caption"
        return [(key, (captions or [])[: 1 if how == FIRST else None], label) for key, captions, label in samples]
    if reader is train:
        if how == BARE:
            return f"do not fill batch_size 1 with drop_last; {len(samples)} skipped: {len(samples)} missing caption"
        return [(key, {*captions}) for key, captions, _ in samples]
    if how == BARE:
        return [] if local and reader is not packed else "shards: expected images with captions, got none that is usable in"
    return [(key, captions) for key, captions, _ in samples]


@pytest.mark.parametrize("reader", [train, evaluate, teach, describe, embed, packed, summarise])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_of_every_kind(folder, encoder, tmp_path, monkeypatch, kind, reader):
    here, url = folder
    monkeypatch.chdir(here)
    what, samples, how = KINDS[kind]
    what = what.replace("URL", url) if isinstance(what, str) else what
    samples = [(key.replace("HERE", str(here)), *rest) for key, *rest in samples]
    local = all(part.is_local_tar for part in data.parts_of(what))
    wanted, before = expected(reader, samples, how, local), {*here.rglob("*")}
    try:
        found = reader(what, tmp_path / "out", encoder)
    except (InputError, data.EmptyEpochError) as error:
        found = str(error)
        assert wanted in found
        assert not [*tmp_path.iterdir()]
    else:
        assert found == wanted
    assert {*here.rglob("*")} == before


def test_what_commands_say_of_a_table(folder, tmp_path, monkeypatch):
    """Commands take a table's options; missing images are counted, and the sample of images is spread over the pieces."""
    monkeypatch.chdir(folder[0])
    monkeypatch.setattr(data.tables, "ROWS", 2)
    table(tmp_path / "t.csv", [(f"img/{name}.png", "x") for name in ("a", "sub/b", "gone", "a")], ("where", "what"), ";")
    named = f"{{shards: {tmp_path / 't.csv'}, image_key: where, caption_key: what, images: .}}"
    result = call("data", "report", named, "--sample", 4, "--workers", 2)
    assert result.exit_code == 0, result.output
    for words in ("4 in 1 file,", "3 png", "cannot be read", "images/s on one core (3,"):
        assert words in result.output
    (tmp_path / "shards").mkdir()
    result = call("data", "pack", named, "--out", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    assert "packed 3 samples" in result.output
    assert "1 skipped: 1 cannot be read" in result.output
    again = call("data", "pack", named, "--out", tmp_path / "shards").output
    assert again == f"kept {tmp_path}/shards/*.tar, which an earlier run made of the same files\n"
    assert named_splits([f"t={named}"])["t"]["image_key"] == "where"
    assert "Invalid value for 'PAIRS'" in call("data", "report", "{shards: [").output


def test_a_command_that_fails_leaves_no_copies(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder[0])
    for options, told in (
        (("--heads", "rows.csv"), "expected heads of the built-in teacher"),
        (("--teacher", "open_clip:tiny"), "checkpoint: expected a file of weights"),
        (("--teacher", "open_clip:tiny", "--checkpoint", "tiny.pt", "--dtype", "int8"), "dtype: expected fp16 or bf16"),
    ):
        assert told in one_line("teacher", "rows.csv", "--out", tmp_path / "out", *options)
        assert not [*tmp_path.iterdir()]
    options = ("--teacher", "open_clip:tiny", "--checkpoint", "tiny.pt", "--device", "cpu")
    for _ in range(2):  # the second run keeps all files
        result = call("teacher", "rows.csv", "--out", tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        assert "3 samples with features of open_clip:tiny, width 16" in result.output
    assert "packed" not in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.shards"}
    told = "out.shards to hold the shards of list.json, got those of other files; remove it or choose another --out"
    assert told in one_line("teacher", "list.json", "--out", tmp_path / "out", *options)
