"""`simplclip teacher`: features of images and captions in sidecars, which fit their captions and
shards alone.
"""

import json

import numpy as np
import open_clip
import pytest
import torch

import simplclip
from simplclip import data, models, teacher
from simplclip.data import samples
from support.data.pairs import digests, joined, keys, loader, members, png, table
from support.models.open_clip_models import write_models
from support.programs import call, one_line
from support.train import tiny

TINY = "open_clip:tiny --checkpoint tiny.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes shards, and the weights of an open_clip model."""
    folder = tmp_path_factory.mktemp("teacher")
    write_models(folder)
    for number in range(2):
        tiny.write_shard(folder / "in" / f"train-{number}.tar")
    torch.manual_seed(3)
    torch.save(open_clip.create_model("tiny").state_dict(), folder / "tiny.pt")
    return folder


def load(folder, **options):
    return simplclip.load("open_clip:tiny", folder / "tiny.pt", device="cpu", **options)


def given(folder):
    return "--teacher", "open_clip:tiny", "--checkpoint", folder / "tiny.pt"


@pytest.mark.slow
def test_features_are_those_of_the_model(folder, tmp_path):
    source = str(folder / "in" / "*.tar")
    options = ("--batch-size", 5, "--precision", "fp32", "--workers", 2)
    result = call("teacher", source, "--out", tmp_path / "two", *given(folder), *options)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.output.split())
    assert "48 samples with features of open_clip:tiny, width 16" in printed
    teacher.write_features(source, tmp_path / "none", load(folder), batch_size=5, progress=False)
    # the same with and without workers
    assert digests(tmp_path / "two") == digests(tmp_path / "none")
    model = open_clip.create_model("tiny", pretrained=str(folder / "tiny.pt")).eval()
    transform = open_clip.image_transform(16, is_train=False)
    tokenizer = open_clip.get_tokenizer("tiny")
    pairs = joined(folder / "in" / "train-1.tar", tmp_path / "two", teacher=True)
    assert len(pairs) == 24
    for pair in pairs.values():
        with torch.no_grad():
            x = model.encode_image(transform(pair.image)[None], normalize=True)
            y = model.encode_text(tokenizer(pair.captions), normalize=True)
        assert pair.features.dtype == np.float16
        torch.testing.assert_close(
            torch.from_numpy(pair.features).float(), torch.cat([x, y]), atol=1e-3, rtol=0
        )
    files = members(tmp_path / "two" / "train-1.tar")
    about = json.loads(files[f"{pair.key}.teacher.json"])
    features = samples.digest_of_features(files[f"{pair.key}.teacher.npy"], None)
    # so that training notices other captions, images and features
    assert about == samples.digests_of(pair) | {"features": features}
    stamp = data.teacher_stamp([tmp_path / "two"])
    assert (stamp["name"], stamp["width"]) == ("open_clip:tiny", 16)
    assert stamp["logit_scale"] == pytest.approx(1 / 0.07)


def test_captions_are_encoded_once_long_ones_together(folder):
    encoder, parts = load(folder), []
    features = encoder.features
    encoder.features = lambda tower, inputs: parts.append(inputs) or features(tower, inputs)
    texts = ["a long red bar", "red", "blue ring", "red", "a long red bar", "red bar"]
    features_of_texts = teacher.features.encode_tokens(encoder, encoder.tokenizer(texts), 3)
    wanted = [["red", "blue ring", "red bar"], ["a long red bar"]]
    encoded = [sorted(encoder.tokenizer(part).tolist()) for part in wanted]
    assert [sorted(part.tolist()) for part in parts] == encoded
    one_by_one = torch.cat([encoder.encode_text(text) for text in texts])
    torch.testing.assert_close(features_of_texts, one_by_one)


def test_a_table_becomes_shards_beside_the_sidecars(folder, tmp_path, monkeypatch):
    """Their folder begins with ~, but names no user."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    path = table(tmp_path / "t.csv", [(f"{number}.png", f"number {number}") for number in range(3)])
    options = (*given(folder), "--device", "cpu", "--workers", 0)
    for words in (
        ("packed 3 samples of t.csv", "3 samples with features"),
        ("kept 3 samples of t.csv", "1 of 1 sidecars"),
    ):
        result = call("teacher", path, "--out", "~out", *options)
        assert result.exit_code == 0, result.output
        assert all(word in result.output for word in words)
    shards = str(tmp_path / "~out/shards/t/*.tar")
    batch = next(iter(loader(shards, sidecars=["~out"], teacher=True, batch_size=3)))
    assert sorted(keys([batch])) == ["000000000", "000000001", "000000002"]


def test_equal_teachers_have_equal_fingerprints(folder, tmp_path):
    class Named:  # like many transforms, its repr has an address that differs between processes
        pass

    first, again, changed = (load(folder) for _ in range(3))
    assert first.fingerprint() == again.fingerprint()
    changed.preprocess = models.transforms("siclip-tiny", train=False)
    assert changed.fingerprint() != first.fingerprint()
    state = torch.load(folder / "tiny.pt", weights_only=True)
    state["logit_scale"] += 1e-3
    torch.save(state, tmp_path / "changed.pt")
    changed = simplclip.load("open_clip:tiny", tmp_path / "changed.pt")
    assert changed.fingerprint() != first.fingerprint()
    first.preprocess, again.preprocess = Named(), Named()
    assert repr(first.preprocess) != repr(again.preprocess)
    assert first.fingerprint() == again.fingerprint()


def test_a_tag_beside_a_checkpoint_gives_its_preprocessing(folder, monkeypatch):
    def transform(name):
        return repr(simplclip.load(name, folder / "tiny.pt").preprocess)

    plain = transform("open_clip:tiny")
    ours = {"url": "https://nowhere", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    known = {"tiny": {"ours": ours}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", known)
    assert "mean=(0.0, 0.0, 0.0)" in transform("open_clip:tiny/ours") != plain
    assert transform("open_clip:tiny") == transform("open_clip:tiny/ours")  # it has only this tag
    known["tiny"]["another"] = {"url": ""}
    assert transform("open_clip:tiny").split("mean")[1:] == plain.split("mean")[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("open_clip:tiny --checkpoint nan.pt", "open_clip:tiny: expected finite features, got "),
        (f"{TINY} --views 2", "views, config: expected both or none, got 2 views"),
        (f"{TINY} --config siclip-tiny", "views, config: expected both or none, got 0 views"),
    ],
)
def test_wrong_arguments_end_in_one_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    state = torch.load("tiny.pt", weights_only=True)
    state["text_projection"].fill_(torch.nan)
    torch.save(state, "nan.pt")
    command = ("teacher", "in/train-0.tar", "--out", tmp_path / "out", "--teacher")
    assert message in one_line(*command, *arguments.split())
    assert not (tmp_path / "out").exists()
