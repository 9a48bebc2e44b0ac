"""Exports: open_clip and this library load the model back, and no export is left half-written."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import simplclip
from simplclip import export
from simplclip.models.trained import read_checkpoint
from support.data.pairs import digests
from support.models.exported_models import HF, TIMM, VIT
from support.programs import call, forked, one_line
from support.train.runs import save_run

pytestmark = pytest.mark.long


WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
FILES = {CONFIG, WEIGHTS, "export.json", "README.md", "preprocessing.json"}


class Exported(NamedTuple):
    model: nn.Module
    run: Path  # the folder of the checkpoint
    out: Path
    summary: dict


def export_of(folder, name, **options):
    run, out = folder / "run", folder / "export"
    model = save_run(run, name, **options)
    return Exported(model, run, out, export.run(run, out))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return export_of(tmp_path_factory.mktemp("tiny"), "siclip-tiny")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return export_of(tmp_path_factory.mktemp("vit"), f"open_clip:{VIT}", init_logit_bias=-5.0)


def assert_same(model, other):
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def printed_lines(printed, model):
    """Runs the lines that load an export, and returns them with the names that they set."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    names = {"simplclip": simplclip}
    exec("\n".join(lines), names)
    assert_same(model, names["model"])
    assert_same(model, names["encoder"].model)
    return lines, names


@pytest.mark.slow
def test_the_summary_says_what_was_exported(tiny):
    _, run, out, summary = tiny
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(summary))
    found = summary["model"], summary["step"], summary["checkpoint"]
    assert found == ("siclip-tiny", 7, str(run))
    assert {p.name for p in out.iterdir()} == FILES
    with safe_open(out / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt", "model": "siclip-tiny", "step": "7"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tiny", "vit"])
def test_the_printed_lines_load_the_export(which, request, tmp_path, capsys):
    """Plain open_clip loads a plain model; a simplified one needs the lines of register_models."""
    model, run, *_ = request.getfixturevalue(which)
    export.run(run, tmp_path / 'a "b"\\n é')
    lines, names = printed_lines(capsys.readouterr().out, model)
    assert ("register_models()" in lines) == (which == "tiny")
    assert names["tokenizer"](["a"]).shape == names["encoder"].tokenizer(["a"]).shape


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 160], ids=["other-size", "own-size"])
def test_the_printed_lines_load_a_timm_trunk_of_another_size(size, tmp_path, capsys):
    """open_clip alone makes timm's trunk in its own size, whose position embeddings do not fit."""
    model = save_run(tmp_path, f"open_clip:{TIMM}", vision_cfg={"image_size": size})
    export.run(tmp_path, tmp_path / "out")
    lines, names = printed_lines(capsys.readouterr().out, model)
    assert ("register_models()" in lines) == (size != 160)
    pixels = names["preprocess"](Image.new("RGB", (50, 40)))[None]
    assert pixels.shape == (1, 3, size, size)
    assert names["model"].eval().encode_image(pixels).shape == (1, 16)


def test_a_run_of_other_pixels_keeps_them(tmp_path):
    """In the run, in its export, and in open_clip."""
    pixels = {"mean": [0.0, 0.25, 0.5], "std": [1.0, 1.0, 0.5]}
    save_run(tmp_path / "run", f"open_clip:{VIT}", preprocess=pixels)
    export.run(tmp_path / "run", tmp_path / "out")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for source in ("run", "out"):
        preprocess = simplclip.load(tmp_path / source, device="cpu").preprocess
        assert ([*preprocess.mean], [*preprocess.std]) == (pixels["mean"], pixels["std"])
    assert (theirs.transforms[-1].mean, theirs.transforms[-1].std) == (*pixels.values(),)


