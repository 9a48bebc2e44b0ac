"""Exports a checkpoint of the trainer as a folder that open_clip and `simplclip.load` read:

    open_clip_config.json, open_clip_model.safetensors, and the files of a tokenizer of Hugging Face
    README.md             a model card, see model_card.py; an existing one is kept, since its
                          licences are the user's to write
    preprocessing.json    what other programs need to make the model's inputs
    export.json           the model, its options, and the digest of the weights; written last: an
                          export with it is whole

A matrix that blocks share is stored under each of its names, so that every reader can load the
weights strictly.

Or as a folder that transformers reads: config.json, written last, model.safetensors, tokenizer and
image processor, and the model card.
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from open_clip.model import get_model_preprocess_cfg, get_model_tokenize_cfg
from open_clip.transform import PreprocessCfg
from open_clip.utils import to_2tuple
from safetensors.torch import save

from simplclip import evaluation, models
from simplclip.common.files import sha256
from simplclip.model_card import BLENDED, card
from simplclip.models.naming import CARD, EXPORT, FORMS, Form
from simplclip.models.registry import configuration
from simplclip.models.trained import load_model, model_options
from simplclip.models.weights import about_best, parse_source
from simplclip.train.setup import load_start


def run(
    checkpoint: str | Path,
    out: str | Path,
    *,
    to: Form = "open_clip",
    force: bool = False,
    blend: float | None = None,
    last: bool = False,
) -> dict[str, Any]:
    """Exports a checkpoint to the folder `out`, and returns a summary.

    checkpoint: a file, or the folder of a run (its best.pt, else last.pt; with `last` last.pt). to:
    what loads the export. `out` is made if it does not exist, and does not change before all files
    are written. With `force` they replace an earlier export, except README.md, which is kept.
    blend: alpha, from 0 for the weights with which the run began to 1 for its own.
    Prints the files and the lines that load the export.

    The summary, the content of export.json, has "model" (name), "options", "step", "checkpoint"
    (path), "versions" and "files" (name -> bytes and sha256 of the weights); of a blend also
    "blend", its alpha and start.

    Raises: CheckpointError (not a checkpoint, or of another architecture), OSError (no checkpoint,
    `out` has an export or other files, the disk is full), InputError (no alpha, a run without a
    start to blend with, or a model that transformers lacks).
    """
    out = Path(out)
    weights, whole = FORMS[to]
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    names = [name for name in names if name != CARD and not name.startswith(".")]
    # an export that was interrupted has only the weights
    if names and not (force and {weights, whole} & {*names}):
        raise FileExistsError(
            "out: expected an empty folder, or with --force one with an export to replace, got "
            f"{out} with {names[0]!r}"
        )
    file = parse_source(checkpoint, last=last).label
    model, state = load_model(file)
    if file != str(checkpoint) and not last:
        print(about_best(file, state["step"]))
    config = state["config"]
    name = config["model"]["name"]
    options = model_options(config["model"], config["loss"]["base"])
    summary: dict[str, Any] = {
        "model": name,
        "options": options,
        "step": state["step"],
        "checkpoint": file,
        "versions": evaluation.VERSIONS,
    }
    if blend is not None:
        source, start = load_start(file, state)
        model.load_state_dict(evaluation.blend(start, model.state_dict(), blend))
        summary["blend"] = {"alpha": blend, "start": source}
        print(BLENDED.format(**summary["blend"]))
    about = open_clip_config(model, name, options)
    tokenizer = models.tokenizer(name, about["model_cfg"]["text_cfg"]["context_length"])

    # Beside a mounted folder, or a link to one, is another file system, from which none can rename.
    place = out if out.is_dir() else out.absolute().parent
    place.mkdir(parents=True, exist_ok=True)
    register = REGISTER if "simplclip" in about["model_cfg"] else ""
    lines = LOADING[to].format(folder=str(out), hub=f"local-dir:{out}", register=register)
    with TemporaryDirectory(prefix=".export-", dir=place) as temporary:
        work = Path(temporary)
        if to == "transformers":
            # its import takes seconds
            from simplclip.models import to_transformers

            to_transformers.write(model, tokenizer, work)
        else:
            (work / "open_clip_config.json").write_text(json.dumps(about, indent=2) + "\n")
            # The format has neither shared memory nor strides.
            named = model.state_dict().items()
            tensors = {key: t.clone(memory_format=torch.contiguous_format) for key, t in named}
            metadata = {"format": "pt", "model": name, "step": str(state["step"])}
            (work / weights).write_bytes(save(tensors, metadata))
            write_preprocessing(work, model, tokenizer)
        if (out / CARD).exists():
            print(f"kept {out / CARD}, a model card of before")
        else:
            text = card(model, state, Path(file), lines, to, summary.get("blend"))
            (work / CARD).write_text(text, "utf-8")
        size = (work / weights).stat().st_size
        summary["files"] = {weights: {"bytes": size, "sha256": sha256(work / weights)}}
        if to == "open_clip":
            (work / EXPORT).write_text(json.dumps(summary, indent=2) + "\n")
        for path in work.iterdir():
            with open(path, "rb+") as written_file:
                os.fsync(written_file.fileno())
        out.mkdir(exist_ok=True)
        (out / whole).unlink(missing_ok=True)
        others = {path.name for path in work.iterdir()} - {weights, whole}
        written = [*sorted(others), weights, whole]
        for name in written:  # nothing is printed between, since a closed pipe would end it
            os.replace(work / name, out / name)

    for name in written:
        print(f"wrote {out / name}: {(out / name).stat().st_size:,} bytes")
    print(lines)
    return summary


def write_preprocessing(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes preprocessing.json into a folder, and the files of a tokenizer of Hugging Face.

    model: an open_clip model. tokenizer: one without `save_pretrained` is only named.
    """
    text = {
        "context_length": get_model_tokenize_cfg(model)["context_length"],
        "tokenizer": type(tokenizer).__name__,
    }
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        text["tokenizer"] = "tokenizer.json"
    about = {"image": get_model_preprocess_cfg(model), "text": text}
    (folder / "preprocessing.json").write_text(json.dumps(about, indent=2) + "\n")


