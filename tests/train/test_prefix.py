"""Training with a frozen prefix: folded, and cached by data.cache_prefix."""

import io
import json

import numpy as np
import pytest
import tiny
import torch
from nets import with_statistics
from runs import check_resumed, go, rows

from simplclip import data, models
from simplclip.data import decode, rewrite
from simplclip.data.transforms import augmentation
from simplclip.memory.measure import predict
from simplclip.memory.step import TrainerStep
from simplclip.teacher import Views
from simplclip.train.batches import loader
from simplclip.train.config import ConfigError
from simplclip.train.prefix_cache import PrefixCache
from simplclip.train.state import Training

BACKBONE = "visual.trunk.patch_embed.backbone"
VIEWS = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Writes two files of weights of siclip-lite0, named after their seeds."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = with_statistics(models.create("siclip-lite0", text_cfg={"layers": 1}), seed)
        torch.save(model.state_dict(), folder / f"{seed}.pt")
    return folder


def changes(weights, *others, seed=0):
    model = ["model.name=siclip-lite0", f"inherit.source={weights / f'{seed}.pt'}"]
    trained = ["inherit.train=[visual.trunk.patch_embed.proj]", "loss.feature_weight=1", "data.captions_per_image=2"]
    return [*model, *trained, *others]


def with_views(folder, name="taught", number=VIEWS) -> str:
    """Writes a teacher's features, 256 wide, of views of the images in FOLDER/data."""
    if not (folder / "data").exists():
        tiny.write_shard(folder / "data" / "train-0.tar")
        tiny.write_shard(folder / "data" / "train-1.tar")
    transform = models.transforms("siclip-lite0", train=True)

    def process(samples):
        made = []
        for sample in samples:
            views, file = Views(transform, number, 3).draw(sample), io.BytesIO()
            np.save(file, tiny.teacher_features(sample.captions, 256)[[*[0] * number, 1, 2]])
            made.append({"teacher.npy": file.getvalue(), "views.json": json.dumps(views).encode()})
        return made

    views = {"number": number, "augment": augmentation(transform), "seed": 3}
    stamp = {"teacher": {"name": "made up", "width": 256, "logit_scale": 10.0, "views": views}}
    rewrite.rewrite(
        folder / "data" / "*.tar", folder / name, process, stamp=stamp, sidecar=True, batch_size=8, progress=False
    )
    return str(folder / name)


def settings(folder, weights, *others, seed=0):
    several = [f"data.sidecars=[{with_views(folder)}]", f"data.train={folder / 'data'}/*.tar"]
    return tiny.settings(folder, *changes(weights, *several, *others, seed=seed))


def cached(folder, name="cache"):
    return f"data.cache_prefix={folder / name}"


def training(config):
    torch.manual_seed(0)
    return Training(config, torch.device("cpu"), config.run.precision)


@pytest.mark.slow
def test_the_log_says_what_runs_folded(tmp_path, weights):
    config = tiny.settings(
        tmp_path, *changes(weights, "data.micro_batch=4", "model.recompute=true", "run.steps=1"), teacher=256
    )
    text = go(config)
    assert f"frozen     folded, in channels_last, copies of 2.6 MiB: {BACKBONE}" in text


@pytest.mark.slow
def test_the_plan_counts_the_copies_and_what_a_cache_saves(tmp_path, weights):
    config = tiny.settings(tmp_path, *changes(weights, "run.precision=bf16"), teacher=256)
    step = TrainerStep(config, "bf16")
    folded = predict(step, torch.device("cpu"))
    other = TrainerStep(config, "bf16")
    size = other.folded.bytes
    for part in other.folded.parts:  # the modules run unfolded again
        vars(part.module).pop("forward", None)
    other.folded.parts = []
    plain = predict(other, torch.device("cpu"))
    assert size > 1 << 20
    assert folded.at_peak["parameters"] - plain.at_peak["parameters"] == size
    with_views, cache = (
        predict(TrainerStep(settings(tmp_path / "views", weights, *others), "fp32"), torch.device("cpu"))
        for others in ([], [cached(tmp_path)])
    )
    assert cache.peak < with_views.peak


