"""Teachers by name, their features in shards, and the built-in teacher's heads."""

import os

import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from pairs import call, digests, one_line, png, write
from safetensors.torch import save_file
from trainer_runs import write_models

from simplclip import data, models, teacher
from simplclip.data import shards
from simplclip.data.shards import Skipped, read_shard, teacher_stamp
from simplclip.demo import builtin, emoji
from simplclip.demo import teacher as networks


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


def rows_of(path, sidecars):
    for sample in read_shard(str(path), Skipped(), sidecars=[sidecars]):
        opened = shards.parse(sample, teacher=True)
        yield opened.image, opened.captions, opened.features


def test_features_are_those_of_the_model(folder, tmp_path):
    out = tmp_path / "out"
    source = str(folder / "in" / "*.tar")
    options = ("--teacher", "open_clip:tiny", "--checkpoint", folder / "tiny.pt", "--batch-size", 5, "--precision", "fp32")
    result = call("teacher", source, "--out", out, *options, "--evaluate", f"some={folder / 'in' / 'train-0.tar'}")
    assert result.exit_code == 0, result.output
    assert "48 samples with features of open_clip:tiny, width 16" in result.output
    assert "some: image to text R@1" in result.output
    model = open_clip.create_model("tiny", pretrained=str(folder / "tiny.pt")).eval()
    transform = open_clip.image_transform(16, is_train=False)
    tokenizer = open_clip.get_tokenizer("tiny")
    for image, captions, rows in rows_of(folder / "in" / "train-1.tar", out):
        with torch.no_grad():
            x = model.encode_image(transform(image)[None], normalize=True)
            y = model.encode_text(tokenizer(captions), normalize=True)
        assert rows.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(rows).float(), torch.cat([x, y]), atol=1e-3, rtol=0)
    stamp = teacher_stamp(data.expand(source), [out])
    assert (stamp["name"], stamp["width"]) == ("open_clip:tiny", 16)
    assert stamp["logit_scale"] == pytest.approx(1 / 0.07)
    assert len(list(rows_of(folder / "in" / "train-0.tar", out))) == 24


def test_captions_are_encoded_once_and_put_back_in_order(folder):
    found = teacher.load("open_clip:tiny", folder / "tiny.pt")
    calls = []
    tokenizer = found.tokenizer
    found.tokenizer = lambda texts: calls.append(texts) or tokenizer(texts)
    texts = ["a long red bar", "red", "blue ring", "red", "a long red bar", "red bar"]
    features = found.encode_text(texts, 3)
    assert calls == [["red", "red bar", "blue ring"], ["a long red bar"]]
    torch.testing.assert_close(features, torch.cat([found.encode_text(text) for text in texts]))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


def test_equal_teachers_have_equal_fingerprints(folder, tmp_path):
    class Named:  # like many transforms, its repr has an address that differs between processes
        pass

    first, again, changed = (teacher.load("open_clip:tiny", folder / "tiny.pt") for _ in range(3))
    assert first.fingerprint() == again.fingerprint()
    changed.preprocess = models.transforms("siclip-tiny", train=False)
    assert changed.fingerprint() != first.fingerprint()
    state = torch.load(folder / "tiny.pt", weights_only=True)
    state["logit_scale"] += 1e-3
    torch.save(state, tmp_path / "changed.pt")
    assert teacher.load("open_clip:tiny", tmp_path / "changed.pt").fingerprint() != first.fingerprint()
    first.preprocess, again.preprocess = Named(), Named()
    assert repr(first.preprocess) != repr(again.preprocess)
    assert first.fingerprint() == again.fingerprint()


