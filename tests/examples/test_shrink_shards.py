"""examples/shrink_shards.py: large images become smaller, all else stays, and whole shards are
kept.
"""

import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from support.data import pairs
from support.programs import load_example
from support.train import tiny

shrinking = load_example("shrink_shards")


def samples(path):
    return list(webdataset.WebDataset(str(path), shardshuffle=False))


def test_images_shrink_and_all_else_stays(tmp_path, capsys):
    buffer = io.BytesIO()
    noise = Image.effect_noise((90, 60), 80).convert("RGBA")
    noise.putalpha(Image.effect_noise((90, 60), 200))
    noise.save(buffer, "PNG")
    record = json.dumps({"captions": ["noise"]}).encode()
    large = {"png": buffer.getvalue(), "json": record, "teacher.npy": b"\x93NUMPY"}
    small = {"png": tiny.picture(tiny.COLOURS["red"], "ring"), "txt": "крокодил".encode()}
    broken = {"jpg": b"no image", "txt": b"x"}
    for number in (0, 1):
        samples_of_shard = [(f"a.d/{number}", large), ("b", small), ("c", broken)]
        pairs.write(tmp_path / f"{number}.tar", samples_of_shard)
    arguments = [str(tmp_path / "*.tar"), "--out", str(tmp_path / "small"), "--short", "20"]
    shrinking.main(arguments)
    first, second, third = samples(tmp_path / "small" / "0.tar")
    assert first["__key__"] == "a.d/0"
    shrunk = np.asarray(Image.open(io.BytesIO(first["jpg"]))).astype(int)
    assert shrunk.shape == (20, 30, 3)
    resized = noise.resize((30, 20), Image.Resampling.BICUBIC).convert("RGB")
    assert abs(shrunk - np.asarray(resized)).mean() < 6
    assert "png" not in first
    assert (first["json"], first["teacher.npy"]) == (record, large["teacher.npy"])
    assert {name: second[name] for name in small} == small
    assert {name: third[name] for name in broken} == broken
    assert "before" in capsys.readouterr().out or (tmp_path / "small" / "1.tar").exists()

    (tmp_path / "small" / "0.tar").write_bytes(b"whole")
    (tmp_path / "small" / "1.tar").unlink()
    shrinking.main(arguments)
    assert (tmp_path / "small" / "0.tar").read_bytes() == b"whole"
    assert len(samples(tmp_path / "small" / "1.tar")) == 3
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["0.tar", "1.tar"]


def test_shards_that_would_be_lost_are_refused(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        pairs.write(tmp_path / folder / "[0].tar", [("x", {"txt": folder.encode()})])
    for shards, out, message in (
        (["a/[[]0].tar", "b/[0].tar"], "c", "expected files of different names, got two '[0].tar'"),
        (["none/*.tar"], "c", "none/*.tar', which is none"),
        (["a/[0].tar"], "a", "--out: expected another folder than that of"),
    ):
        paths = [str(tmp_path / shard) for shard in shards]
        with pytest.raises(SystemExit):
            shrinking.main([*paths, "--out", str(tmp_path / out)])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_of_several_images_in_a_sample_none_replaces_another(tmp_path):
    files = {}
    for suffix in ("jpg", "png", "webp"):
        buffer = io.BytesIO()
        Image.effect_noise((90, 60), 80).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
        files[suffix] = buffer.getvalue()
    pairs.write(tmp_path / "0.tar", [("a", files)])
    (tmp_path / "small").mkdir()
    shrinking.shrink(str(tmp_path / "0.tar"), tmp_path / "small", 20, 90)
    (sample,) = samples(tmp_path / "small" / "0.tar")
    assert {name: sample[name] for name in files} == files