def batches(config, this):
    return list(loader(this).epoch(0))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_batch_has_the_outputs_of_its_views(tmp_path, weights, precision):
    plain = training(settings(tmp_path, weights, f"run.precision={precision}"))
    this = training(settings(tmp_path, weights, f"run.precision={precision}", cached(tmp_path)))
    lines = []
    PrefixCache(this).make(lines.append)
    assert lines[0] == (
        f"prefix     training reads the output of {BACKBONE}, 112 x 3 x 3 in fp16: 2.0 KiB a view, 2 a sample, "
        f"0.2 MiB for 48 samples, in {tmp_path / 'cache'}; no image is decoded"
    )
    assert lines[1] == "prefix     made 2 of 2 shards; 0 skipped"
    seen = batches(this.config, this)
    assert len(seen) == 6
    for found, expected in zip(seen, batches(plain.config, plain)):
        assert found["key"] == expected["key"]
        assert "image" not in found
        assert all(torch.equal(found[name], expected[name]) for name in ("text", "group", "teacher_image", "teacher_text"))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = this.prefix(plain.pixels(expected))
        assert found["prefix"].dtype == torch.float16
        assert torch.allclose(
            found["prefix"].float(), outputs.float(), rtol=2e-3, atol=1e-3
        )  # products in bf16 may differ with the batch
        this.model.train()
        plain.model.train()
        features = this.encode_image(found), plain.encode_image(expected)
        assert torch.allclose(*features, atol=2e-3 if precision == "fp32" else 2e-2)
    several = {}
    for epoch in range(4):
        for batch in loader(this).epoch(epoch):
            for group, key, output in zip(batch["group"], batch["key"], batch["prefix"]):
                several.setdefault((group.item(), key), set()).add(output.numpy().tobytes())
    assert max(map(len, several.values())) > 1  # each view is drawn at some time


@pytest.mark.slow
def test_training_is_the_same_decodes_nothing_and_resumes_bit_for_bit(tmp_path, weights, monkeypatch):
    go(settings(tmp_path, weights, f"run.out={tmp_path / 'plain'}"))
    text = go(settings(tmp_path, weights, cached(tmp_path), f"run.out={tmp_path / 'first'}"))
    assert "prefix     made 2 of 2 shards" in text

    def refuse(*_, **__):
        raise AssertionError("an image was decoded")

    for module, name in ((decode, "decode"), (decode, "decode_pil"), (data.epoch, "pixels_of")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("simplclip.data.transforms.decode", refuse)
    with_micro = changes(weights, cached(tmp_path), "data.micro_batch=4", "data.workers=2")
    several = [f"data.sidecars=[{tmp_path / 'taught'}]", f"data.train={tmp_path / 'data'}/*.tar"]
    text = check_resumed(tmp_path, monkeypatch, 4, [*with_micro, *several])
    assert "prefix     made" not in text
    for row, same in zip(rows(tmp_path / "first"), rows(tmp_path / "plain"), strict=True):
        for name in ("loss", "grad_norm", "feature_loss"):
            assert float(row[name]) == pytest.approx(float(same[name]), rel=2e-3)


@pytest.mark.slow
def test_what_cannot_be_cached(tmp_path, weights):
    settings(tmp_path, weights)  # writes the data
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        (images / f"{number}.png").write_bytes(tiny.picture((9, 9, 9), "bar"))
        (images / f"{number}.txt").write_text("a bar")
    alone = ["data.sidecars=[]", "loss.feature_weight=0"]
    for others, message in (
        (alone, "expected images whose pixels do not change, got the augmentation 'affi"),
        (["inherit.source=null"], "expected an image tower that begins with frozen modules"),
        ([*alone, "data.augment=none", f"data.train={images}"], "expected local tars"),
    ):
        with pytest.raises(ConfigError, match=f"^data.cache_prefix: {message}"):
            go(settings(tmp_path, weights, cached(tmp_path), *others))
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_cache_of_something_else_is_refused(tmp_path, weights):
    def make(*others, seed=0):
        lines = []
        this = training(settings(tmp_path, weights, cached(tmp_path), *others, seed=seed))
        PrefixCache(this).make(lines.append)
        return lines

    assert len(make()) == 2
    assert len(make()) == 1  # the cache is used unchanged
    folder = str(tmp_path / "cache")
    for others, seed, key in (([], 1, "prefix.weights"), (["run.precision=bf16"], 0, "prefix.precision")):
        with pytest.raises(
            ConfigError, match=f"data.cache_prefix: expected the settings of the earlier run in {folder}.*{key}"
        ):
            make(*others, seed=seed)
    with pytest.raises(ConfigError, match=r"data.cache_prefix: .*prefix.pixels.max_pixels was None, now 100000"):
        make("data.options.max_pixels=100000")
    other = with_views(tmp_path, "more", VIEWS + 1)
    with pytest.raises(ConfigError, match=r"data.cache_prefix: .*prefix.views.number was 2, now 3"):
        make(f"data.sidecars=[{other}]")
    tiny.write_shard(tmp_path / "data" / "train-1.tar", copies=2)  # its views and its outputs are made again
    with_views(tmp_path)
    assert make()[1].startswith("prefix     made 1 of 2 shards")


@pytest.mark.slow
def test_a_damaged_image_is_skipped_as_without_a_cache(tmp_path, weights):
    settings(tmp_path, weights)
    shard = tmp_path / "data" / "train-0.tar"
    content = bytearray(shard.read_bytes())
    at = content.index(b"\x89PNG")
    content[at + 8 : at + 40] = bytes(32)
    shard.write_bytes(content)
    reports = []
    for others in ([], [cached(tmp_path)]):
        this = training(settings(tmp_path, weights, *others))
        if this.prefix:
            PrefixCache(this).make(print)
        source = loader(this)
        list(source.epoch(0))
        reports.append(source.report())
    assert reports[0] == reports[1]
    assert "1 skipped" in reports[0]
