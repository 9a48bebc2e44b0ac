"""Smaller images in new shards: what changes, what stays, and recovery from kills and full disks."""

import functools
import gzip
import io
import json
import resource
from pathlib import Path

import kills
import numpy as np
import pytest
from pairs import call, digests, forked, members, meta, one_line, png, write
from photos import encode, photo
from PIL import Image, ImageCms

from simplclip.common.errors import InputError
from simplclip.data import shrink
from simplclip.data.decode import decode_pil, size_of

CAPTION = {"txt": b"ein Bild", "json": b'{"caption": "ein Bild", "width": 512,  "height": 384}'}
BIG = encode(photo(0, (96, 128)), quality=95)


def run(shards, out, **options):
    return shrink.run(str(shards), out, **{"short": 48, "workers": 1, "progress": False} | options)


def one(tmp_path, files, **options):
    """Returns the files of a sample after shrinking."""
    path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.tar", [("a", files | {"txt": b"one"})])
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    summary = run(path, out, **options)
    found = {name.partition(".")[2]: data for name, data in members(out / Path(path).name).items()}
    assert found.pop("txt") == b"one"
    return found, summary


def difference(encoded, other):
    """Returns the mean difference of two images of one size, in levels."""
    first, second = (np.asarray(image, dtype=float) for image in (encoded, other))
    return np.abs(first - second).mean()


def test_only_larger_images_change(tmp_path):
    small, npy = encode(photo(1, (48, 90)), quality=60), b"\x93NUMPY"
    samples = [
        ("groß/картинка", {"jpg": BIG, **CAPTION, "teacher.npy": npy, "seg.png": png(5, (90, 90)), "cls": b"1"}),
        ("small", {"jpg": small, **CAPTION}),
    ]
    (tmp_path / "meta.json").write_text(json.dumps({"teacher": {"name": "t", "width": 2, "logit_scale": 1.0}}))
    source = Path(write(tmp_path / "a-0.tar", samples))
    before = digests(tmp_path, "*.tar")
    summary = run(source, tmp_path / "out")
    found = members(tmp_path / "out" / "a-0.tar")
    want = {f"{key}.{suffix}": data for key, files in samples for suffix, data in files.items()}
    assert list(found) == list(want)
    changed = "groß/картинка.jpg"
    assert {name for name in want if found[name] != want[name]} == {changed}
    assert size_of(found[changed]) == (48, 64)
    plain = photo(0, (96, 128)).resize((64, 48), Image.Resampling.LANCZOS)
    assert difference(Image.open(io.BytesIO(found[changed])), plain) < 4
    assert summary["bytes"] == [source.stat().st_size, (tmp_path / "out" / "a-0.tar").stat().st_size]
    about = meta(tmp_path / "out")
    assert about["shrink"] == {"short": 48, "quality": 90, "format": "jpg"}
    assert about["teacher"]["name"] == "t"
    assert digests(tmp_path, "*.tar") == before


def test_an_rgb_profile_is_kept(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found, _ = one(tmp_path, {"jpg": encode(photo(0, (96, 96)), icc_profile=profile)})
    assert Image.open(io.BytesIO(found["jpg"])).info["icc_profile"] == profile
    of_cmyk = bytearray(profile)
    of_cmyk[16:20] = b"CMYK"
    found, _ = one(tmp_path, {"jpg": encode(photo(0, (96, 96)).convert("CMYK"), icc_profile=bytes(of_cmyk))})
    image = Image.open(io.BytesIO(found["jpg"]))
    assert (image.mode, image.info.get("icc_profile")) == ("RGB", None)


def grey16():
    return encode(Image.fromarray(np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16)), "PNG")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    return encode(photo(0, (96, 128)), exif=exif)


