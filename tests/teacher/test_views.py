"""The views that a teacher saw are replayed to the bit; training on them."""

import functools
import json
import signal
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg
from torch.nn.functional import interpolate

import simplclip
from simplclip import data, models, teacher
from simplclip.data import samples, transforms
from simplclip.data.transforms import ImageTransform
from simplclip.train import config as configs
from simplclip.train import loop
from simplclip.train.config import ConfigError
from support.data.pairs import joined, loader, members, tokenizer, write
from support.data.photos import encode, photo
from support.models.open_clip_models import write_models
from support.programs import call, one_line
from support.train import tiny
from support.train.runs import at_step, bits, check_ends_as, go, state_of

pytestmark = pytest.mark.long


AUGMENT = {
    "scale": [0.3, 1.0],
    "color_jitter": [0.4, 0.4, 0.4, 0.1],
    "color_jitter_prob": 0.8,
    "gray_scale_prob": 0.2,
}
COUNT, VIEWS = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes two shards of photographs with up to three captions, and a teacher's weights."""
    folder = tmp_path_factory.mktemp("views")
    write_models(folder)
    (folder / "in").mkdir()
    for name, start in (("train-0", 0), ("train-1", COUNT // 2)):
        written = []
        for number in range(start, start + COUNT // 2):
            record = {"captions": [f"{number} {letter}" for letter in "abc"[: 1 + number % 3]]}
            image = encode(photo(number, (60 + 40 * number, 90 + 20 * number)), quality=90)
            written.append((f"k{number:03d}", {"jpg": image, "json": json.dumps(record).encode()}))
        write(folder / "in" / f"{name}.tar", written)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny")
    torch.nn.init.constant_(model.logit_scale, np.log(20.0))
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder


def load(folder):
    return simplclip.load("open_clip:tiny", folder / "tiny.pt", device="cpu")


def transform(size, augment=AUGMENT, **options):
    return ImageTransform(PreprocessCfg(size, **options), augment)


def teach(folder, out, augment=AUGMENT, number=VIEWS, **options):
    views = teacher.Views(transform(32, augment), number, seed=5)
    return teacher.write_features(
        folder / "in" / "*.tar", out, load(folder), views=views, progress=False, **options
    )


@pytest.fixture(scope="module")
def sidecars(folder, tmp_path_factory):
    """Returns the folder of sidecars with views by AUGMENT."""
    out = tmp_path_factory.mktemp("sidecars")
    teach(folder, out)
    return out


def batches(folder, out, student, passes=1, **options):
    """Returns the batches of some passes over the 6 samples, one at a time."""
    options = {"sidecars": [out], "teacher": True, "batch_size": 1} | options
    source = iter(loader(folder / "in" / "*.tar", transform=student, **options))
    return [next(source) for _ in range(passes * COUNT)]


def stored(folder, out):
    """Returns the samples with their views and features by key."""
    return joined(folder / "in" / "*.tar", out, teacher=True)


@pytest.mark.slow
@pytest.mark.parametrize("augment", [AUGMENT, "affine"])
def test_a_view_is_stored_as_it_was_drawn(folder, tmp_path, augment):
    teach(folder, tmp_path / "a", augment, batch_size=2)
    seen = set()
    for key, sample in stored(folder, tmp_path / "a").items():
        assert len(sample.views) == VIEWS
        assert sample.features.shape == (VIEWS + len(sample.captions), 16)
        for view in sample.views:
            assert json.loads(json.dumps(view)) == view
            seen.add(json.dumps(view))
        again = teacher.Views(transform(32, augment), VIEWS, 5).draw(sample)
        assert again == sample.views
        assert teacher.Views(transform(32, augment), VIEWS, 6).draw(sample) != again
        assert teacher.Views(transform(32, augment), 2, 5).draw(sample) == again[:2]
        files = members(tmp_path / "a" / f"train-{int(int(key[1:]) >= COUNT // 2)}.tar")
        about = samples.digests_of(sample) | {"views": again}
        about["features"] = samples.digest_of_features(files[f"{key}.teacher.npy"], again)
        assert json.loads(files[f"{key}.teacher.json"]) == about
    assert len(seen) == VIEWS * COUNT
    teach(folder, tmp_path / "b", augment, batch_size=5, workers=2)
    assert [s.views for s in stored(folder, tmp_path / "b").values()] == [
        s.views for s in stored(folder, tmp_path / "a").values()
    ]


def test_an_image_is_decoded_once_for_all_its_views(folder, tmp_path, monkeypatch):
    decode = mock.Mock(wraps=transforms.decode_image)
    monkeypatch.setattr(transforms, "decode_image", decode)
    teach(folder, tmp_path / "out")
    decoded = [call.args[0] for call in decode.call_args_list]
    assert len(decoded) == len(set(decoded)) == COUNT
    # At the largest scale that a view needs: each has at least the pixels that it has alone.
    image, small = encode(photo(3, (300, 400)), quality=90), transform(32)
    crops = ([0, 0, 300, 400], [10, 20, 40, 50], [0, 0, 140, 150])
    views = [{"image": [300, 400], "crop": crop} for crop in crops]
    several = small.apply_views(image, views)
    assert torch.equal(several[1], small.apply(image, views[1]))
    for pixels, view in zip(several, views):
        assert (pixels.float() - small.apply(image, view).float()).abs().mean() < 3


@pytest.mark.slow
@pytest.mark.parametrize(("captions", "workers"), [(1, 0), (2, 2)])
def test_the_student_sees_what_the_teacher_saw(folder, sidecars, captions, workers):
    """To the bit, at the student's own size; features are those of the view and of the captions."""
    pairs, student = stored(folder, sidecars), transform(24, None, mean=(0.1, 0.2, 0.3))
    used = {key: set() for key in pairs}
    for batch in batches(
        folder, sidecars, student, 6, captions_per_image=captions, workers=workers
    ):
        (key,), (image,) = batch["key"], batch["image"]
        sample = pairs[key]
        features = torch.from_numpy(sample.features)
        shown = [student.apply(sample.encoded, view).equal(image) for view in sample.views]
        assert shown.count(True) == 1
        number = shown.index(True)
        assert batch["teacher_image"][0].equal(features[number])
        texts = batch["text"].reshape(captions, -1)
        rows = batch["teacher_text"].reshape(captions, -1)
        for text, row in zip(texts, rows):
            drawn = [tokens.equal(text) for tokens in tokenizer(sample.captions)]
            assert row.equal(features[VIEWS + drawn.index(True)])
        used[key].add(number)
    assert all(len(numbers) > 1 for numbers in used.values())
    assert set().union(*used.values()) == set(range(VIEWS))


@pytest.mark.parametrize("augment", [AUGMENT, "affine"])
def test_the_teacher_on_the_students_batch_gives_what_is_stored(folder, tmp_path, augment):
    """Up to decoding at another scale; the student has the teacher's own transform."""
    teach(folder, tmp_path / "out", augment)
    encoder = load(folder)
    student = teacher.features.transform_of(encoder)
    exact = []
    for batch in batches(folder, tmp_path / "out", student, 3):
        features = encoder.features("image", student.finish(batch["image"]))
        exact.append((features.half() - batch["teacher_image"]).abs().max().item() <= 2**-11)
        torch.testing.assert_close(
            features, batch["teacher_image"].float(), atol=1e-3 if exact[-1] else 0.05, rtol=0
        )
    assert sum(exact) >= len(exact) // 2
    other = encoder.features("image", student.finish(batch["image"].flip(2)))
    assert (other - batch["teacher_image"].float()).abs().max() > 0.01


@pytest.mark.parametrize("augment", [AUGMENT, "affine"])
def test_a_view_is_the_same_part_of_an_image_at_another_size(augment):
    """Pixels at size 128, shrunken, are close to those at size 32."""
    image = encode(photo(3, (200, 300)), "PNG")
    large, small = transform(128, augment), transform(32, augment)
    for seed in range(5):
        torch.manual_seed(seed)
        view = large.draw(200, 300)
        a, b = large.apply(image, view)[None].float(), small.apply(image, view)[None].float()
        shrunken = interpolate(a, size=32, mode="bilinear", antialias=True)
        inside = slice(3, -3)
        assert (shrunken - b)[..., inside, inside].abs().mean() < 4
        moved = (shrunken.roll(2, -1) - b)[..., inside, inside].abs().mean()
        assert moved > 1.5 * (shrunken - b)[..., inside, inside].abs().mean()


def test_only_a_transform_that_replays_takes_views(folder, sidecars, tmp_path):
    other = load(folder)
    other.preprocess = models.transforms  # a caller's own
    views = teacher.Views(transform(32), 2)
    message = "teacher: expected open_clip's preprocessing or an ImageTransform, got"
    with pytest.raises(ValueError, match=message):
        teacher.write_features(folder / "in" / "*.tar", tmp_path / "none", other, views=views)
    message = "has the views that a teacher saw, which only simplclip's ImageTransform"
    with pytest.raises(data.ShardError, match=message):
        batches(folder, sidecars, models.transforms)


@pytest.mark.slow
def test_the_command_and_its_stamp(folder, tmp_path):
    command = ["teacher", folder / "in" / "*.tar", "--out", tmp_path / "out"]
    command += ["--teacher", "open_clip:tiny", "--checkpoint", folder / "tiny.pt"]
    command += ["--config", "siclip-s0", "--workers", 0]
    result = call(*command, "--views", 3)
    assert result.exit_code == 0, result.output
    written = "6 samples with features of open_clip:tiny of 3 views of each image, width 16"
    assert written in result.output.replace("\n", " ")
    stamp = data.teacher_stamp([tmp_path / "out"])
    assert (stamp["name"], stamp["width"], stamp["dtype"]) == ("open_clip:tiny", 16, "fp16")
    student = teacher.student_transform("siclip-s0")
    assert stamp["views"] == {"number": 3, "augment": transforms.augmentation(student), "seed": 0}
    assert "to hold what an earlier run" in one_line(*command, "--views", 4)


def test_where_the_augmentation_is_from(tmp_path):
    path = tiny.write_config(tmp_path)
    of = transforms.augmentation
    for augment, wanted in (
        ({"scale": [0.7, 1.0]}, transform(8, {"scale": (0.7, 1.0)})),
        ("affine", transform(8, "affine")),
    ):
        settings = configs.load(path, [f"data.augment={json.dumps(augment)}"])
        (tmp_path / "student.yaml").write_text(settings.to_yaml())
        assert of(teacher.student_transform(str(tmp_path / "student.yaml"))) == of(wanted)
    (tmp_path / "student.yaml").write_text(configs.load(path, ["data.augment=none"]).to_yaml())
    message = "views: expected a transform that augments, got one without"
    with pytest.raises(ValueError, match=message):
        teacher.Views(teacher.student_transform(str(tmp_path / "student.yaml")), 2)


WIKD = ["loss.feature_weight=1.0", "loss.relational_weight=1.0", "loss.interactive_weight=1.0"]


@pytest.fixture(scope="module")
def taught(folder, tmp_path_factory):
    """Writes data of tiny.write_shard and their sidecars."""
    out = tmp_path_factory.mktemp("taught")
    tiny.write_shard(out / "data" / "train-0.tar")
    views = teacher.Views(models.transforms("siclip-tiny", train=True), 2)
    teacher.write_features(
        out / "data" / "*.tar", out / "sidecars", load(folder), views=views, progress=False
    )
    return out


@pytest.mark.slow
def test_training_replays_views_and_resumes_bit_for_bit(taught, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(taught / "data")
    changes = [*WIKD, "data.micro_batch=4", "data.workers=1"]
    changes += ["data.captions_per_image=2", f"data.sidecars=[{taught / 'sidecars'}]"]
    go(tiny.settings(tmp_path, *changes, f"run.out={tmp_path / 'whole'}"))
    parts = tiny.settings(tmp_path, *changes)
    with monkeypatch.context() as patch:
        at_step(patch, 4, functools.partial(signal.raise_signal, signal.SIGINT))
        with pytest.raises(loop.Interrupted):
            go(parts)
    check_ends_as(tmp_path / "whole", parts)


@pytest.mark.slow
def test_training_checks_the_augmentation(taught, tmp_path):
    (tmp_path / "data").symlink_to(taught / "data")
    changes = [*WIKD, "run.steps=2", f"data.sidecars=[{taught / 'sidecars'}]"]
    default = transforms.augmentation(models.transforms("siclip-tiny", train=True))
    other = "none" if default == "affine" else "affine"
    message = "data.augment: expected null, or .* as in the views that the teacher open_clip:tiny"
    with pytest.raises(ConfigError, match=message):
        go(tiny.settings(tmp_path, *changes, f"data.augment={other}"))
    same = [f"data.augment={json.dumps(default)}", f"run.out={tmp_path / 'same'}"]
    go(tiny.settings(tmp_path, *changes, *same))
    go(tiny.settings(tmp_path, *changes))
    assert bits(state_of(tmp_path / "run")["model"]) == bits(state_of(tmp_path / "same")["model"])
