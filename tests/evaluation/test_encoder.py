"""`simplclip.load`: every kind of source, every kind of input."""

import json

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from trainer_runs import write_models

import simplclip
from simplclip import export, models
from simplclip import train as trainer
from simplclip.models.simplify import count_parameters
from simplclip.models.trained import load_model
from simplclip.train.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a run, its export, weights of an open_clip model, and pictures."""
    folder = tmp_path_factory.mktemp("encoder")
    write_models(folder)
    trainer.run(tiny.settings(folder, "run.steps=1"))
    export.run(folder / "run", folder / "export")
    for number, colour in enumerate(("red", "green", "blue")):
        (folder / f"{number}.png").write_bytes(tiny.picture(tiny.COLOURS[colour], "ring", size=40))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return simplclip.load(folder / "run", device="cpu")


@pytest.mark.slow
def test_features_are_those_of_the_model(folder, found):
    model, config, state = load_model(folder / "run")
    transform, tokenizer = models.transforms("siclip-tiny", train=False), models.tokenizer("siclip-tiny")
    pictures = [Image.open(folder / f"{i}.png").convert("RGB") for i in range(3)]
    with torch.no_grad():
        x = model.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
        y = model.encode_text(tokenizer(["red", "a blue ring"]), normalize=True)
    torch.testing.assert_close(found.encode_image(pictures), x)
    torch.testing.assert_close(found.encode_text(["red", "a blue ring"]), y)
    assert (found.name, found.step, found.config, found.width) == ("siclip-tiny", state["step"], config, x.shape[1])
    assert found.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert found.stamp()["weights"] == found.fingerprint()


def test_it_prints_in_five_lines(folder, found):
    counts = count_parameters(found.model)
    assert str(found).splitlines() == [
        f"siclip-tiny from {folder / 'run'}, step 1",
        f"  parameters: image {counts['image']:,}, text {counts['text']:,}, other 1, total {counts['total']:,}",
        "  images: 48 x 48 pixels; texts: 16 tokens",
        "  features: 256 numbers, computed in fp32 on cpu",
        f"  similarities: cosines times {found.logit_scale:.4g}",
    ]


def test_images_may_be_paths_pictures_and_tensors_one_or_many(folder, found):
    paths = [folder / f"{i}.png" for i in range(3)]
    expected = found.encode_image(paths)
    assert expected.shape == (3, found.width)
    assert expected.dtype == torch.float32
    pictures = [Image.open(path) for path in paths]
    raw = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    ready = torch.stack([found.preprocess(picture.convert("RGB")) for picture in pictures])
    for images in (tuple(map(str, paths)), pictures, raw, ready, ready.double(), [paths[0], pictures[1], ready[2]]):
        torch.testing.assert_close(found.encode_image(images), expected)
        torch.testing.assert_close(found.encode_image(images, batch_size=2), expected)
    for image in (paths[1], str(paths[1]), pictures[1], raw[1], ready[1]):
        torch.testing.assert_close(found.encode_image(image), expected[1:2])
    assert found.encode_image([]).shape == (0, found.width)
    assert found.encode_text([]).shape == (0, found.width)
    assert found.encode_text("red").shape == (1, found.width)


def test_transparent_pictures_are_on_white(folder, found, tmp_path):
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    white = found.encode_image(Image.new("RGB", (20, 20), "white"))
    torch.testing.assert_close(found.encode_image(clear), white)
    torch.testing.assert_close(found.encode_image(tmp_path / "clear.png"), white)


def test_bad_images_are_named(folder, found, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"images: expected an image, got .*bad.jpg: not an image"):
        found.encode_image(tmp_path / "bad.jpg")
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        found.encode_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"images: expected tensors .* got one of \[1, 8, 8\]"):
        found.encode_image(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="images: expected paths, PIL images or tensors, got int"):
        found.encode_image([3])


@pytest.mark.slow
def test_a_run_its_checkpoint_and_its_exports_are_the_same_encoder(folder, found, tmp_path):
    summary = json.loads((folder / "export" / "export.json").read_text())
    only = tmp_path / "only"
    only.mkdir()
    (only / "export.json").write_text(json.dumps(summary))
    (only / "open_clip_model.safetensors").write_bytes((folder / "export" / "open_clip_model.safetensors").read_bytes())
    sources = (folder / "run" / "last.pt", str(folder / "export"), only)
    encoders = [*map(simplclip.load, sources), simplclip.load("siclip-tiny", folder / "run")]
    encoders.append(simplclip.load("siclip-tiny", folder / "export"))
    for other in encoders:
        assert other.fingerprint() == found.fingerprint()
        assert (other.name, other.step) == (found.name, found.step)
        torch.testing.assert_close(other.encode_image(folder / "0.png"), found.encode_image(folder / "0.png"))
    with pytest.raises(CheckpointError, match="expected a checkpoint of 'siclip2-s0', got one of 'siclip-tiny'"):
        simplclip.load("siclip2-s0", folder / "run")
    (only / "export.json").write_text(json.dumps(summary | {"files": {"image.onnx": {}}}))
    with pytest.raises(CheckpointError, match="expected an export with weights .--format open_clip., got image.onnx"):
        simplclip.load(only)
    (only / "export.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected a file of simplclip export"):
        simplclip.load(only)


def test_a_file_of_an_open_clip_model(folder, monkeypatch):
    expected = simplclip.load("open_clip:tiny", folder / "tiny.bin")
    theirs = open_clip.create_model("tiny", pretrained=str(folder / "tiny.bin")).eval()
    with torch.no_grad():
        y = theirs.encode_text(open_clip.get_tokenizer("tiny")(["a cat"]), normalize=True)
    torch.testing.assert_close(expected.encode_text("a cat"), y)
    monkeypatch.chdir(folder)
    for source in (f"open_clip:tiny/{folder / 'tiny.bin'}", "open_clip:tiny/tiny.bin", "open_clip:tiny/./tiny.bin"):
        found = simplclip.load(source)
        assert found.fingerprint() == expected.fingerprint()
        assert (found.name, found.source) == ("open_clip:tiny", source)
    with pytest.raises(FileNotFoundError, match="no such file: gone.pt"):
        simplclip.load("open_clip:tiny/gone.pt")
    with pytest.raises(ValueError, match="source: expected a tag of tiny, one of none, or a file, got 'gone'"):
        simplclip.load("open_clip:tiny/gone")
    with pytest.raises(CheckpointError, match="expected a checkpoint of open_clip's tiny-wide"):
        simplclip.load("open_clip:tiny-wide/tiny.bin")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("builtin", ValueError, "checkpoint: expected a file of heads"),
        ("siclip-tiny", ValueError, "checkpoint: expected a file with the weights of 'siclip-tiny', got none$"),
        (
            "mobileclip-s0",
            ValueError,
            "got none; Apple publishes mobileclip_s0.pt at https://docs-assets.developer.apple.com/",
        ),
        ("mobileclip-s0/mobileclip_s0.pt", FileNotFoundError, "no such file: mobileclip_s0.pt; Apple publishes .* at https:"),
        ("nobody", ValueError, "source: expected a checkpoint, the folder of a run .* got 'nobody'"),
        ("runs/gone", FileNotFoundError, "checkpoint: no such file: runs/gone"),
        ("gone.pt", FileNotFoundError, "checkpoint: no such file: gone.pt"),
    ],
)
def test_sources_that_name_nothing(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        simplclip.load(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no such file: empty"):
        simplclip.load("empty")