def test_a_tag_beside_a_checkpoint_gives_its_preprocessing(folder, tmp_path, monkeypatch):
    def transform(name):
        return repr(teacher.load(name, folder / "tiny.pt").preprocess)

    plain = transform("open_clip:tiny")
    known = {"tiny": {"ours": {"url": "https://nowhere", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", known)
    assert "mean=(0.0, 0.0, 0.0)" in transform("open_clip:tiny/ours") != plain
    assert transform("open_clip:tiny") == transform("open_clip:tiny/ours")  # it has only this tag
    known["tiny"]["another"] = {"url": ""}
    assert transform("open_clip:tiny").split("mean")[1:] == plain.split("mean")[1:]


def test_another_teacher_takes_the_place_of_the_first(folder, tmp_path):
    source, weights = str(folder / "in" / "train-0.tar"), folder / "tiny.pt"
    first = teacher.load("open_clip:tiny", weights)
    teacher.write(source, tmp_path / "one", first, progress=False)
    second = teacher.load("open_clip:tiny", weights, precision="bf16")
    teacher.write(source, tmp_path / "two", second, progress=False)
    folders = [tmp_path / "one", tmp_path / "two"]
    for sidecars, precision in ((folders, "bf16"), (folders[::-1], "fp32")):
        assert teacher_stamp([source], sidecars)["precision"] == precision
        (joined, *_), (last, *_) = (shards.read_shard(source, Skipped(), sidecars=some) for some in (sidecars, sidecars[1:]))
        assert shards.contents(joined) == shards.contents(last)
    with pytest.raises(ValueError, match="teacher.precision was 'fp32', now 'bf16'"):
        teacher.write(source, tmp_path / "one", second, progress=False)


@pytest.fixture(scope="module")
def odd(folder):
    """Writes files with other contents than their names say."""
    (folder / "garbage.pt").write_bytes(b"not weights")
    torch.save({"state_dict": os.system}, folder / "code.pt")
    state = torch.load(folder / "tiny.pt", weights_only=True)
    state["text_projection"].fill_(float("nan"))
    torch.save(state, folder / "nan.pt")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    mark = {"format": networks.FORMAT, "version": networks.VERSION}
    save_file({"a": torch.zeros(1)}, folder / "small.safetensors", mark)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--teacher nobody", "the folder of a run or an export, or builtin, mobileclip-s0"),
        ("--teacher open_clip:tiny", "checkpoint: expected a file of weights for open_clip:tiny, got none"),
        ("--teacher open_clip:ViT-B-33", "nearest"),
        ("--teacher open_clip:ViT-B-32/nowhere", "expected a tag of ViT-B-32, one of openai"),
        ("--teacher siclip-tiny", "checkpoint: expected a file with the weights of 'siclip-tiny'"),
        ("--teacher open_clip:tiny --checkpoint none.pt", "checkpoint: no such file: "),
        ("--teacher open_clip:tiny-wide --checkpoint tiny.pt", "a checkpoint of open_clip's tiny-wide, got"),
        ("--teacher open_clip:tiny --checkpoint garbage.pt", "a checkpoint of open_clip's tiny, got"),
        ("--teacher open_clip:tiny --checkpoint code.pt", "a checkpoint of open_clip's tiny, got"),
        ("--teacher siclip-tiny --checkpoint tiny.pt", "checkpoint: expected weights that fit the model, got tiny.pt"),
        ("--teacher open_clip:tiny --checkpoint nan.pt", "open_clip:tiny: expected finite features, got text features"),
        ("--checkpoint tiny.pt", "expected heads instead for the built-in teacher"),
        ("--heads garbage.pt", "expected heads of the built-in teacher, got"),
        ("--heads other.safetensors", "simplclip-heads 1, got None None"),
        ("--heads small.safetensors", "expected heads that fit; remove the file"),
        ("--teacher open_clip:tiny --heads garbage.pt", "'open_clip:tiny' has no heads"),
        ("--evaluate none.tar", "does not exist"),
        ("--teacher open_clip:tiny --checkpoint tiny.pt --device tpu9", "device: expected"),
        ("--precision int8", "precision: expected fp32, bf16, fp16 or auto, got 'int8'"),
    ],
)
def test_wrong_arguments_end_in_one_line(folder, odd, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert message in one_line("teacher", "in/train-0.tar", "--out", tmp_path / "out", *arguments.split())
    assert not (tmp_path / "out").exists()


TRAIN = {"device": torch.device("cpu"), "precision": "fp32", "progress": False}


def separable(number=64):
    """Returns pairs whose features tell which belong together; two captions each, two samples of each group."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(number) // 2
    codes = torch.randn(number // 2, 24, generator=generator)
    images = codes[groups] @ torch.randn(24, networks.IMAGE_FEATURES, generator=generator)
    texts = codes @ torch.randn(24, networks.TEXT_FEATURES, generator=generator)
    texts = torch.cat([texts, texts + 0.1 * torch.randn(texts.shape, generator=generator)])
    captions = [[g, g + number // 2] for g in groups.tolist()]
    return builtin.Pairs(images[None], texts, captions, groups)


@pytest.mark.slow
def test_heads_learn_align_and_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "STEPS", 25)
    monkeypatch.setattr(builtin, "BATCH", 48)
    monkeypatch.setattr(builtin, "features", lambda *_: separable())
    state = torch.get_rng_state()
    first, count = builtin.train([], **TRAIN)
    assert count == 64
    assert torch.equal(state, torch.get_rng_state())
    pairs = separable()
    with torch.no_grad():
        x, y = F.normalize(first.image(pairs.images[0]), dim=-1), F.normalize(first.text(pairs.texts[:32]), dim=-1)
    assert ((x @ y.T).argmax(1) == pairs.groups).float().mean() > 0.95
    assert first.logit_scale.exp() <= builtin.MAX_SCALE + 1e-3
    again, _ = builtin.train([], **TRAIN)
    other, _ = builtin.train([], seed=1, **TRAIN)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.image.linear.weight, other.image.linear.weight)
    networks.save_heads(first, tmp_path / "heads.safetensors")
    loaded = networks.load_heads(tmp_path / "heads.safetensors").state_dict()
    assert all(torch.equal(a, loaded[name]) for name, a in first.state_dict().items())


def test_pairs_of_a_group_are_no_negatives(monkeypatch):
    """The loss gets the groups as ids, so that pairs of a group do not repel each other."""
    seen = []
    loss = builtin.ClipPMLoss.forward
    monkeypatch.setattr(builtin.ClipPMLoss, "forward", lambda s, *a, **k: seen.append(k["ids"]) or loss(s, *a, **k))
    monkeypatch.setattr(builtin, "STEPS", 1)
    monkeypatch.setattr(builtin, "features", lambda *_: separable(8))
    builtin.train([], **TRAIN)
    assert sorted(seen[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_heads_need_pairs_to_tell_apart(tmp_path):
    one = write(tmp_path / "a.tar", [("a", {"png": png(), "txt": b"one"}), ("b", {"png": b"broken", "txt": b"two"})])
    with pytest.raises(data.EmptyEpochError, match="have only one group; 1 skipped: 1 not an image"):
        builtin.train([one], **TRAIN)


def test_padding_and_company_do_not_change_features():
    model = networks.BuiltinTeacher(networks.Heads()).eval()
    encode = networks.tokenizer()
    with torch.no_grad():
        together = model.text_features(encode(["cat", "a drawing of a rather long and winding caption of a cat"]))
        alone = model.text_features(encode(["cat"]))
        x = torch.randn(3, 3, networks.IMAGE_SIZE, networks.IMAGE_SIZE)
        images = model.image_features(x)
        torch.testing.assert_close(images[:1], model.image_features(x[:1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    assert images.shape == (3, networks.IMAGE_FEATURES)
    last = model.net.forward_head(model.net.forward_features(x), pre_logits=True).detach()
    torch.testing.assert_close(images[:, -1280:], last, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_builtin_teacher_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "STEPS", 20)
    monkeypatch.setattr(builtin, "BATCH", 32)
    every = emoji.concepts()
    monkeypatch.setattr(emoji, "concepts", lambda: every[::40])
    monkeypatch.setattr(emoji, "HELD_OUT", 4)
    emoji.build(tmp_path / "emoji")
    source = tmp_path / "in"
    source.mkdir()
    every = (
        s
        for path in sorted((tmp_path / "emoji").glob("train-*.tar"))
        for s in map(shards.contents, read_shard(str(path), Skipped()))
    )
    few = [(sample["__key__"], {suffix: sample[suffix] for suffix in ("json", "png")}) for sample in every]
    write(source / "train-0.tar", few[:48])
    write(source / "held-0.tar", few[48:64])
    result = call("teacher", source / "*.tar", "--out", tmp_path / "out", "--evaluate", source / "train-0.tar")
    assert result.exit_code == 0, result.output
    assert "heads on 48 pairs of 1 shards" in result.output  # never on held-out pairs
    assert (tmp_path / "out.heads.safetensors").exists()
    found = rows_of(source / "train-0.tar", tmp_path / "out")
    right = [(rows[1:].astype(np.float32) @ rows[0]).mean() for _, _, rows in found]
    assert np.mean(right) > 0.2
    before = digests(tmp_path / "out")
    result = call("teacher", source / "*.tar", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "uses the heads of" in result.output
    assert "2 of 2 shards" in result.output
    assert digests(tmp_path / "out") == before