@pytest.mark.slow
def test_preprocessing_says_how_to_make_the_inputs(tiny, tmp_path):
    about = json.loads((tiny.out / "preprocessing.json").read_text())
    encoder = simplclip.load(tiny.out, device="cpu")
    assert (*about["image"]["size"],) == encoder.preprocess.size
    assert (*about["image"]["mean"],) == encoder.preprocess.mean
    assert (*about["image"]["std"],) == encoder.preprocess.std
    assert about["text"] == {
        "context_length": encoder.tokenizer(["a"]).shape[1],
        "tokenizer": type(encoder.tokenizer).__name__,
    }
    save_run(tmp_path / "hf", f"open_clip:{HF}")
    export.run(tmp_path / "hf", tmp_path / "out")
    about = json.loads((tmp_path / "out/preprocessing.json").read_text())
    assert about["text"]["tokenizer"] == "tokenizer.json"
    assert (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.prove
@pytest.mark.parametrize("which", ["tiny", "vit"])
def test_an_export_on_a_hub_loads_by_its_name(which, request, tmp_path):
    """A process without network loads an export from the hub's cache, as a download leaves it."""
    exported = request.getfixturevalue(which)
    cache = tmp_path / "hub/models--owner--name"
    shutil.copytree(exported.out, cache / "snapshots/abc")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    lines = ["import open_clip, torch"]
    if which == "tiny":
        lines += ["from simplclip.integrations import open_clip as ours", "ours.register_models()"]
    lines += [
        "model, _, preprocess = open_clip.create_model_and_transforms('hf-hub:owner/name')",
        "assert open_clip.get_tokenizer('hf-hub:owner/name')(['a']).ndim == 2",
        f"torch.save(model.state_dict(), {str(tmp_path / 'loaded.pt')!r})",
    ]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["HF_HUB_CACHE"] = str(tmp_path / "hub")
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, env=environment)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=True)
    torch.testing.assert_close(loaded, dict(exported.model.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_an_export_is_kept_unless_forced(tiny, tmp_path, monkeypatch):
    """The folder is a link to another file system, to which files beside the link do not rename."""
    (tmp_path / "disk").mkdir()
    out = tmp_path / "out"
    out.symlink_to("disk")

    def replace(source, target, replace=os.replace):
        if Path(source).parents[1].resolve() != Path(target).parent.resolve():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(export.os, "replace", replace)
    (out / ".gitattributes").write_text("")
    export.run(tiny.run, out)
    (out / "notes.txt").write_text("mine")
    message = "out: expected an empty folder, or with --force one with an export to replace, got"
    with pytest.raises(FileExistsError, match=message):
        export.run(tiny.run, out)
    (out / WEIGHTS).write_text("damaged")
    export.run(tiny.run, out, force=True)
    assert {p.name for p in out.iterdir()} == FILES | {"notes.txt", ".gitattributes"}
    assert_same(tiny.model, simplclip.load(out, device="cpu").model)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        export.run(tiny.run, tmp_path / "file", force=True)


@pytest.mark.slow
def test_no_export_is_written_into_a_folder_of_other_files(tiny, tmp_path):
    (tmp_path / "README.md").write_text("my card")
    (tmp_path / "a.jpg").write_bytes(b"")
    for options in ((), ("--force",)):
        line = one_line("export", tiny.run, "--out", tmp_path, *options)
        assert (
            "out: expected an empty folder, or with --force one with an export to replace" in line
        )
        assert line.endswith("with 'a.jpg'")
    assert len([*tmp_path.iterdir()]) == 2
    (tmp_path / "a.jpg").unlink()
    export.run(tiny.run, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my card"
    (tmp_path / "export.json").unlink()  # as if it had been interrupted
    assert "with --force" in one_line("export", tiny.run, "--out", tmp_path)
    export.run(tiny.run, tmp_path, force=True)
    assert simplclip.load(tmp_path).step == 7


@pytest.mark.slow
def test_command(tiny, tmp_path):
    result = call("export", tiny.run / "last.pt", "--out", tmp_path / "a/b")
    assert result.exit_code == 0, result.output
    assert "open_clip_model.safetensors" in result.output
    assert {p.name for p in (tmp_path / "a/b").iterdir()} == FILES
    state = read_checkpoint(tiny.run)
    state["config"]["model"]["options"] = {"embed_dim": 64}
    torch.save(state, tmp_path / "other.pt")
    line = one_line("export", tmp_path / "other.pt", "--out", tmp_path / "c")
    assert "expected weights of 'siclip-tiny'" in line
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_a_closed_pipe_leaves_a_whole_export(tiny, tmp_path, monkeypatch):
    """As `simplclip export ... | head -1`."""

    def closed(text):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        export.run(tiny.run / "last.pt", tmp_path / "out")
    assert (tmp_path / "out" / "export.json").exists()


@pytest.mark.slow
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
