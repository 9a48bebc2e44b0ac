"""`simplclip caption`: writes captions that a model of transformers draws of the images of shards
into sidecars.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError
from simplclip.common.files import sha256
from simplclip.data.pack import pack_shards
from simplclip.data.samples import Pair, stable_hash
from simplclip.data.sidecars import write_sidecars

QUESTION = "Describe the image in one short sentence."


def run(
    data: Any,
    out: str | os.PathLike,
    model: str,
    *,
    n: int = 3,
    prompt: str = "",
    max_tokens: int = 30,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Writes a sidecar of each shard to the folder `out`, with additional captions of each image.

    A sidecar holds the json of each sample with "captions", first the sample's own. Empty captions,
    and captions that differ from an earlier one only in case and spaces, are dropped. The captions
    of a batch depend only on its samples and the seed. All ranks have to call it.

    data: as `data.pack.pack_shards` takes them. model: a folder, or a name of Hugging Face's hub,
    that AutoModelForImageTextToText loads; its generation_config.json says how tokens are drawn.
    n: captions of an image, of at most max_tokens tokens. prompt: the question to a model that
    chats, the start of the captions of others. options: arguments of
    `data.sidecars.write_sidecars`, whose result is returned and whose errors are raised.
    Raises InputError for another model.
    """
    torch_device = ranks.set_device(device)
    precision, _ = hardware.pick_precision(precision, torch_device)
    dtype = hardware.DTYPES[precision] or torch.float32
    try:
        processor: Any = AutoProcessor.from_pretrained(model, padding_side="left")
        captioner: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"model: expected an image-to-text model of transformers, got {model!r}: {reason}"
        ) from None
    captioner.to(torch_device)
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": prompt or QUESTION}]
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)

    def process(batch: tuple[list[Pair], dict[str, Any]]) -> list[dict[str, bytes]]:
        """Returns {"json": bytes} for each sample of a batch."""
        samples, inputs = batch
        for name, value in inputs.items():
            inputs[name] = value.to(torch_device, dtype if value.is_floating_point() else None)
        torch.manual_seed(stable_hash(f"{seed}/{samples[0].name}"))
        tokens = captioner.generate(
            **inputs, do_sample=True, num_return_sequences=n, max_new_tokens=max_tokens
        )
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        if prompt:  # with which the output of many models begins
            (start,) = processor.batch_decode(inputs["input_ids"][:1], skip_special_tokens=True)
            texts = [text.removeprefix(start) for text in texts]
        return [
            {"json": with_captions(sample, texts[place * n : (place + 1) * n])}
            for place, sample in enumerate(samples)
        ]

    stamp = {
        "model": model,
        "sha256": [sha256(file) for file in sorted(Path(model).glob("*.safetensors"))],
        "n": n,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "seed": seed,
        "precision": precision,
    }
    return write_sidecars(
        ranks.on_first(pack_shards, data, os.path.join(out, "shards")),
        out,
        decoded,
        process,
        stamp={"caption": stamp},
        collate=partial(inputs_of, processor, prompt),
        title="captions",
        **options,
    )


def decoded(sample: Pair) -> tuple[Image.Image, Pair]:
    """Returns a sample's image, and the sample without its file. Raises BrokenSample."""
    return sample.image, replace(sample, encoded=b"")


def inputs_of(
    processor: Any, prompt: str, prepared: list[tuple[Image.Image, Pair]]
) -> tuple[list[Pair], dict[str, Any]]:
    """Returns N samples, and a model's inputs for their images: tensors by name."""
    images = [[image] for image, _ in prepared]
    texts = [prompt] * len(images) if prompt else None
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    return [sample for _, sample in prepared], dict(inputs)


def with_captions(sample: Pair, drawn: Sequence[str]) -> bytes:
    """Returns the json of a sample with its own captions, and those of the drawn that are new."""
    captions = list(sample.captions)
    seen = {"", *map(_normal, captions)}
    for caption in drawn:
        if _normal(caption) not in seen:
            seen.add(_normal(caption))
            captions.append(" ".join(caption.split()))
    return json.dumps({**sample.record, "captions": captions}).encode()


def _normal(caption: str) -> str:
    """Returns a caption to compare by: case folded, with single spaces."""
    return " ".join(caption.split()).casefold()
