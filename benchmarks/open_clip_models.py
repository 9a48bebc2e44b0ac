"""What works with each model of open_clip, without weights: tried, and written as a table.

    python -m benchmarks.open_clip_models [--write] [NAME ...]

PYTHONPATH may name a checkout of another version; --write keeps the rows of other versions. Nothing
is downloaded: a text tower of Hugging Face has the default configuration of its class. Towers whose
layers are alike have two of them.

crop_texts: features of cropped texts are those of padded ones, on values, in a narrow text tower
beside a small image tower. simplify, fold: of the model on the meta device. gradient_cache: its
check, with batch norms in training mode, and two micro-batches of plan's step, where plan works.
plan: a step of `simplclip train`, of 4 pairs, on fake tensors of a GPU.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import open_clip
import torch
import transformers
from torch import nn

from benchmarks import results_file
from benchmarks.model_table import COLUMNS
from simplclip import crop_texts, fold, gradient_cache, models, simplify
from simplclip.commands.plan import REQUIRED
from simplclip.common.errors import UserError
from simplclip.plan.measure import predict
from simplclip.plan.step import TrainerStep
from simplclip.train import config as configs

LAYERS = 2
OTHERS = {"audio_cfg", "genlip_cfg", "genlap_cfg"}  # not of images and texts, or without a tower
WORKS, NOTHING = "works", "nothing to fold"
# by the beginning of a name on Hugging Face's hub
TOWERS: dict[str, Callable[..., Any]] = {
    "roberta": transformers.RobertaConfig,
    "xlm-roberta": transformers.XLMRobertaConfig,
    "google/mt5": transformers.MT5Config,
    "facebook/nllb": partial(transformers.M2M100Config, encoder_layerdrop=0),  # as NLLB's own
    "Alibaba-NLP/gte-modernbert": transformers.ModernBertConfig,
}


def hub_config(name: str, **changes: Any) -> Any:
    """Returns the configuration of a tower of Hugging Face, of few layers, without the hub."""
    kind = next((kind for start, kind in TOWERS.items() if name.startswith(start)), None)
    if kind is None:
        raise OSError(f"{name} needs a download")
    options = {"num_hidden_layers": LAYERS, "encoder_layers": LAYERS, "num_layers": LAYERS}
    return kind(**options, **changes)


@contextmanager
def offline(**changes: Any) -> Iterator[None]:
    """Context in which open_clip makes towers of Hugging Face and timm of few layers."""
    make = open_clip.timm_model.timm.create_model

    def few_layers(name: str, *args: Any, **options: Any) -> nn.Module:
        if name.startswith(("vit_", "eva", "naflexvit")):
            options["depth"] = LAYERS
        return make(name, *args, **options)

    hub = SimpleNamespace(from_pretrained=lambda name: hub_config(name, **changes))
    with (
        mock.patch.object(open_clip.hf_model, "AutoConfig", hub),
        mock.patch.object(open_clip.timm_model.timm, "create_model", few_layers),
    ):
        yield


def few_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Returns changes of open_clip's configuration by which its own transformers are short."""
    changes: dict[str, Any] = {}
    vision = config.get("vision_cfg", {})
    if isinstance(vision.get("layers"), int):
        changes["vision_cfg"] = {"layers": LAYERS}
    if "hf_model_name" not in config["text_cfg"]:
        changes["text_cfg"] = {"layers": LAYERS}
    if "multimodal_cfg" in config:
        changes["multimodal_cfg"] = config["multimodal_cfg"] | {"layers": LAYERS}
    return changes


def made(name: str, config: dict[str, Any]) -> nn.Module:
    """Returns a model on the meta device; of kinds that this library does not make, open_clip's."""
    with torch.device("meta"):
        if OTHERS & config.keys():
            options = {"pretrained_text": False, "pretrained_image": False}
            return open_clip.create_model(name, device="meta", **options)
        return models.create(f"open_clip:{name}", device="meta", **few_layers(config))