def clear():
    image = photo(0, (96, 96)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((96, 96)))
    return encode(image, "PNG")


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        ("png", grey16),
        ("png", clear),
        ("jpeg", lambda: encode(photo(0, (96, 96)).convert("CMYK"))),
        ("webp", lambda: BIG),
        ("jpg", turned),
    ],
    ids=["16 bits", "transparent", "CMYK", "misnamed", "turned"],
)
def test_it_looks_as_training_sees_it(tmp_path, suffix, make):
    """Of several images only the one that training uses is shrunk, and training uses it afterwards."""
    encoded, other = make(), png(2, (96, 96), "WEBP")
    found, summary = one(tmp_path, {suffix: encoded} | ({} if suffix == "webp" else {"webp": other}))
    name = suffix if suffix[0] == "j" else "jpg"
    assert found == {name: found[name]} | ({} if suffix == "webp" else {"webp": other})
    image = Image.open(io.BytesIO(found[name]))
    assert (image.format, dict(image.getexif())) == ("JPEG", {})
    seen = decode_pil(encoded)
    assert difference(decode_pil(found[name]), seen.resize((seen.width // 2, seen.height // 2), Image.Resampling.LANCZOS)) < 4
    assert not summary["skipped"].counts


@pytest.mark.parametrize(("size", "want"), [((49, 3000), (48, 2939)), ((481, 481), (48, 48)), ((97, 50), (93, 48))])
def test_sizes(tmp_path, size, want):
    found, _ = one(tmp_path, {"jpg": encode(photo(0, size))})
    assert size_of(found["jpg"]) == want


def test_broken_samples_are_copied_and_counted(tmp_path):
    samples = [
        ("cut", {"jpg": BIG[: len(BIG) // 2], "txt": b"x"}),
        ("page", {"png": b"<html>", "txt": b"x"}),
        ("mute", {"jpg": BIG}),
        ("cut and small", {"png": png(1, (40, 40))[:900], "txt": b"x"}),
        ("good", {"jpg": BIG, "txt": b"x"}),
    ]
    summary = run(write(tmp_path / "a.tar", samples), tmp_path / "out")
    assert summary["skipped"].counts == {"truncated image": 2, "not an image": 1, "missing caption": 1}
    before, after = members(tmp_path / "a.tar"), members(tmp_path / "out" / "a.tar")
    assert {name for name in before if after[name] != before[name]} == {"good.jpg"}
    assert run(tmp_path / "a.tar", tmp_path / "out")["skipped"].counts == summary["skipped"].counts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes three shards of 20 photographs in two sizes, with some broken ones; one shard is compressed."""
    folder = tmp_path_factory.mktemp("shrink") / "in"
    folder.mkdir()
    images = [encode(photo(i, (120, 160) if i % 3 else (40, 60)), quality=95) for i in range(8)]
    for shard in range(3):
        files = [{"jpg": images[i % 8], **CAPTION} if i % 13 else {"jpg": images[1][:999], **CAPTION} for i in range(20)]
        write(folder / f"{shard:05d}.tar", [(f"{shard}-{i:03d}", one) for i, one in enumerate(files)])
    (folder / "00002.tar.gz").write_bytes(gzip.compress((folder / "00002.tar").read_bytes(), mtime=0))
    (folder / "00002.tar").unlink()
    return folder


def test_the_result_does_not_depend_on_the_number_of_processes(source, tmp_path):
    for workers in (1, 3):
        summary = run(source / "*.tar*", tmp_path / str(workers), workers=workers)
        assert (summary["shards"], summary["samples"]) == (3, 60)
    assert set(digests(tmp_path / "1")) == {"00000.tar", "00001.tar", "00002.tar", "meta.json"}
    assert digests(tmp_path / "1") == digests(tmp_path / "3")


def shrunk(source, out, ready):
    ready.set()
    run(source / "*.tar*", out, workers=2)


@pytest.mark.prove  # test_rewrite.py kills the same writer
def test_killed_at_any_moment(source, tmp_path):
    before, whole = digests(source), tmp_path / "whole"

    def check_whole(out):
        assert digests(out, "*.tar").items() <= digests(whole, "*.tar").items()

    kills.check(["simplclip.data.shrink", "test_shrink"], functools.partial(shrunk, source), tmp_path, check_whole)
    assert digests(source) == before
    assert len(digests(whole)) == 4


def test_finished_shards_are_kept(source, tmp_path):
    run(source / "00000.tar", tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert run(source / "*.tar*", tmp_path, workers=2)["written"] == 2
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == times["00000.tar"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_leaves_whole_shards(source, tmp_path, workers):
    """Files cannot grow beyond 30 kB, as on a full disk; then the same command succeeds."""
    said = tmp_path / "said"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        try:
            run(source / "*.tar*", tmp_path / "out", workers=workers)
        except InputError as error:
            said.write_text(str(error))
            raise

    assert forked(limited) == 1
    assert "could not be written: File too large; the same command goes on when there is more room" in said.read_text()
    assert set(digests(tmp_path / "out")) == {"meta.json"}
    run(source / "*.tar*", tmp_path / "out")
    run(source / "*.tar*", tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_command(source, tmp_path):
    out = tmp_path / "out"
    result = call("data", "shrink", str(source / "*.tar*"), "--out", out, "--short", "48", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert f"wrote 3 of 3 shards to {out}: 60 samples" in result.stdout
    assert "kB before" in result.stdout
    for name, value in (("short", 0), ("quality", 101), ("workers", 0)):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value}"):
            run(source / "*.tar", tmp_path / "none", **{name: value})
    assert not (tmp_path / "none").exists()
    assert "settings of the earlier run" in one_line("data", "shrink", source / "00000.tar", "--out", out, "--quality", "80")
