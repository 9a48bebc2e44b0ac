"""Checkpoints, runs, exports and configs from elsewhere: refused in one line; none runs code."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import simplclip
from simplclip.common.errors import InputError
from simplclip.models.trained import build_model
from simplclip.train import config
from support.programs import call, one_line
from support.train import tiny
from support.train.runs import go

CANARY = Path("canary").absolute()


class Payload:
    """An object whose pickle makes the canary when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch canary",)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a run of siclip-tiny without training, and the shard that the run names."""
    folder = tmp_path_factory.mktemp("made")
    settings = tiny.settings(folder)
    state = {"format": "simplclip", "version": 1, "step": 3, "config": settings.to_dict()}
    weights = build_model(settings.model.model_dump()).state_dict()
    return state | {"model": weights, "shard": str(folder / "data" / "train-0.tar")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trains a run."""
    folder = tmp_path_factory.mktemp("whole")
    go(tiny.settings(folder))
    return folder


def saved(state, path="run/last.pt"):
    Path(path).parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return path


def changed(state, key, value):
    """Returns a copy of a checkpoint with one value of its config changed."""
    values = json.loads(json.dumps(state["config"]))
    *sections, last = key.split(".")
    node = values
    for section in sections:
        node = node[section]
    node[last] = value
    return state | {"config": values}


def pickled(state, protocol=2):
    os.makedirs("run")
    Path("run/last.pt").write_bytes(pickle.dumps(Payload(), protocol))


def cut(state):
    data = Path(saved(state)).read_bytes()
    Path("run/last.pt").write_bytes(data[: len(data) // 2])


def option(**options):
    return lambda state: saved(changed(state, "model.options", options))


def beside(state):
    """Saves options that make open_clip unpickle a file beside the checkpoint."""
    os.makedirs("run")
    Path("run/evil.pt").write_bytes(pickle.dumps(Payload(), 2))
    options = {"pretrained": "run/evil.pt", "weights_only": False}
    saved(changed(changed(state, "model.name", "open_clip:RN50"), "model.options", options))


# how a checkpoint is written, or what is changed in it, and the message
CHECKPOINTS = {
    "code in a pickle": (pickled, "its pickle does more than store tensors"),
    "cut short": (cut, "expected a file of weights, got run/last.pt: "),
    "no checkpoint": (
        lambda s: Path(saved(s)).write_bytes(b"\0" * 1000),
        "expected a file of weights, got run",
    ),
    "other weights": ({"model": {"x": torch.zeros(1)}}, "expected weights of 'siclip-tiny'"),
    "no config": ({"config": None}, "with a config and weights"),
    "a newer version": ({"version": 99}, "maybe of a newer simplclip"),
    "an unknown model": (
        lambda s: saved(changed(s, "model.name", "hf-hub:x/y")),
        "name: expected one of",
    ),
    "options that unpickle a file": (
        beside,
        "expected options of open_clip:RN50, got .*unexpected keyword argument 'pretrained'",
    ),
    "an option that names a repository": (
        option(vision_cfg={"timm_model_name": "hf-hub:x/y"}),
        "got model.options.vision_cfg.timm_model_name = 'hf-hub:x/y'",
    ),
    "an option of transformers": (
        option(text_cfg={"hf_model_name": "x/y"}),
        "got model.options.text_cfg.hf_model_name",
    ),
}


@pytest.mark.parametrize(("make", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_is_refused_in_a_line(made, make, message):
    if callable(make):
        make(made)
    else:
        saved(made | make)
    line = one_line("evaluate", "run", "--data", made["shard"])
    assert re.search(message, line)
    assert "run" in line
    assert len(line) < 600


# keys of a run's checkpoint -> in the message
RESUMED: dict[str, tuple[dict[str, Any], str]] = {
    "frozen numbers": ({"frozen": [1]}, "expected modules or parameters of the model"),
    "no optimizer": ({"optimizer": None}, "expected the state of this model's AdamW"),
    "no state of the loss": ({"loss": 5}, "expected the state of this model's ClipPMLoss"),
}


RESUME = ("--resume", "--set", "run.out=run", "--set", "run.steps=9")


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "message"), RESUMED.values(), ids=RESUMED)
def test_a_run_is_not_continued_from_other_values(whole, keys, message):
    saved(torch.load(whole / "run/last.pt", weights_only=True) | keys)
    assert message in one_line("train", whole / "config.yaml", *RESUME)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3,), (1,)])
def test_no_moments_of_another_shape_are_read_beyond_their_end(whole, shape):
    state = torch.load(whole / "run/last.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(shape)
    saved(state)
    message = f"expected the state of this model's AdamW, got exp_avg of shape {list(shape)} for ["
    assert message in one_line("train", whole / "config.yaml", *RESUME)


CONFIGS = {
    "an object of Python": (
        b"run: !!python/object/apply:os.system ['touch canary']",
        "not valid YAML: could not determine",
    ),
    "escape sequences": (b'"\\e[31m": 1', "unknown key"),
}


@pytest.mark.parametrize(("content", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused_in_a_line(content, message):
    Path("c.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        config.load("c.yaml")
    output = call("train", "c.yaml").output
    assert message in output
    assert "\x1b" not in output
    assert "Traceback" not in output


def exported(**changes):
    Path("export").mkdir()
    about = {"model": "siclip-tiny", "options": tiny.MODEL, "step": 1}
    Path("export/export.json").write_text(json.dumps(about | changes))


def test_an_export_unpickles_nothing():
    exported()
    Path("export/w.pt").write_bytes(pickle.dumps({"state_dict": Payload()}, 2))
    os.link("export/w.pt", "export/open_clip_model.safetensors")
    Path("x.tar").touch()
    line = one_line("evaluate", "export", "--data", "x.tar")
    assert "expected a file of weights, got export/open_clip_model." in line


def test_weights_that_run_code_are_refused_without_torchs_advice_to_run_it(made):
    torch.save({"state_dict": {"a": Payload()}}, "w.pt")
    settings = tiny.write_config(Path.cwd())
    shard, weights = made["shard"], ("--checkpoint", "w.pt")
    for arguments in (
        ("evaluate", "w.pt", "--data", shard),
        ("teacher", shard, "--out", "t", "--teacher", "open_clip:ViT-S-32", *weights),
        ("train", settings, "--set", "inherit.source=w.pt"),
    ):
        assert one_line(*arguments).endswith("more than store tensors")


def test_an_export_reads_its_own_weights_alone():
    exported(options={"pretrained": "w.pt", "weights_only": False})
    save_file({"x": torch.zeros(1)}, "export/open_clip_model.safetensors")
    with pytest.raises(InputError, match="unexpected keyword argument 'pretrained'"):
        simplclip.load("export")
