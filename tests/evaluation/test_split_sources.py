"""Sources of splits: JSON and CSV, folders of classes, clip-benchmark's folders; names of classes, phrases."""

import json

import open_clip
import pytest
import torch
from pairs import png, write

from simplclip import data, evaluation, retrieval
from simplclip.data.broken import Skipped
from simplclip.data.parts import Classes


def entries(what, **options):
    found = data.held_out(str(what), **options)
    return [found.open(sample) for sample in found.samples(Skipped())]


def captions(what, **options):
    return {entry.key: entry.captions for entry in entries(what, **options)}


def test_the_first_captions_and_images_elsewhere(tmp_path):
    (tmp_path / "images").mkdir()
    for number, name in enumerate("ab"):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(number))
    rows = ["a.png| 0| one", "a.png| 1| two", "b.png| 0| five", "b.png| 1| five", "a.png| 2| three"]
    (tmp_path / "flickr.csv").write_text("\n".join(["image_name| comment_number| comment", *rows]))
    (tmp_path / "list.json").write_text('[{"image": "a.png", "caption": "y"}, {"image": "gone.png", "caption": "x"}]')
    for limit, expected in ((None, [["one", "two", "three"], ["five", "five"]]), (1, [["one"], ["five"]])):
        found = entries(tmp_path / "flickr.csv", images=tmp_path / "images", captions=limit)
        assert [entry.captions for entry in found] == expected
        assert [entry.encoded for entry in found] == [png(0), png(1)]
    split = retrieval.Split(
        data.held_out(tmp_path / "list.json", images=tmp_path / "images"), None, lambda image: torch.zeros(3, 2, 2)
    )
    assert [len(batch) for batch in split.read(2)] == [1]
    assert split.keys == ["a.png"]
    assert "1 cannot be read (first: list.json/gone.png: " in split.report()


def test_captions_of_shards(tmp_path):
    record = json.dumps({"captions": ["one", "two", " ", "three"], "caption": "another"}).encode()
    single = json.dumps({"caption": "single", "label": 3}).encode()
    rows = [("a", {"png": png(), "json": record, "txt": b"no"}), ("b", {"png": png(), "txt": b"x\n\n y \nz\n"})]
    shard = write(tmp_path / "s.tar", [*rows, ("c", {"png": png(), "json": single}), ("d", {"png": png(), "cls": b"4"})])
    several = ["one", "two", "three"]
    for limit, a, b in ((None, several[:1], ["x", "y", "z"]), (0, several, ["x", "y", "z"]), (2, several[:2], ["x", "y"])):
        assert captions(shard, captions=limit) == {"a": a, "b": b, "c": ["single"], "d": []}
    assert [entry.label for entry in entries(shard)] == [None, None, "3", 4]


def test_a_group_s_identical_captions_are_one_and_an_image_s_are_not(tmp_path):
    def record(group, *texts):
        return json.dumps({"captions": texts, **({"group": group} if group else {})}).encode()

    rows = [("a", "g", ("x", "x", "y")), ("b", "g", ("x",)), ("c", "h", ("x",)), ("d", None, ("x", "x")), ("e", None, ("x",))]
    shard = write(tmp_path / "s.tar", [(key, {"png": png(), "json": record(group, *texts)}) for key, group, texts in rows])
    split = retrieval.Split(data.held_out(shard, captions=0), None, lambda image: torch.zeros(3, 2, 2))
    for _ in range(2):  # a second reading changes nothing
        assert sum(map(len, split.read(2))) == 5
        assert split.groups.tolist() == [0, 0, 1, 2, 3]
        assert [*zip(split.captions, split.caption_groups.tolist())] == [
            ("x", 0), ("y", 0), ("x", 1), ("x", 2), ("x", 2), ("x", 3)
        ]  # fmt: skip


SYNSETS = ("n02123045", "n01440764", "n02099601")  # tabby, tench, golden retriever


@pytest.fixture
def imagenet(tmp_path):
    """Writes three classes of ImageNet, with 3, 2 and 1 images."""
    for number, name in enumerate(SYNSETS):
        (tmp_path / "val" / name).mkdir(parents=True)
        for image in range(3 - number):
            (tmp_path / "val" / name / f"{image}.JPEG").write_bytes(png(10 * number + image, form="JPEG"))
        (tmp_path / "val" / name / "notes.txt").write_text("x")
    return tmp_path / "val"


