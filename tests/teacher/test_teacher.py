"""Teachers by name, their features in shards, and the built-in teacher's heads."""

import functools
import io
import json
import os
import tarfile
from pathlib import Path

import kills
import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from kills import digests
from safetensors.torch import save_file
from trainer_runs import register_models
from typer.testing import CliRunner

from simplclip import cli, data, models, teacher
from simplclip.data import shards
from simplclip.data.shards import Skipped, read_shard, teacher_stamp
from simplclip.demo import emoji, heads
from simplclip.demo import teacher as builtin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, and the weights of an open_clip model."""
    folder = tmp_path_factory.mktemp("teacher")
    register_models(folder)
    for number in range(2):
        tiny.write_shard(folder / "in" / f"train-{number}.tar")
    torch.manual_seed(3)
    torch.save(open_clip.create_model("tiny").state_dict(), folder / "tiny.pt")
    return folder


def call(*arguments):
    return CliRunner().invoke(cli.app, ["teacher", *map(str, arguments)])


def rows_of(path):
    for sample in read_shard(str(path), Skipped()):
        opened = shards.open_sample(sample, teacher=True)
        yield opened.image, opened.captions, opened.features


def test_features_are_those_of_the_model(folder, tmp_path):
    out = tmp_path / "out"
    source = str(folder / "in" / "*.tar")
    options = ("--teacher", "open_clip:tiny", "--checkpoint", folder / "tiny.pt", "--batch-size", 5, "--precision", "fp32")
    result = call(source, "--out", out, *options, "--evaluate", f"some={folder / 'in' / 'train-0.tar'}")
    assert result.exit_code == 0, result.output
    assert "48 samples with features of open_clip:tiny, width 16" in result.output
    assert "some: image to text R@1" in result.output
    model = open_clip.create_model("tiny", pretrained=str(folder / "tiny.pt")).eval()
    transform = open_clip.image_transform(16, is_train=False)
    tokenizer = open_clip.get_tokenizer("tiny")
    for image, captions, rows in rows_of(out / "train-1.tar"):
        with torch.no_grad():
            x = model.encode_image(transform(image)[None], normalize=True)
            y = model.encode_text(tokenizer(captions), normalize=True)
        assert rows.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(rows).float(), torch.cat([x, y]), atol=1e-3, rtol=0)
    stamp = teacher_stamp(data.expand(str(out / "*.tar")))
    assert stamp["name"] == "open_clip:tiny"
    assert stamp["width"] == 16
    assert stamp["logit_scale"] == pytest.approx(1 / 0.07)
    assert len(list(rows_of(out / "train-0.tar"))) == 24


def test_captions_are_encoded_once_and_put_back_in_order(folder):
    found = teacher.load("open_clip:tiny", folder / "tiny.pt")
    calls = []
    encode = found.encode_text
    found.encode_text = lambda texts: calls.append(texts) or encode(texts)
    texts = ["a long red bar", "red", "blue ring", "red", "a long red bar", "red bar"]
    features = teacher.features._encode_texts(found, texts, 3)
    assert calls == [["red", "red bar", "blue ring"], ["a long red bar"]]
    torch.testing.assert_close(features, encode(texts))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


def test_teachers_of_this_library(tmp_path):
    from simplclip import train as trainer

    config = tiny.settings(tmp_path, "run.steps=1")
    trainer.run(config)
    found = teacher.load("siclip-tiny", tmp_path / "run")
    assert found.width == 256
    sample = shards.open_sample(next(read_shard(str(tmp_path / "data" / "train-0.tar"), Skipped())))
    torch.testing.assert_close(found.encode_image([sample.image]).norm(dim=1), torch.ones(1))
    assert found.encode_text(sample.captions).shape == (2, 256)
    with pytest.raises(ValueError, match="expected a checkpoint of 'siclip-s0', got one of 'siclip-tiny'"):
        teacher.load("siclip-s0", tmp_path / "run")


def test_equal_teachers_have_equal_fingerprints(folder, tmp_path):
    class Named:  # as many transforms are, known by an address that is another in each process
        pass

    first, again = (teacher.load("open_clip:tiny", folder / "tiny.pt") for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    first.transform, again.transform = Named(), Named()
    assert repr(first.transform) != repr(again.transform)
    assert first.fingerprint() == again.fingerprint()
    first = teacher.load("open_clip:tiny", folder / "tiny.pt").fingerprint()
    state = torch.load(folder / "tiny.pt", weights_only=True)
    state["logit_scale"] += 1e-3
    torch.save(state, tmp_path / "changed.pt")
    assert teacher.load("open_clip:tiny", tmp_path / "changed.pt").fingerprint() != first
    changed = teacher.load("open_clip:tiny", folder / "tiny.pt")
    changed.transform = models.transforms("siclip-tiny", train=False)
    assert changed.fingerprint() != first


def test_a_tag_beside_a_checkpoint_gives_its_preprocessing(folder, tmp_path, monkeypatch):
    def transform(name):
        return repr(teacher.load(name, folder / "tiny.pt").transform)

    plain = transform("open_clip:tiny")
    known = {"tiny": {"ours": {"url": "https://nowhere", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}}}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", known)
    assert "mean=(0.0, 0.0, 0.0)" in transform("open_clip:tiny/ours") != plain
    assert transform("open_clip:tiny") == transform("open_clip:tiny/ours")  # its only tag
    known["tiny"]["another"] = {"url": ""}
    assert transform("open_clip:tiny").split("mean")[1:] == plain.split("mean")[1:]


def test_another_teacher_takes_the_place_of_the_first(folder, tmp_path):
    source, weights = str(folder / "in" / "train-0.tar"), folder / "tiny.pt"
    first = teacher.load("open_clip:tiny", weights)
    teacher.write(source, tmp_path / "one", first, progress=False)
    second = teacher.load("open_clip:tiny", weights, precision="bf16")
    summary = teacher.write(str(tmp_path / "one" / "*.tar"), tmp_path / "two", second, progress=False)
    assert summary["notes"] == ["24 samples already had teacher.npy; it is made again."]
    assert teacher_stamp([str(tmp_path / "two" / "train-0.tar")])["precision"] == "bf16"
    with pytest.raises(ValueError, match="teacher.precision was 'fp32', now 'bf16'"):
        teacher.write(source, tmp_path / "one", second, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "nobody"], "teacher: expected one of builtin, siclip-s0"),
        (["--teacher", "open_clip:tiny"], "checkpoint: expected a file of weights for open_clip:tiny, got none"),
        (["--teacher", "open_clip:ViT-B-33"], "nearest"),
        (["--teacher", "open_clip:ViT-B-32/nowhere"], "expected a tag of ViT-B-32, one of openai"),
        (["--teacher", "siclip-tiny"], "checkpoint: expected a file for the teacher 'siclip-tiny'"),
        (["--teacher", "open_clip:tiny", "--checkpoint", "none.pt"], "checkpoint: no such file: "),
        (["--teacher", "open_clip:tiny-wide", "--checkpoint", "tiny.pt"], "a checkpoint of open_clip's tiny-wide, got"),
        (["--teacher", "open_clip:tiny", "--checkpoint", "garbage.pt"], "a checkpoint of open_clip's tiny, got"),
        (["--teacher", "open_clip:tiny", "--checkpoint", "code.pt"], "a checkpoint of open_clip's tiny, got"),
        (["--teacher", "siclip-tiny", "--checkpoint", "tiny.pt"], "expected a simplclip checkpoint, got"),
        (["--teacher", "open_clip:tiny", "--checkpoint", "nan.pt"], "expected finite features, got others"),
        (["--checkpoint", "tiny.pt"], "expected heads instead for the built-in teacher"),
        (["--heads", "garbage.pt"], "expected heads of the built-in teacher, got"),
        (["--heads", "other.safetensors"], "simplclip-heads 1, got None None"),
        (["--heads", "small.safetensors"], "expected heads that fit; remove the file"),
        (["--teacher", "open_clip:tiny", "--heads", "garbage.pt"], "'open_clip:tiny' has no heads"),
        (["--evaluate", "none.tar"], "does not exist"),
        (["--teacher", "open_clip:tiny", "--checkpoint", "tiny.pt", "--device", "tpu9"], "device: expected"),
        (["--precision", "int8"], "precision: expected fp32, bf16, fp16 or auto, got 'int8'"),
    ],
)
def test_wrong_arguments_end_in_one_line(folder, tmp_path, arguments, message):
    files = {"tiny.pt": (folder / "tiny.pt").read_bytes(), "garbage.pt": b"not weights"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": os.system}, tmp_path / "code.pt")
    state = torch.load(tmp_path / "tiny.pt", weights_only=True)
    state["text_projection"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    mark = {"format": builtin.FORMAT, "version": builtin.VERSION}
    save_file({"a": torch.zeros(1)}, tmp_path / "small.safetensors", mark)
    arguments = [tmp_path / a if a.endswith((".pt", ".safetensors", ".tar")) else a for a in arguments]
    result = call(folder / "in" / "train-0.tar", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    lines = [line for line in result.output.splitlines() if line.strip()]
    assert message in result.output
    assert len(lines) == 1, result.output
    assert not (tmp_path / "out").exists()


def separable(number=64):
    """Pairs whose features say which belong together; two captions each, two samples of each group."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(number) // 2
    codes = torch.randn(number // 2, 24, generator=generator)
    images = codes[groups] @ torch.randn(24, builtin.IMAGE_FEATURES, generator=generator)
    texts = codes @ torch.randn(24, builtin.TEXT_FEATURES, generator=generator)
    texts = torch.cat([texts, texts + 0.1 * torch.randn(texts.shape, generator=generator)])
    captions = [[g, g + number // 2] for g in groups.tolist()]
    return heads.Pairs(images[None], texts, captions, groups, Skipped())


def test_heads_learn_align_and_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 25)
    monkeypatch.setattr(heads, "BATCH", 48)
    monkeypatch.setattr(heads, "features", lambda *_: separable())
    source = tiny.write_shard(tmp_path / "a.tar")
    state = torch.get_rng_state()
    first, count = heads.train(source, progress=False)
    assert count == 64
    assert torch.equal(state, torch.get_rng_state())
    pairs = separable()
    with torch.no_grad():
        x, y = F.normalize(first.image(pairs.images[0]), dim=-1), F.normalize(first.text(pairs.texts[:32]), dim=-1)
    assert ((x @ y.T).argmax(1) == pairs.groups).float().mean() > 0.95
    assert first.logit_scale.exp() <= heads.MAX_SCALE + 1e-3
    again, _ = heads.train(source, progress=False)
    other, _ = heads.train(source, seed=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.image.linear.weight, other.image.linear.weight)
    builtin.save_heads(first, tmp_path / "heads.safetensors")
    loaded = builtin.load_heads(tmp_path / "heads.safetensors").state_dict()
    assert all(torch.equal(a, loaded[name]) for name, a in first.state_dict().items())


def test_pairs_of_a_group_are_no_negatives(monkeypatch, folder):
    """All in one group but one: without the ids the heads would be pushed apart."""
    seen = []
    loss = heads.ClipPMLoss.forward
    monkeypatch.setattr(heads.ClipPMLoss, "forward", lambda s, *a, **k: seen.append(k["ids"]) or loss(s, *a, **k))
    monkeypatch.setattr(heads, "STEPS", 1)
    monkeypatch.setattr(heads, "features", lambda *_: separable(8))
    heads.train(str(folder / "in" / "train-0.tar"), progress=False)
    assert sorted(seen[0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_heads_need_pairs_to_tell_apart(tmp_path):
    from pairs import png, write

    one = write(tmp_path / "a.tar", [("a", {"png": png(), "txt": b"one"}), ("b", {"png": b"broken", "txt": b"two"})])
    with pytest.raises(data.EmptyEpochError, match="have only one group; 1 skipped: 1 not an image"):
        heads.train(one, progress=False)


def test_padding_and_company_do_not_change_features():
    model = builtin.BuiltinTeacher(builtin.Heads()).eval()
    encode = builtin.tokenizer()
    with torch.no_grad():
        together = model.text_features(encode(["cat", "a drawing of a rather long and winding caption of a cat"]))
        alone = model.text_features(encode(["cat"]))
        x = torch.randn(3, 3, builtin.IMAGE_SIZE, builtin.IMAGE_SIZE)
        images = model.image_features(x)
        torch.testing.assert_close(images[:1], model.image_features(x[:1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    assert images.shape == (3, builtin.IMAGE_FEATURES)
    last = model.net.forward_head(model.net.forward_features(x), pre_logits=True).detach()
    torch.testing.assert_close(images[:, -1280:], last, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_builtin_teacher_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "STEPS", 20)
    monkeypatch.setattr(heads, "BATCH", 32)
    every = emoji.concepts()
    monkeypatch.setattr(emoji, "concepts", lambda: every[::40])
    monkeypatch.setattr(emoji, "HELD_OUT", 4)
    emoji.build(tmp_path / "emoji")
    source = tmp_path / "in"
    source.mkdir()
    few = [sample for path in sorted((tmp_path / "emoji").glob("train-*.tar")) for sample in read_shard(str(path), Skipped())]
    for split, part in (("train", few[:48]), ("held", few[48:64])):
        with tarfile.open(source / f"{split}-0.tar", "w") as tar:
            for sample in part:
                for suffix in ("json", "png"):
                    member = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
                    member.size = len(sample[suffix])
                    tar.addfile(member, io.BytesIO(sample[suffix]))
    result = call(source / "*.tar", "--out", tmp_path / "out", "--evaluate", source / "train-0.tar")
    assert result.exit_code == 0, result.output
    assert "heads on 48 pairs of 1 shards" in result.output  # never on what is held out
    assert (tmp_path / "out.heads.safetensors").exists()
    right = [(rows[1:].astype(np.float32) @ rows[0]).mean() for _, _, rows in rows_of(tmp_path / "out" / "train-0.tar")]
    assert np.mean(right) > 0.2
    before = digests(tmp_path / "out")
    result = call(source / "*.tar", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "uses the heads of" in result.output
    assert "2 of 2 shards" in result.output
    assert digests(tmp_path / "out") == before


def command(folder, out, ready):
    """The command in a process of its own."""
    torch.set_num_threads(1)
    register_models(Path(folder))
    ready.set()
    options = ["--teacher", "open_clip:tiny", "--checkpoint", str(folder / "tiny.pt"), "--batch-size", "2"]
    cli.app(["teacher", str(folder / "in" / "*.tar"), "--out", str(out), *options], standalone_mode=False)


@pytest.mark.slow
def test_killed_at_any_moment(folder, tmp_path):
    """kill -9 of the command at random moments, then the same command: byte for byte as undisturbed."""

    def check_whole(out):
        assert all(len(list(rows_of(path))) == 24 for path in out.glob("*.tar"))

    preload = ["simplclip.teacher.command", "test_teacher"]
    kills.check(preload, functools.partial(command, folder), tmp_path, check_whole)
    assert json.loads((tmp_path / "whole" / "meta.json").read_text())["splits"]["train"]["samples"] == 48
