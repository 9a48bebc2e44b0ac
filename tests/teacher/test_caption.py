"""Synthetic captions: the json of a sample, the drawing of tokens, crashes, and one error for bad
input.
"""

import hashlib
import json
from collections import Counter

import open_clip
import pytest
import torch

from simplclip import data, models
from simplclip.teacher import caption
from support.data.pairs import joined, members, meta, png, sample, write
from support.models.captioners import CONTEXT, NAME, build, register
from support.programs import call, one_line

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory):
    register(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="module")
def coca(registered):
    return build()


@pytest.fixture(scope="module")
def weights(tmp_path_factory, coca):
    path = tmp_path_factory.mktemp("weights") / "coca.pt"
    torch.save({"state_dict": coca.state_dict()}, path)
    return path


def generate(model, images, draws, top_p=1.0, temperature=1.0):
    return caption.generate(
        model, images, draws, caption.tokenizer_of(NAME), top_p=top_p, temperature=temperature
    )


def uniform(*shape):
    return torch.rand(*shape, CONTEXT, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Writes two shards; the second has captions in txt only."""
    folder = tmp_path_factory.mktemp("in")
    write(folder / "train-0.tar", [sample(i) for i in range(5)])
    in_txt = [(f"t{i}", {"png": png(i), "txt": f" it is {i}\n".encode()}) for i in range(3)]
    write(folder / "train-1.tar", in_txt)
    return folder


@pytest.fixture(scope="module")
def captioned(source, weights, tmp_path_factory):
    """Captions the source, two captions for each image; returns the folder and the summary."""
    out = tmp_path_factory.mktemp("captioned")
    return out, run(source / "*.tar", out, weights)


def run(source, out, weights, **options):
    sampling = caption.Sampling(n=2, max_tokens=CONTEXT, seed=options.pop("seed", 0))
    options = {"batch_size": 4, "progress": False} | options
    return caption.run(str(source), out, NAME, sampling, checkpoint=weights, **options)


def records(folder):
    records = {}
    for path in folder.glob("*.tar"):
        for name, content in members(path).items():
            assert name.endswith(".json")
            records[name.removesuffix(".json")] = json.loads(content)
    return records


@pytest.mark.slow
def test_captions_come_after_the_samples_own(source, captioned, weights):
    out, summary = captioned
    written, before = records(out), joined(source / "*.tar")
    assert written.keys() == before.keys()
    # with 49,408 tokens, no two captions are equal
    assert (summary["samples"], summary["captions"]) == (8, 16)
    for key, record in written.items():
        own = before[key].captions
        assert record["captions"][: len(own)] == own
        assert record["synthetic"] == len(record["captions"]) - len(own) == 2
        assert all(
            text == " ".join(text.split()) and "_of_text" not in text for text in record["captions"]
        )
        assert len(set(record["captions"])) == len(record["captions"])
        assert record.get("group") == (int(key[1:]) // 2 if key[0] == "k" else None)
    for key, pair in joined(source / "*.tar", out).items():
        assert pair.captions == written[key]["captions"]
        assert pair.encoded == before[key].encoded
    about = meta(out)["caption"]
    assert about["model"] == NAME
    assert about["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert data.dataset_size(str(out / "*.tar")) == 8


def test_duplicates_and_empty_captions_are_dropped():
    counts = Counter()
    own, drawn = ["A red  Cat", "ß"], ["a red cat", "", "a dog", "A DOG", "SS", "ein Hund"]
    record = caption.joined_record({"label": "x", "captions": [*own, 3]}, own, drawn, counts)
    captions = ["A red  Cat", "ß", "a dog", "ein Hund"]
    assert json.loads(record) == {"label": "x", "captions": captions, "synthetic": 2}
    assert counts == {"captions": 2, "duplicate": 3, "empty": 1}


@pytest.mark.slow
def test_a_caption_depends_on_seed_and_sample_alone(source, captioned, weights, tmp_path):
    """It does not depend on the batch, on other shards, on workers, or on the global generator."""
    torch.manual_seed(9)
    run(source / "train-0.tar", tmp_path / "a", weights, batch_size=1, workers=2)
    run(source / "train-0.tar", tmp_path / "b", weights, seed=1)
    first = records(captioned[0])
    second = records(tmp_path / "a")
    other = records(tmp_path / "b")
    assert all(first[key] == second[key] != other[key] for key in second)
    write(tmp_path / "twins.tar", [(key, {"png": png(), "txt": b"x"}) for key in ("k1", "k2")])
    run(tmp_path / "twins.tar", tmp_path / "c", weights)
    first, second = records(tmp_path / "c").values()
    assert first != second


@pytest.mark.slow
def test_the_likeliest_tokens(coca):
    """With a tiny top_p each token is the likeliest one after the tokens before it, by the whole
    model.
    """
    images = torch.randn(3, 3, 32, 32)
    tokenizer = caption.tokenizer_of(NAME)
    tokens = generate(coca, images, torch.rand(3, 2, CONTEXT).double(), top_p=1e-9, temperature=0.7)
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    assert not torch.equal(tokens[0], tokens[1])  # the image makes a difference
    for image, row in zip(images, tokens[:, 0]):
        assert row[0] == tokenizer.sot_token_id
        assert row[-1] == tokenizer.eot_token_id
        for t in range(1, CONTEXT - 1):
            with torch.no_grad():
                logits = coca(image[None], row[None, :t], output_labels=False)["logits"][0, -1]
            logits[tokenizer.sot_token_id] = -torch.inf
            assert row[t] == logits.argmax()


def test_draws_follow_the_restricted_softmax():
    logits = torch.tensor([2.0, -1.0, 1.0, 0.0, 1.5]).log_softmax(0)
    order = logits.argsort(descending=True).tolist()
    uniform = (torch.arange(20000).double() + 0.5) / 20000
    for top_p, kept in ((1e-9, 1), (0.6, 2), (0.9, 3), (1.0, 5)):
        drawn = caption._draw(logits.expand(20000, -1), uniform, top_p)
        share = torch.bincount(drawn, minlength=5) / 20000
        p = torch.zeros(5)
        p[order[:kept]] = logits.exp()[order[:kept]]
        assert (share - p / p.sum()).abs().max() < 2e-4
    for u, token in ((0.0, order[0]), (1 - 2**-53, order[-1])):
        assert caption._draw(logits[None], torch.tensor([u]).double(), 1.0).item() == token


@pytest.mark.slow
def test_captions_end_where_the_model_ends_them():
    model = build()
    end, start = 49407, 49406
    # equal probabilities at every place: a quarter for the end, much for the start
    logits = torch.tensor([1500.0, 1500, 1500, 1500, 1600])
    with torch.no_grad():
        model.text_decoder.ln_final.weight.zero_()
        model.text_decoder.ln_final.bias.fill_(1)
        model.text_decoder.text_projection.fill_(-100)
        model.text_decoder.text_projection[0, [end, 5, 6, 7, start]] = logits
    images, draws = torch.randn(4, 3, 32, 32), uniform(4, 12)
    tokens = generate(model, images, draws)
    body = tokens[..., 1:].flatten(0, 1)
    ended = (body == end).cumsum(-1) > 0
    assert (body[ended] == end).all()
    assert set(body[~ended].tolist()) == {5, 6, 7}
    lengths = (~ended).sum(-1)
    assert lengths.min() == 0
    assert lengths.max() == CONTEXT - 2
    assert 0.1 < (lengths == 0).float().mean() < 0.4
    hot = generate(model, images[:1], draws[:1], temperature=1e6)
    assert not set(hot[..., 1:].flatten().tolist()) <= {5, 6, 7, end}
    assert "" in caption.decode(tokens[0].tolist(), caption.tokenizer_of(NAME))


@pytest.mark.slow
def test_captions_that_go_on_are_not_disturbed_by_those_that_ended():
    model = build()
    # about a quarter for the end at every place; other tokens depend on the image
    with torch.no_grad():
        model.text_decoder.ln_final.bias.fill_(1)
        model.text_decoder.text_projection[:, 49407] = 11 / 16
    images, draws = torch.randn(3, 3, 32, 32), uniform(3, 6)
    tokens = generate(model, images, draws)
    assert (tokens == 49407).sum(-1).unique().numel() > 4
    for i in range(3):
        alone = generate(model, images[i : i + 1], draws[i : i + 1, 3:5])
        assert torch.equal(alone[0], tokens[i, 3:5])
    assert not torch.equal(generate(model, images.flip(0), draws), tokens)


def test_a_hub_that_cannot_be_reached_is_one_line(source, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise RuntimeError("Failed to download\nthe weights")

    monkeypatch.setattr(open_clip, "create_model", offline)
    tag = "laion2b_s13b_b90k"
    command = ("caption", source / "train-0.tar", "--out", tmp_path / "out", "--pretrained", tag)
    failed = f"pretrained: open_clip could not get coca_ViT-B-32/{tag}: Failed to download; or name"
    assert failed in one_line(*command)


@pytest.mark.slow
def test_command(source, weights, tmp_path):
    def tiny(weights=weights):
        return "--model", NAME, "--checkpoint", weights, "--max-tokens", 12

    options, out, command = tiny(), tmp_path / "other", ("caption", source / "train-0.tar", "--out")
    result = call(*command, tmp_path / "out", *options, "--n", 1)
    assert result.exit_code == 0, result.output
    assert "5 new captions; dropped 0 duplicates and 0 empty ones" in result.output
    assert "wrote 0 of 1 sidecars" in call(*command, tmp_path / "out", *options, "--n", 1).output

    (tmp_path / "text.pt").write_text("no weights")
    torch.save(models.create(f"open_clip:{NAME}-wide").state_dict(), tmp_path / "wide.pt")
    state = torch.load(weights, weights_only=True)["state_dict"]
    nan = {name: torch.full_like(value, torch.nan) for name, value in state.items()}
    torch.save(nan, tmp_path / "nan.pt")
    no_coca = ("--model", "ViT-B-32", "--checkpoint", weights)
    tags = "pretrained: expected a tag of coca_ViT-B-32, one of laion2b_s13b_b90k, "
    cases = {
        "model: expected a CoCa model of open_clip, such as coca_": (out, *no_coca),
        "expected a file or a tag with the weights of coca_ViT-B-32, got neither": (out,),
        "got both": (out, *options, "--pretrained", "x"),
        tags: (out, "--pretrained", "x"),
        "checkpoint: expected a file of weights": (out, *tiny(tmp_path / "text.pt")),
        "wide.pt: Missing key(s)": (out, *tiny(tmp_path / "wide.pt")),
        "max_tokens: expected 3 to 12, the context of": (out, *options, "--max-tokens", 13),
        "top_p: expected a share above 0, up to 1, got 1.5": (out, *options, "--top-p", 1.5),
        "temperature: expected a number above 0, got 0.0": (out, *options, "--temperature", 0),
        "n was 1, now 2": (tmp_path / "out", *options, "--n", 2),
    }
    for message, arguments in cases.items():
        assert message in one_line(*command, *arguments)
        assert not out.exists()
    line = one_line(*command, out, *tiny(tmp_path / "nan.pt"))
    assert "checkpoint: expected a model with finite logits, got" in line
    assert not list(out.glob("*.tar"))