LOADING = {
    "transformers": """To load it in transformers:

    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained({folder!r})
    processor = AutoProcessor.from_pretrained({folder!r})""",
    "open_clip": """To load it in open_clip:

    import open_clip{register}
    model, _, preprocess = open_clip.create_model_and_transforms({hub!r})
    tokenizer = open_clip.get_tokenizer({hub!r})

To load it here:

    encoder = simplclip.load({folder!r})""",
}
REGISTER = """
    from simplclip.integrations.open_clip import register_models
    register_models()"""


def open_clip_config(model: Any, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of open_clip_config.json, for a model as it was before it was simplified.

    name, options: as `models.create` took them. From the part "simplclip" of model_cfg
    `register_models` makes the model. An unchanged model of open_clip has none, unless its trunk of
    timm was made for another image size.
    """
    ours = {key: options[key] for key in ("simplified", "simplify_options") if key in options}
    overrides = {key: options[key] for key in options if key not in ours and key != "preprocess"}
    config = configuration(models.spec_of(name), overrides)
    height, width = to_2tuple(model.visual.image_size)
    config["vision_cfg"]["image_size"] = height if height == width else [height, width]
    config["text_cfg"] |= get_model_tokenize_cfg(model)
    if name in models.names():
        config["simplclip"] = {"model": name, **ours}
    elif getattr(model, "simplify_report", None) is not None:
        config["simplclip"] = ours
    elif hasattr(getattr(model.visual, "trunk", None), "set_input_size"):
        own_size = models.spec_of(name).config["vision_cfg"].get("image_size", PreprocessCfg.size)
        if to_2tuple(own_size) != (height, width):
            # From a configuration open_clip makes timm's trunk in its own size; `models.create`
            # calls set_input_size.
            config["simplclip"] = {}
    return {"model_cfg": config, "preprocess_cfg": get_model_preprocess_cfg(model)}
