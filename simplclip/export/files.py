"""Exports a checkpoint of the trainer as open_clip's state dict, as safetensors and as ONNX of each tower.

    open_clip     open_clip_pytorch_model.pt: {"state_dict": ...}, as open_clip writes it
    safetensors   open_clip_model.safetensors: the same tensors without pickle. A matrix that blocks share is stored under
                  each of its names, so that every reader can load the file strictly
    onnx          image.onnx: pixel_values float32 [B, 3, S, S] -> image_features float32 [B, D]
                  text.onnx: input_ids int64 [B, L] -> text_features float32 [B, D]
                  Features are normalised, B is dynamic, all operators are standard ONNX, and branches and batch norms are
                  folded into the layers before them

`open_clip.load_checkpoint` and `models.create(name, checkpoint=...)` read the first two. export.json describes
the export. It is written last, so that an export with it is complete.
"""

import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.model import get_model_preprocess_cfg
from open_clip.utils import to_2tuple
from safetensors.torch import save
from torch import nn

import simplclip
from simplclip import models
from simplclip.common.errors import InputError
from simplclip.common.files import HOUR, identity, remove_leftovers, temporary_folder, write_atomically
from simplclip.evaluation.encoder import EXPORT as SUMMARY
from simplclip.export import onnx_towers
from simplclip.train.state import load_model, model_options

FORMATS = ("open_clip", "safetensors", "onnx")
_PHRASES = ("a cat", "a photo of two dogs on a beach", "red, green and blue")


def run(
    checkpoint: str | Path, out: str | Path, *, formats: Sequence[str] = FORMATS, force: bool = False, trust: bool = False
) -> dict[str, Any]:
    """Export `checkpoint`, a file or the folder of a run, to the folder `out`, and return the content of export.json.

    formats: names out of FORMATS. force: replace an existing export in `out`. trust: as for `simplclip.load`.

    `out` does not change before all files are written and checked. A process that is killed while it moves them leaves a
    folder without export.json.

    Raises: FileNotFoundError, CheckpointError (not a checkpoint, or of another architecture), FileExistsError (`out` has an
    export), ValueError (an unknown format), ExportError (a tower cannot be exported to ONNX, or its export computes other
    values), ModuleNotFoundError (a package of the extra `export` is missing).
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
    model, config, state = load_model(checkpoint, trust=trust)

    remove_leftovers(out.parent, out.name.__eq__, HOUR)
    with temporary_folder(out) as work:
        tokenizer = models.tokenizer(
            config.model.name, config.model.shape("context_length")
        )  # a tokenizer class, or the function of minilm_tokenizer
        # Of each tower three inputs: noise, and token ids.
        size, noise = to_2tuple(model.visual.image_size), torch.Generator().manual_seed(0)
        samples = {"image": torch.randn(len(_PHRASES), 3, *size, generator=noise), "text": tokenizer(list(_PHRASES))}
        answer = {
            "model": config.model.name,
            "options": model_options(config),
            "step": state["step"],
            "checkpoint": str(checkpoint),
            "versions": {"simplclip": simplclip.__version__, "torch": torch.__version__},
            "embed_dim": model.encode_image(samples["image"][:1]).shape[1],
            "logit_scale": model.logit_scale.exp().item(),
            "logit_bias": None if getattr(model, "logit_bias", None) is None else model.logit_bias.item(),
            "preprocess": get_model_preprocess_cfg(model),
            "tokenizer": {
                "name": getattr(tokenizer, "__qualname__", type(tokenizer).__name__).partition(".")[0],
                "context_length": samples["text"].shape[1],
                "vocab_size": getattr(model, "text", model).vocab_size,
            },
        }
        if "open_clip" in formats:
            torch.save({"state_dict": model.state_dict()}, work / "open_clip_pytorch_model.pt")
        if "safetensors" in formats:
            _save_safetensors(model, answer, work / "open_clip_model.safetensors")
        if "onnx" in formats:
            answer["onnx"] = {
                tower: onnx_towers.export(model, tower, inputs, work / f"{tower}.onnx") for tower, inputs in samples.items()
            }
        names = sorted(path.name for path in work.iterdir())
        for name in names:
            with open(work / name, "rb+") as file:
                os.fsync(file.fileno())
        answer["files"] = {name: identity(work / name) for name in names}
        out.mkdir(parents=True, exist_ok=True)
        former = _files_of(out / SUMMARY)
        (out / SUMMARY).unlink(missing_ok=True)
        for name in names:
            os.replace(work / name, out / name)
        for name in former - set(names):
            (out / name).unlink(missing_ok=True)
        write_atomically(out / SUMMARY, json.dumps(answer, indent=2) + "\n")

    for name, entry in answer["files"].items():
        tower = answer.get("onnx", {}).get(name.removesuffix(".onnx"))
        error = f", largest error {max(tower['max_abs_error'].values()):.1e}" if tower else ""
        print(f"wrote {out / name}: {entry['bytes']:,} bytes{error}")
    print(f"wrote {out / SUMMARY}")
    return answer


def _save_safetensors(model: nn.Module, about: dict[str, Any], path: Path) -> None:
    # The format has neither shared memory nor strides.
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    metadata = {"format": "pt", **{key: str(about[key]) for key in ("model", "step")}}
    metadata |= {key: json.dumps(about[key]) for key in ("options", "preprocess")}
    path.write_bytes(save(tensors, metadata))  # save_file would make the file readable by its owner only


def _files_of(summary: Path) -> set[str]:
    """The names of the files of an existing export; none if it cannot be read."""
    try:
        return {Path(name).name for name in json.loads(summary.read_text("utf-8"))["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return set()
