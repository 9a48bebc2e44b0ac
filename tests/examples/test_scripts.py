"""The training scripts of examples/: each trains a tiny model, and its weights load."""

import re

import example
import pytest
import tiny
from trainer_runs import write_models

import simplclip


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Weights of open_clip's model tiny, which learns the shards in seconds."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    return str(tmp_path / "tiny.bin")


def losses(printed: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss ([\d.]+)", printed)]


def shards(folder) -> str:
    """Writes a shard of 24 pairs with captions as txt and json."""
    import io
    import tarfile

    with tarfile.open(folder / "pairs-0.tar", "w") as tar:
        for name, colour in tiny.COLOURS.items():
            for shape in tiny.SHAPES:
                for suffix, content in (("png", tiny.picture(colour, shape)), ("txt", f"a {name} {shape}".encode())):
                    member = tarfile.TarInfo(f"{name}-{shape}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "pairs-*.tar")


@pytest.mark.parametrize("script", ["drop_in_loss", "big_batch"])
def test_a_loop_with_our_loss_trains_and_its_weights_load(script, model, tmp_path, capsys):
    extra = ["--micro-batch", "6"] if script == "big_batch" else []
    arguments = [shards(tmp_path), "--model", "tiny", "--batch-size", "12", "--steps", "31", "--workers", "0", *extra]
    example.load(script).main([*arguments, "--out", "my.pt"])
    values = losses(capsys.readouterr().out)
    assert values[-1] < 0.8 * values[0]
    assert simplclip.load("open_clip:tiny/my.pt").encode_text(["a red ring"]).shape == (1, 16)
