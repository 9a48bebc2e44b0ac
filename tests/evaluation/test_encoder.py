"""`simplclip.load`: every kind of source, every kind of input."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import simplclip
from simplclip import export, models
from simplclip.models.trained import CheckpointError, load_model
from support.models.open_clip_models import write_models
from support.train import tiny


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Makes an export of the run, weights of an open_clip model, and pictures."""
    folder = tmp_path_factory.mktemp("encoder")
    write_models(folder)
    export.run(trained, folder / "export")
    for number, colour in enumerate(("red", "green", "blue")):
        (folder / f"{number}.png").write_bytes(tiny.picture(tiny.COLOURS[colour], "ring", size=40))
    return folder


@pytest.fixture(scope="module")
def encoder(trained):
    return simplclip.load(trained, device="cpu")


@pytest.mark.slow
def test_features_are_those_of_the_model(trained, folder, encoder):
    model, state = load_model(trained)
    transform = models.transforms("siclip-tiny", train=False, image_size=tiny.IMAGE_SIZE)
    tokenizer = models.tokenizer("siclip-tiny")
    pictures = [Image.open(folder / f"{i}.png").convert("RGB") for i in range(3)]
    with torch.no_grad():
        x = model.encode_image(
            torch.stack([transform(picture) for picture in pictures]), normalize=True
        )
        y = model.encode_text(tokenizer(["red", "a blue ring"]), normalize=True)
    torch.testing.assert_close(encoder.encode_image(pictures), x)
    torch.testing.assert_close(encoder.encode_text(["red", "a blue ring"]), y)
    assert (encoder.name, encoder.width) == ("siclip-tiny", x.shape[1])
    assert (encoder.step, encoder.config) == (state["step"], state["config"])
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert encoder.stamp()["weights"] == encoder.fingerprint()
    assert repr(encoder) == f"siclip-tiny from {trained}: features of 256 numbers, in fp32 on cpu"


@pytest.mark.slow
def test_images_may_be_paths_pictures_and_tensors_one_or_many(folder, encoder):
    paths = [folder / f"{i}.png" for i in range(3)]
    expected = encoder.encode_image(paths)
    assert expected.shape == (3, encoder.width)
    assert expected.dtype == torch.float32
    pictures = [Image.open(path) for path in paths]
    raw = torch.stack([pil_to_tensor(picture) for picture in pictures])
    ready = torch.stack([encoder.preprocess(picture.convert("RGB")) for picture in pictures])
    mixed = [paths[0], pictures[1], ready[2]]
    for images in (tuple(map(str, paths)), pictures, raw, ready, ready.double(), mixed):
        torch.testing.assert_close(encoder.encode_image(images), expected)
        torch.testing.assert_close(encoder.encode_image(images, batch_size=2), expected)
    for image in (paths[1], str(paths[1]), pictures[1], raw[1], ready[1]):
        torch.testing.assert_close(encoder.encode_image(image), expected[1:2])
    assert encoder.encode_image([]).shape == (0, encoder.width)
    assert encoder.encode_text([]).shape == (0, encoder.width)
    assert encoder.encode_text("red").shape == (1, encoder.width)


@pytest.mark.slow
def test_transparent_pictures_are_the_same_in_a_file_in_memory_and_in_open_clip(encoder, tmp_path):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8), "RGBA"
    )
    picture.save(tmp_path / "clear.png")
    ours = encoder.preprocess
    settings = {"resize_mode": ours.resize_mode, "interpolation": ours.interpolation.value}
    pixels = open_clip.image_transform(
        ours.size, is_train=False, mean=ours.mean, std=ours.std, **settings
    )(picture)
    for image in (picture, tmp_path / "clear.png"):
        torch.testing.assert_close(encoder.encode_image(image), encoder.encode_image(pixels))


