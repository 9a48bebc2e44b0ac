"""Exports a checkpoint of the trainer as a folder that open_clip loads, and as ONNX of each tower.

    open_clip     open_clip_config.json, open_clip_model.safetensors, and the files of a tokenizer of Hugging Face, for
                  `open_clip.create_model_and_transforms("local-dir:FOLDER")` after `integrations.open_clip.register_models`.
                  A matrix that blocks share is stored under each of its names, so that every reader can load it strictly
    onnx          image.onnx: pixel_values float32 [B, 3, S, S] -> image_features float32 [B, D]
                  text.onnx: input_ids int64 [B, L] -> text_features float32 [B, D]
                  Features are normalised, B is dynamic, all operators are standard ONNX, and branches and batch norms are
                  folded into the layers before them

`simplclip.load(FOLDER)` and `models.create(name, checkpoint=FILE)` read the weights, too. export.json describes the
export. It is written last, so that an export with it is complete.
"""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.model import get_model_preprocess_cfg, get_model_tokenize_cfg
from open_clip.utils import to_2tuple
from safetensors.torch import save
from torch import nn

import simplclip
from simplclip import models
from simplclip.common.errors import InputError
from simplclip.common.files import HOUR, identity, remove_leftovers, temporary_folder
from simplclip.evaluation.encoder import EXPORT as SUMMARY
from simplclip.export import onnx_towers
from simplclip.models.registry import configuration
from simplclip.models.trained import base_of, load_model, model_options

FORMATS = ("open_clip", "onnx")
_PHRASES = ("a cat", "a photo of two dogs on a beach", "red, green and blue")


def run(checkpoint: str | Path, out: str | Path, *, formats: Sequence[str] = FORMATS, force: bool = False) -> dict[str, Any]:
    """Exports `checkpoint`, a file or the folder of a run, to the folder `out`, and returns the content of export.json.

    formats: names out of FORMATS. force: replace an existing export in `out`.

    `out` does not change before all files are written and checked. A process that is killed while it moves them leaves a
    folder without export.json.

    Raises: FileNotFoundError, CheckpointError (not a checkpoint, or of another architecture), FileExistsError (`out` has an
    export), ValueError (an unknown format), OSError (the disk is full), ExportError (a tower cannot be exported to ONNX, or
    its export computes other values), ModuleNotFoundError (a package of the extra `export` is missing).
    """
    out, formats = Path(out), list(dict.fromkeys(formats or FORMATS))
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    for module in ("onnx", "onnxscript", "onnxruntime") if "onnx" in formats else ():
        importlib.import_module(module)  # before anything is written
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, got the file {out}")
    if (out / SUMMARY).exists() and not force:
        raise FileExistsError(f"out: expected a folder without an export, got {out}; --force replaces the export")
    model, config, state = load_model(checkpoint)

    remove_leftovers(out.parent, out.name.__eq__, HOUR)
    try:
        answer = _write(out, model, config, formats, {"step": state["step"], "checkpoint": str(checkpoint)})
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error  # the error for a full disk names no file
    for name, entry in answer["files"].items():
        tower = answer.get("onnx", {}).get(name.removesuffix(".onnx"))
        error = f", largest error {max(tower['max_abs_error'].values()):.1e}" if tower else ""
        print(f"wrote {out / name}: {entry['bytes']:,} bytes{error}")
    print(f"wrote {out / SUMMARY}")
    return answer


def _write(out: Path, model: Any, config: dict[str, Any], formats: list[str], source: dict[str, Any]) -> dict[str, Any]:
    """Writes the files beside `out`, moves them there, and returns the content of export.json, which includes `source`."""
    name, tokens = config["model"]["name"], get_model_tokenize_cfg(model)
    options = model_options(config["model"], base_of(config))
    tokenizer = models.tokenizer(name, tokens.get("context_length"))
    # Three inputs for each tower: noise and token ids.
    size, noise = to_2tuple(model.visual.image_size), torch.Generator().manual_seed(0)
    samples = {"image": torch.randn(len(_PHRASES), 3, *size, generator=noise), "text": tokenizer(list(_PHRASES))}
    answer = {
        "model": name,
        "options": options,
        **source,
        "versions": {"simplclip": simplclip.__version__, "torch": torch.__version__},
        "embed_dim": model.encode_image(samples["image"][:1]).shape[1],
        "logit_scale": model.logit_scale.exp().item(),
        "logit_bias": None if getattr(model, "logit_bias", None) is None else model.logit_bias.item(),
        "preprocess": get_model_preprocess_cfg(model),
        "tokenizer": {
            # The class of the tokenizer, or the function minilm_tokenizer that made it.
            "name": getattr(tokenizer, "__qualname__", type(tokenizer).__name__).partition(".")[0],
            "context_length": samples["text"].shape[1],
            "vocab_size": tokens.get("vocab_size"),
        },
    }
    with temporary_folder(out) as work:
        if "open_clip" in formats:
            about = {"model_cfg": _configuration(model, name, options), "preprocess_cfg": answer["preprocess"]}
            (work / "open_clip_config.json").write_text(json.dumps(about, indent=2) + "\n")
            _save_safetensors(model, answer, work / "open_clip_model.safetensors")
            if hasattr(tokenizer, "save_pretrained"):  # a tokenizer of Hugging Face, which open_clip reads from the folder
                tokenizer.save_pretrained(work)
        if "onnx" in formats:
            answer["onnx"] = {
                tower: onnx_towers.export(model, tower, inputs, work / f"{tower}.onnx") for tower, inputs in samples.items()
            }
        answer["files"] = {path.name: identity(path) for path in sorted(work.iterdir())}
        (work / SUMMARY).write_text(json.dumps(answer, indent=2) + "\n")
        for path in work.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        out.mkdir(parents=True, exist_ok=True)
        former = _files_of(out / SUMMARY)
        (out / SUMMARY).unlink(missing_ok=True)
        for name in (*answer["files"], SUMMARY):
            os.replace(work / name, out / name)
        for name in former - answer["files"].keys():
            (out / name).unlink(missing_ok=True)
    return answer


def _configuration(model: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns open_clip's configuration of the model before it was simplified, with a part "simplclip" from which
    `integrations.open_clip` makes the model. An unchanged model of open_clip needs no such part and has none."""
    ours = {key: options[key] for key in ("simplified", "simplify_options") if key in options}
    sizes = ("force_image_size", "force_context_length", "force_patch_dropout")
    rest = {key.removeprefix("force_"): value for key, value in options.items() if key not in (*ours, *sizes)}
    config = configuration(models.spec_of(name), rest)
    height, width = to_2tuple(model.visual.image_size)
    config["vision_cfg"]["image_size"] = height if height == width else [height, width]
    config["text_cfg"] |= get_model_tokenize_cfg(model)
    if name in models.names():
        config["simplclip"] = {"model": name, **ours}
    elif getattr(model, "simplify_report", None) is not None:
        config["simplclip"] = ours
    return config


def _save_safetensors(model: nn.Module, about: dict[str, Any], path: Path) -> None:
    # The format has neither shared memory nor strides.
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    metadata = {"format": "pt", **{key: str(about[key]) for key in ("model", "step")}}
    metadata |= {key: json.dumps(about[key]) for key in ("options", "preprocess")}
    path.write_bytes(save(tensors, metadata))  # save_file would make the file readable by its owner only


def _files_of(summary: Path) -> set[str]:
    """Returns the names of the files of an existing export; an empty set if its export.json cannot be read."""
    try:
        return {Path(name).name for name in json.loads(summary.read_text("utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
