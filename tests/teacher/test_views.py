"""The views that a teacher saw are replayed to the bit; several teachers act as one; training on both."""

import json

import numpy as np
import open_clip
import pytest
import tiny
import torch
from open_clip.transform import PreprocessCfg
from pairs import call, keys, loader, members, meta, one_line, tokenizer, write
from photos import encode, photo
from runs import bits, check_resumed, go, state_of
from torch.nn.functional import interpolate
from trainer_runs import write_models

from simplclip import data, models, ops, teacher
from simplclip.data import shards
from simplclip.data.broken import Skipped
from simplclip.data.transforms import ImageTransform
from simplclip.memory.step import TrainerStep
from simplclip.train import config as configs
from simplclip.train.batches import batches as steps
from simplclip.train.config import ConfigError
from simplclip.train.state import Training

AUGMENT = {"scale": [0.3, 1.0], "color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_prob": 0.8, "gray_scale_prob": 0.2}
COUNT, VIEWS = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes photographs of several sizes with up to three captions in two shards, and two teachers' weights."""
    folder = tmp_path_factory.mktemp("views")
    write_models(folder)
    (folder / "in").mkdir()
    for name, start in (("train-0", 0), ("train-1", COUNT // 2)):
        samples = []
        for number in range(start, start + COUNT // 2):
            record = {"captions": [f"{number} {letter}" for letter in "abc"[: 1 + number % 3]]}
            image = encode(photo(number, (60 + 40 * number, 90 + 20 * number)), quality=90)
            samples.append((f"k{number:03d}", {"jpg": image, "json": json.dumps(record).encode()}))
        write(folder / "in" / f"{name}.tar", samples)
    for seed, (name, scale) in enumerate({"tiny": 20.0, "tiny-wide": 80.0}.items()):
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        torch.nn.init.constant_(model.logit_scale, np.log(scale))
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder


def load(folder, name="tiny"):
    return teacher.load(f"open_clip:{name}", folder / f"{name}.pt")


def transform(size, augment=AUGMENT, **options):
    return ImageTransform(PreprocessCfg(size, **options), augment)


def teach(folder, out, augment=AUGMENT, number=VIEWS, **options):
    views = teacher.Views(transform(32, augment), number, seed=5)
    return teacher.write(folder / "in" / "*.tar", out, load(folder), views=views, progress=False, **options)


def batches(folder, out, student, epoch, **options):
    options = {"sidecars": [out], "teacher": True, "batch_size": 2, "drop_last": False} | options
    return list(loader(folder / "in" / "*.tar", transform=student, **options).epoch(epoch))


def stored(folder, out):
    """Returns the samples with their views and features by key."""
    found = {}
    for path in sorted((folder / "in").glob("*.tar")):
        for sample in shards.read_shard(str(path), Skipped(), sidecars=[out]):
            found[sample["__key__"]] = shards.parse(sample, teacher=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("augment", [AUGMENT, "affine", {"scale": [0.3, 0.6]}])
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
        assert set(members(tmp_path / "a" / f"train-{int(int(key[1:]) >= COUNT // 2)}.tar")) >= {f"{key}.views.json"}
    assert len(seen) == VIEWS * COUNT
    teach(folder, tmp_path / "b", augment, batch_size=5)
    assert [s.views for s in stored(folder, tmp_path / "b").values()] == [
        s.views for s in stored(folder, tmp_path / "a").values()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("captions", [1, 2])
def test_the_student_sees_what_the_teacher_saw(folder, tmp_path, captions, workers):
    """Views are equal to the bit, at the student's own size; features are those of the view and of the drawn captions."""
    teach(folder, tmp_path / "out")
    samples, student = stored(folder, tmp_path / "out"), transform(24, None, mean=(0.1, 0.2, 0.3))
    used = {key: set() for key in samples}
    for epoch in range(6):
        seen = []
        for batch in batches(folder, tmp_path / "out", student, epoch, captions_per_image=captions, workers=workers):
            for i, key in enumerate(batch["key"]):
                sample, image = samples[key], batch["image"][i]
                (number,) = [
                    n for n, view in enumerate(sample.views) if torch.equal(student.apply(sample.encoded, view), image)
                ]
                assert batch["colour"][i].equal(torch.tensor(sample.views[number]["colour"]))
                assert batch["teacher_image"][i].equal(torch.from_numpy(sample.features[number]))
                texts = batch["text"][i].reshape(captions, -1)
                rows = batch["teacher_text"][i].reshape(captions, -1)
                for text, row in zip(texts, rows):
                    caption = [t for t in sample.captions if tokenizer([t])[0].equal(text)]
                    assert row.equal(torch.from_numpy(sample.features[VIEWS + sample.captions.index(*caption)]))
                used[key].add(number)
                seen.append(key)
        assert sorted(seen) == sorted(samples)
    assert all(len(numbers) > 1 for numbers in used.values())
    assert set().union(*used.values()) == set(range(VIEWS))


@pytest.mark.parametrize("augment", [AUGMENT, "affine"])
def test_the_teacher_on_the_students_batch_gives_what_is_stored(folder, tmp_path, augment):
    """The student has the teacher's own transform; features agree in every epoch."""
    teach(folder, tmp_path / "out", augment)
    encoder = load(folder)
    student = teacher.features.transform_of(encoder)
    for epoch in range(3):
        for batch in batches(folder, tmp_path / "out", student, epoch):
            found = encoder.features("image", student.finish(batch["image"], batch["colour"]))
            torch.testing.assert_close(found, batch["teacher_image"].float(), atol=1e-3, rtol=0)
            assert (found.half() - batch["teacher_image"]).abs().max() <= 2**-11
    other = encoder.features("image", student.finish(batch["image"].flip(0), batch["colour"]))
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


def test_bfloat16(folder, tmp_path):
    teach(folder, tmp_path / "half")
    teach(folder, tmp_path / "brain", dtype="bf16")
    assert meta(tmp_path / "brain")["teacher"]["dtype"] == "bf16"
    half, brain = (batches(folder, tmp_path / name, transform(16), 0) for name in ("half", "brain"))
    for one, other in zip(half, brain):
        assert bits(one["image"]) == bits(other["image"])
        for name in ("teacher_image", "teacher_text"):
            assert other[name].dtype == torch.bfloat16
            torch.testing.assert_close(other[name].float(), one[name].float(), atol=2**-9, rtol=2**-7)
    with pytest.raises(ValueError, match="dtype: expected fp16 or bf16, got 'fp8'"):
        teach(folder, tmp_path / "other", dtype="fp8")


def test_only_a_transform_that_replays_takes_views(folder, tmp_path):
    teach(folder, tmp_path / "out")
    for workers in (0, 1):
        with pytest.raises(data.ShardError, match="has the views that a teacher saw, which only simplclip's ImageTransform"):
            batches(folder, tmp_path / "out", models.transforms, 0, workers=workers)
    plain = batches(folder, tmp_path / "out", transform(16), 0, teacher=False)  # draws the student's own augmentation
    assert "teacher_image" not in plain[0]


@pytest.mark.slow
def test_several_teachers_are_the_mean_of_their_logits(folder):
    encoders = [load(folder), load(folder, "tiny-wide")]
    both = teacher.Ensemble(encoders)
    assert both.width == 40
    assert both.logit_scale == pytest.approx(50)
    samples = [sample for path in (folder / "in").glob("*.tar") for sample in shards.read_shard(str(path), Skipped())]
    samples = [shards.parse(sample) for sample in samples]
    texts = [sample.captions[0] for sample in samples]
    image, text = both.encode_image(samples), both.encode_text(texts, 4)
    mean = sum(e.logit_scale * e.encode_image([s.image for s in samples]) @ e.encode_text(texts).T for e in encoders) / 2
    for features in (image, text):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(COUNT))
    torch.testing.assert_close(both.logit_scale * image @ text.T, mean)

    # Relational distillation from these features equals distillation from the mean logits.
    student = torch.nn.functional.normalize(torch.randn(2, COUNT, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    stored = {"teacher_image": image.half(), "teacher_text": text.half(), "teacher_scale": torch.tensor(both.logit_scale)}
    found = ops.similarity_loss(*student, torch.tensor(10.0), terms=("relational",), **stored)["relational"]
    logits = 10 * student[0] @ student[1].T
    kl = [
        torch.nn.functional.kl_div(z.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
        for z, t in ((logits, mean), (logits.T, mean.T))
    ]
    torch.testing.assert_close(found, sum(kl) / 2, atol=2e-3, rtol=2e-3)
    assert teacher.Ensemble(encoders[:1]).stamp() == encoders[0].stamp()


def command(folder, out, *options):
    names = ("tiny", "tiny-wide")
    given = [part for name in names for part in ("--teacher", f"open_clip:{name}", "--checkpoint", folder / f"{name}.pt")]
    return ("teacher", folder / "in" / "*.tar", "--out", out, *given, "--precision", "fp32", *options)


@pytest.mark.slow
def test_the_command_and_its_stamp(folder, tmp_path):
    options = ("--views", 3, "--model", "siclip-tiny", "--evaluate", folder / "in" / "train-0.tar")
    result = call(*command(folder, tmp_path / "out", *options))
    assert result.exit_code == 0, result.output
    name = "open_clip:tiny + open_clip:tiny-wide"
    assert f"6 samples with features of {name} of 3 views of each image, width 40" in result.output.replace("\n", " ")
    assert result.output.count("image to text R@1") == 2
    stamp = data.teacher_stamp(data.expand(str(folder / "in" / "*.tar")), [tmp_path / "out"])
    assert (stamp["name"], stamp["width"], stamp["dtype"]) == (name, 40, "fp16")
    assert [one["width"] for one in stamp["teachers"]] == [16, 24]
    student = models.transforms("siclip-tiny", train=True)
    assert stamp["views"] == {"number": 3, "augment": data.transforms.augmentation(student), "seed": 0}
    message = one_line(*command(folder, tmp_path / "out", "--views", 4, "--model", "siclip-tiny"))
    assert "teacher.views.number was 3, now 4" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "siclip-tiny"), "--config, --model, --augment: expected --views beside them, got none"),
        (("--views", 2, "--augment", "none"), "views: expected a transform that augments, got one without"),
        (("--views", 2, "--augment", "{use_timm: true}"), "augment.use_timm: expected none, as timm"),
        (("--views", 2, "--config", "siclip-tiny-emoji", "--augment", "affine"), "config: expected no model and no augment"),
        (("--checkpoint", "none.pt"), "checkpoint: expected one for each of 2 teachers or none, got 3"),
        (("--sidecars", "none"), "sidecars: expected folders, got 'none', which is none"),
        (("--dtype", "int8"), "dtype: expected fp16 or bf16, got 'int8'"),
    ],
)
def test_wrong_options_end_in_one_line(folder, tmp_path, options, message):
    assert message in one_line(*command(folder, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_where_the_augmentation_is_from(tmp_path):
    of = data.transforms.augmentation
    assert of(teacher.student_transform()) == of(transform(8, {}))
    assert of(teacher.student_transform(augment="affine")) == "affine"
    assert of(teacher.student_transform(augment="{scale: [0.4, 1.0]}"))["scale"] == [0.4, 1.0]
    assert of(teacher.student_transform(model="siclip-tiny")) == of(models.transforms("siclip-tiny", train=True))
    path = tiny.write_config(tmp_path)
    settings = configs.load(path, ["data.augment={scale: [0.7, 1.0]}"])
    (tmp_path / "own.yaml").write_text(settings.to_yaml())
    assert of(teacher.student_transform(config=str(tmp_path / "own.yaml"))) == of(transform(8, {"scale": (0.7, 1.0)}))
    assert of(transform(8, None)) == "none"
    with pytest.raises(ValueError, match="augment: expected one whose draws can be stored .without use_timm., got Compose"):
        teacher.student_transform(model="siclip-tiny", augment="{use_timm: true}")


WIKD = ["loss.feature_weight=1.0", "loss.relational_weight=1.0", "loss.interactive_weight=1.0"]


@pytest.fixture(scope="module")
def taught(folder, tmp_path_factory):
    """Writes sidecars of tiny.write_shard's data, in a folder beside a config that `tiny.settings` writes."""
    out = tmp_path_factory.mktemp("taught")
    tiny.write_shard(out / "data" / "train-0.tar")
    views = teacher.Views(models.transforms("siclip-tiny", train=True), 2)
    encoders = [load(folder), load(folder, "tiny-wide")]
    teacher.write(out / "data" / "*.tar", out / "sidecars", encoders, views=views, progress=False)
    return out


@pytest.mark.slow
def test_training_replays_views_and_resumes_bit_for_bit(taught, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(taught / "data")
    changes = [*WIKD, "data.micro_batch=4", "model.freeze_norms=true", "data.workers=1"]
    changes += ["data.captions_per_image=2", f"data.sidecars=[{taught / 'sidecars'}]"]
    text = check_resumed(tmp_path, monkeypatch, 4, changes)
    assert "40 wide, are read from the data; no teacher is in memory" in text


@pytest.mark.slow
def test_training_checks_the_augmentation(taught, tmp_path):
    (tmp_path / "data").symlink_to(taught / "data")
    changes = [*WIKD, "run.steps=2", f"data.sidecars=[{taught / 'sidecars'}]"]
    default = data.transforms.augmentation(models.transforms("siclip-tiny", train=True))
    other = "none" if default == "affine" else "affine"
    with pytest.raises(
        ConfigError, match="data.augment: expected null, or .* as in the views that the teacher open_clip:tiny"
    ):
        go(tiny.settings(tmp_path, *changes, f"data.augment={other}"))
    go(tiny.settings(tmp_path, *changes, f"data.augment={json.dumps(default)}", f"run.out={tmp_path / 'same'}"))
    go(tiny.settings(tmp_path, *changes))
    assert bits(state_of(tmp_path / "run")["model"]) == bits(state_of(tmp_path / "same")["model"])


def test_a_plan_knows_the_width(taught, tmp_path):
    (tmp_path / "data").symlink_to(taught / "data")
    settings = tiny.settings(tmp_path, *WIKD, f"data.sidecars=[{taught / 'sidecars'}]")
    step = TrainerStep(settings, "fp32")
    assert step.batches(real=False)[0]["teacher_image"].shape == (8, 40)
    (told,) = TrainerStep(tiny.settings(tmp_path, *WIKD), "fp32").assumed
    assert told.startswith("a teacher of the student's width, 256 (--teacher-width): ")
    assert "no teacher is named in" in told


def test_micro_batches_have_the_colours_of_their_images(taught, tmp_path):
    (tmp_path / "data").symlink_to(taught / "data")
    changes = [*WIKD, "data.micro_batch=4", f"data.sidecars=[{taught / 'sidecars'}]"]
    this = Training(tiny.settings(tmp_path, *changes, "model.freeze_norms=true"), torch.device("cpu"), "fp32")
    parts = next(steps(this))
    settings = tiny.settings(tmp_path, *WIKD, f"data.sidecars=[{taught / 'sidecars'}]")
    whole = Training(settings, torch.device("cpu"), "fp32")
    (one,) = next(steps(whole))
    assert len(parts) == 2
    assert torch.equal(torch.cat([part["colour"] for part in parts]), one["colour"])
    assert torch.equal(torch.cat([this.pixels(part) for part in parts]), this.pixels(one))
    assert keys([one])