@pytest.mark.slow
def test_bad_images_are_named(encoder, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"images: expected an image, got .*bad.jpg: not an image"):
        encoder.encode_image(tmp_path / "bad.jpg")
    with pytest.raises(FileNotFoundError, match="gone.jpg"):
        encoder.encode_image(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match=r"images: expected tensors .* got one of \[1, 8, 8\]"):
        encoder.encode_image(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match="not int"):
        encoder.encode_image([3])


@pytest.mark.slow
def test_a_run_its_checkpoint_and_its_export_are_the_same_encoder(
    trained, folder, encoder, tmp_path
):
    expected = encoder.encode_image(folder / "0.png")
    for source in (trained / "last.pt", str(folder / "export")):
        other = simplclip.load(source)
        assert other.fingerprint() == encoder.fingerprint()
        assert (other.name, other.step) == (encoder.name, encoder.step)
        torch.testing.assert_close(other.encode_image(folder / "0.png"), expected)
    message = "checkpoint: expected weights that fit the model, got .*: Missing key"
    with pytest.raises(CheckpointError, match=message):
        simplclip.load("siclip2-s0", trained)
    (tmp_path / "export.json").write_text("{}")
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(CheckpointError, match="expected a file of simplclip export"):
        simplclip.load(tmp_path)


@pytest.mark.slow
def test_a_file_of_an_open_clip_model(folder, monkeypatch):
    expected = simplclip.load("open_clip:tiny", folder / "tiny.bin")
    model = open_clip.create_model("tiny", pretrained=str(folder / "tiny.bin")).eval()
    with torch.no_grad():
        y = model.encode_text(open_clip.get_tokenizer("tiny")(["a cat"]), normalize=True)
    torch.testing.assert_close(expected.encode_text("a cat"), y)
    monkeypatch.chdir(folder)
    for file in (folder / "tiny.bin", "tiny.bin", "./tiny.bin"):
        source = f"open_clip:tiny/{file}"
        encoder = simplclip.load(source)
        assert encoder.fingerprint() == expected.fingerprint()
        assert (encoder.name, encoder.source) == ("open_clip:tiny", source)
    message = "source: expected a file of weights for open_clip:tiny, or a tag .*it has none.*none$"
    with pytest.raises(FileNotFoundError, match=message):
        simplclip.load("open_clip:tiny")
    message = "checkpoint: expected weights that fit the model, got .*tiny.bin"
    with pytest.raises(CheckpointError, match=message):
        simplclip.load("open_clip:tiny-wide/tiny.bin")


@pytest.mark.parametrize(
    ("tags", "source"),
    [
        (["quick"], ("open_clip:tiny/tiny.bin",)),
        (["quick", "other"], ("open_clip:tiny/quick", "tiny.bin")),
        (["quick", "other"], ("open_clip:tiny/quick",)),
    ],
    ids=["only-tag", "tag-and-file", "download"],
)
def test_the_activation_is_that_of_the_tag(tmp_path, monkeypatch, tags, source):
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    tagged = {tag: {"url": "https://x", "quick_gelu": tag == "quick"} for tag in tags}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tagged)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: "tiny.bin")
    expected, plain = (
        open_clip.create_model("tiny", pretrained="tiny.bin", force_quick_gelu=quick).eval()
        for quick in (True, False)
    )
    tokens = open_clip.get_tokenizer("tiny")(["a cat"])
    encoder = simplclip.load(*source, device="cpu")
    with torch.no_grad():
        quick_features = expected.encode_text(tokens, normalize=True)
        assert not torch.equal(plain.encode_text(tokens, normalize=True), quick_features)
    torch.testing.assert_close(encoder.encode_text("a cat"), quick_features, rtol=0, atol=1e-6)
    # a configuration that says it itself keeps its activation
    config = open_clip.get_model_config("tiny") | {"quick_gelu": False}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    assert not isinstance(simplclip.load(*source).model.transformer.resblocks[0].mlp[1], QuickGELU)
