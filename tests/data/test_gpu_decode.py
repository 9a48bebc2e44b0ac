"""Decoding by the process that trains: without a GPU the CPU takes its part."""

import pytest
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg
from pairs import keys, loader, png, sample, write
from runs import bits

from simplclip.common.errors import InputError
from simplclip.data import decode, gpu
from simplclip.data import loader as loading
from simplclip.data.transforms import ImageTransform

TRANSFORM = ImageTransform(PreprocessCfg(size=8), AugmentationCfg(color_jitter=(0.3, 0.3, 0.3, 0.1), color_jitter_prob=0.8))


@pytest.fixture
def on_cpu(monkeypatch):
    """The CPU decodes where the GPU would."""

    def decoded(files, device, *, max_pixels=None):
        found = []
        for file in files:
            try:
                found.append(decode.decode(file, max_pixels=max_pixels))
            except decode.BrokenSample as broken:
                found.append(broken)
        return found

    monkeypatch.setattr(gpu, "decode_gpu", decoded)
    monkeypatch.setattr(loading, "check_gpu", lambda device: None)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu(tmp_path, on_cpu, workers):
    paths = [write(tmp_path / f"{shard}.tar", [sample(5 * shard + i) for i in range(5)]) for shard in range(3)]
    options = {"transform": TRANSFORM, "workers": workers, "drop_last": False}
    plain, by_gpu = (list(loader(paths, **options, decode=place).epoch(1)) for place in ("cpu", "cuda"))
    assert bits(plain) == bits([{name: batch[name] for name in plain[0]} for batch in by_gpu])


def test_a_broken_image_makes_its_batch_smaller_and_is_counted(tmp_path, on_cpu):
    torn = ("torn", {"png": png(size=(64, 64))[:2000], "txt": b"x"})
    path = write(tmp_path / "a.tar", [sample(0), torn, sample(1), ("no", {"png": b"no", "txt": b"x"}), sample(2)])
    reader = loader(path, transform=TRANSFORM, shuffle=False, batch_size=2, decode="cuda", drop_last=False)
    states, found = [], []
    for batch in reader.epoch(0):
        found.append(batch)
        states.append(reader.state())
    assert [batch["key"] for batch in found] == [["k000"], ["k001", "k002"]]
    assert [len(batch["image"]) for batch in found] == [1, 2] == [len(batch["colour"]) for batch in found]
    assert reader.skipped == {"truncated image": 1, "not an image": 1}
    assert reader.report().startswith("3 samples used")
    rest = list(reader.epoch(0, 1, states[0]))
    assert bits(rest) == bits(found[1:])
    assert reader.skipped == {"truncated image": 1, "not an image": 1}
    alone = loader(write(tmp_path / "b.tar", [torn]), transform=TRANSFORM, batch_size=1, decode="cuda")
    assert keys(alone.epoch(0)) == []


def test_refusals(tmp_path):
    path = write(tmp_path / "a.tar", [sample(0)])
    with pytest.raises(InputError, match="data.decode: expected cpu with a transform of PIL images, got cuda"):
        loader(path, decode="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="data.decode: expected a CUDA device for gpu, got a machine without a GPU"):
            loader(path, transform=TRANSFORM, decode="cuda")


@pytest.mark.parametrize("transform", [TRANSFORM, lambda image: torch.zeros(3, 2, 2)], ids=["ours", "a caller's"])
def test_max_pixels(tmp_path, transform):
    path = write(tmp_path / "a.tar", [sample(0), ("large", {"png": png(size=(30, 20)), "txt": b"x"})])
    reader = loader(path, transform=transform, batch_size=1, max_pixels=599)
    assert keys(reader.epoch(0)) == ["k000"]
    assert reader.skipped == {"image too large": 1}
    assert len(keys(loader(path, transform=transform, batch_size=1, max_pixels=600).epoch(0))) == 2