def test_a_folder_of_classes(imagenet, tmp_path):
    found = data.held_out(str(imagenet))
    assert found.classes.names == sorted(SYNSETS)
    opened = entries(imagenet)
    assert [entry.label for entry in opened] == [0, 0, 1, 2, 2, 2]
    assert opened[0].key == "n01440764/0.JPEG"

    def names(file):
        return evaluation.named(found, *evaluation.class_names(file)).classes.names

    assert names("imagenet") == ["tench", "Golden Retriever", "tabby cat"]
    (tmp_path / "three.txt").write_text("Schleie\n\nRetriever\nKatze\n")
    assert names(tmp_path / "three.txt") == ["Schleie", "Retriever", "Katze"]
    (tmp_path / "three.json").write_text(json.dumps(dict(zip(SYNSETS, ["Katze", "Schleie", "Retriever"]))))
    assert names(tmp_path / "three.json") == ["Schleie", "Retriever", "Katze"]
    (tmp_path / "two.json").write_text('["a", "b"]')
    with pytest.raises(ValueError, match="classnames: expected a name for each of the 3 folders of .*, got 2"):
        names(tmp_path / "two.json")
    (tmp_path / "few.json").write_text('{"n02123045": "a", "x": "b"}')
    with pytest.raises(ValueError, match="got none for 'n01440764'"):
        names(tmp_path / "few.json")
    (imagenet / "n99999999_x").mkdir()
    with pytest.raises(ValueError, match="expected a name for each of the 4 folders"):
        evaluation.named(data.held_out(str(imagenet)), *evaluation.class_names("imagenet"))
    assert data.held_out(str(imagenet)).classes.names[-1] == "n99999999 x"


def test_the_layout_of_clip_benchmark(tmp_path):
    for split, count in (("test", 2), ("train", 1)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "nshards.txt").write_text(f"{count}\n")
        for shard in range(count):
            write(tmp_path / split / f"{shard}.tar", [(f"{split}{shard}", {"webp": png(form="WEBP"), "cls": b"1"})])
    (tmp_path / "classnames.txt").write_text("a cat\n\nthe dog\n")
    found = data.held_out(str(tmp_path))
    assert found.classes.names == ["a cat", "", "the dog"]  # a class's number is that of its line
    assert found.classes.templates is None
    assert [entry.key for entry in entries(tmp_path)] == ["test0", "test1"]
    assert [entry.key for entry in entries(tmp_path / "test")] == ["test0", "test1"]
    assert [entry.key for entry in entries(f"{tmp_path}#train")] == ["train0"]
    assert evaluation.named(found, ["x", "y"], None).classes.names == ["x", "y"]
    (tmp_path / "test" / "nshards.txt").write_text("many")
    with pytest.raises(ValueError, match="nshards.txt: expected the number of shards, got 'many'"):
        data.held_out(str(tmp_path))
    (tmp_path / "train" / "nshards.txt").write_text("2")
    with pytest.raises(ValueError, match="1.tar', which does not exist"):
        data.held_out(f"{tmp_path}#train")
    (tmp_path / "dataset_type.txt").write_text("multilabel")
    with pytest.raises(ValueError, match="expected retrieval or classification, got 'multilabel'"):
        data.held_out(f"{tmp_path}#train")


def test_names_of_classes(tmp_path):
    names, synsets = evaluation.class_names("imagenet")
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    assert len(synsets) == 1000
    assert dict(zip(synsets, names))["n01440764"] == "tench"
    assert evaluation.class_names(None) == (None, None)
    with pytest.raises(FileNotFoundError, match="classnames: expected imagenet or a file of names, got 'gone.txt'"):
        evaluation.class_names("gone.txt")
    for text, message in (('["a", 3]', "a list of strings"), ("{", "Expecting"), ('["a"]', "at least two names, got 1")):
        (tmp_path / "n.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluation.class_names(tmp_path / "n.json")


def test_phrases_around_names(tmp_path):
    assert evaluation.phrases(["openai"]) == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert evaluation.phrases("simple") == [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    (tmp_path / "t.txt").write_text("a {c}\nthe {} here\n")
    assert evaluation.phrases(["{}", str(tmp_path / "t.txt")]) == ["{}", "a {}", "the {} here"]
    for bad in ("openia", "{} {}", "{x}", "{} }"):
        with pytest.raises(ValueError, match="template: expected a phrase with one {} for the label, openai, simple, or"):
            evaluation.phrases([bad])
    with pytest.raises(FileNotFoundError, match="gone.txt"):
        evaluation.phrases(["gone.txt"])


def test_labels_need_names(tmp_path):
    rows = [(f"k{i}", {"png": png(i), "cls": str(i).encode()}) for i in range(3)]
    split = retrieval.Split(data.held_out(write(tmp_path / "s.tar", rows)), None, lambda image: torch.zeros(3, 2, 2))
    list(split.read(3))
    split.image_features = torch.eye(3)
    for names, message in ((None, "the number 0, and no names"), (["a", "b"], "2 of 2 classes")):
        split.data.classes = Classes(names)
        with pytest.raises(ValueError, match=f"classnames: expected a name for each label of .*{message}"):
            evaluation.zero_shot(None, split, ["{}"], torch.device("cpu"), "fp32")