def narrow(name: str, config: dict[str, Any]) -> nn.Module:
    """Returns a model with values whose text tower is narrow, and a small tower of images."""
    changes: dict[str, Any] = {"embed_dim": 16, "custom_text": True}
    if "hf_model_name" not in config["text_cfg"]:
        changes["text_cfg"] = {"width": 32, "heads": 2, "layers": LAYERS}
    if "multimodal_cfg" in config:
        sizes = {"width": 32, "heads": 2, "layers": LAYERS}
        changes["multimodal_cfg"] = config["multimodal_cfg"] | sizes
    image = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
    spec = {key: value for key, value in config.items() if key != "audio_cfg"}
    spec |= {"vision_cfg": image | {"output_tokens": "multimodal_cfg" in config}}
    return models.create(models.Spec(spec), **changes).eval()


def why(function: Callable[[], object]) -> str:
    """Returns what `function` returns if it is a text, else "works"; or what it raises."""
    try:
        result = function()
    except UserError as error:
        return str(error)
    # a fault of this library, which the table shall show
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result if isinstance(result, str) else WORKS


@torch.no_grad()
def cropped(name: str, config: dict[str, Any]) -> str | None:
    """Compares features of cropped texts with those of padded ones."""
    if OTHERS & config.keys():  # open_clip's own class
        crop_texts(made(name, config))
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    seq2seq = {"d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    with offline(**small, **seq2seq, d_kv=16, num_heads=2, d_ff=64):
        model: Any = narrow(name, config)
    tower = getattr(model, "text", model)
    hub = getattr(tower, "config", None)
    text_cfg = config["text_cfg"]
    length = text_cfg.get("context_length", 77)
    pad = text_cfg.get("pad_id", 0) if hub is None else hub.pad_token_id
    end = text_cfg.get("eos_id") or tower.vocab_size - 1
    text = torch.full((4, length), pad)
    for row, count in zip(text, (3, 9, min(17, length), min(30, length))):
        row[:count] = torch.arange(5, 5 + count)
        row[count - 1] = end
    padded = model.encode_text(text)
    crop_texts(model, groups=2)
    if not torch.allclose(model.encode_text(text), padded, atol=1e-4):
        return "WRONG: features differ"
    return None


def folded(model: nn.Module) -> str | None:
    """Folds a model."""

    def parts(model: nn.Module) -> list[tuple[str, type]]:
        return [(name, type(module)) for name, module in model.named_modules()]

    return NOTHING if parts(fold(model.eval())) == parts(model) else None


def planned(name: str, config: dict[str, Any], micro_batch: int | None = None) -> None:
    """Predicts a step, with gradient caching if it has micro-batches."""
    values = {
        "model": {"name": f"open_clip:{name}", "options": few_layers(config)},
        "data": REQUIRED["data"] | {"batch_size": 4, "micro_batch": micro_batch},
        "run": REQUIRED["run"],
    }
    predict(TrainerStep(configs.from_dict(values), "bf16"), torch.device("cuda", 0))


def tried(name: str) -> dict[str, str]:
    """Returns the row of a model."""
    config = open_clip.get_model_config(name)
    row = {"model": name, "open_clip": open_clip.__version__}

    def cached(plan: str) -> None:
        gradient_cache.check(model.train())
        if plan == WORKS:
            planned(name, config, micro_batch=2)

    with offline():
        try:
            model = made(name, config)
        except (OSError, ImportError) as error:  # of Hugging Face; of an optional package
            return row | dict.fromkeys(COLUMNS, f"not tried: {str(error).splitlines()[0]}")
        plan = why(lambda: planned(name, config))
        results = {
            "crop_texts": why(lambda: cropped(name, config)),
            "gradient_cache": why(lambda: cached(plan)),
            "fold": why(lambda: folded(model)),
            "plan": plan,
            "simplify_text": why(lambda: simplify(model, towers=("text",)) and None),
            "simplify_image": why(lambda: simplify(model, towers=("image",)) and None),
        }
    return row | {column: results[column] for column in COLUMNS}


def main() -> None:
    logging.disable(logging.WARNING)
    names = [each for each in sys.argv[1:] if not each.startswith("--")] or open_clip.list_models()
    versions = results_file.versions()
    rows = []
    for name in names:
        rows.append(tried(name) | versions)
        print(", ".join(f"{key}: {rows[-1][key]}" for key in ("model", *COLUMNS)), flush=True)
    if "--write" in sys.argv[1:]:
        path = results_file.RESULTS / f"open-clip-models-{versions['date']}.csv"
        results_file.write_csv(path, rows, key=("model", "open_clip"))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
