"""`simplclip caption`: a model of transformers draws captions of images, which go into sidecars."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, first_line
from simplclip.data.pack import pack_shards
from simplclip.data.samples import Pair, stable_hash
from simplclip.data.sidecars import write_sidecars

QUESTION = "Describe the image in one short sentence."


def run(
    data: Any, out: str | os.PathLike, model: str, drawing: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Writes a sidecar of each shard to the folder `out`, with the json of samples.

    Its "captions" are the sample's own, then drawn ones. The captions of a batch depend only on its
    samples and on `drawing`. All ranks have to call it.

    data: as `data.pack.pack_shards` takes them. model: a folder or name on the hub, of which
    AutoModelForImageTextToText makes a model. drawing: "n" captions of an image, of "max_tokens"
    tokens at most, "seed", and "prompt": the question to a model that chats, the start of the
    captions of others. options: of `data.sidecars.write_sidecars`, whose result is returned
    and whose errors are raised. Raises InputError for another model.
    """
    device = ranks.set_device("auto")
    dtype = hardware.DTYPES[hardware.pick_precision("auto", device)[0]] or torch.float32
    try:
        processor: Any = AutoProcessor.from_pretrained(model, padding_side="left")
        captioner: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        expected = "an image-to-text model of transformers"
        raise InputError(
            f"model: expected {expected}, got {model!r}: {first_line(error)}"
        ) from None
    captioner.to(device)
    n, prompt = drawing["n"], drawing["prompt"]
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": prompt or QUESTION}]
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)

    def process(batch: tuple[list[Pair], dict[str, Any]]) -> list[dict[str, bytes]]:
        """Returns {"json": bytes} for each sample of a batch."""
        samples, inputs = batch
        torch.manual_seed(stable_hash(f"{drawing['seed']}/{samples[0].name}"))
        tokens = captioner.generate(
            **BatchFeature(inputs).to(device, dtype),
            do_sample=True,
            num_return_sequences=n,
            max_new_tokens=drawing["max_tokens"],
        )
        texts = processor.batch_decode(tokens, skip_special_tokens=True)
        if prompt:  # with which the output of many models begins
            (start,) = processor.batch_decode(inputs["input_ids"][:1], skip_special_tokens=True)
            texts = [text.removeprefix(start) for text in texts]
        drawn = (texts[i : i + n] for i in range(0, len(texts), n))
        return [{"json": with_captions(*pair)} for pair in zip(samples, drawn)]

    return write_sidecars(
        ranks.on_first(pack_shards, data, os.path.join(out, "shards")),
        out,
        decoded,
        process,
        stamp={"caption": {"model": model, **drawing}},
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
    """Returns the json of a sample with new captions, which differ in more than case and spaces."""
    own = {"", *(" ".join(caption.split()).casefold() for caption in sample.captions)}
    new: dict[str, str] = {}
    for caption in drawn:
        spaced = " ".join(caption.split())
        new.setdefault(spaced.casefold(), spaced)
    captions = [*sample.captions, *(new[folded] for folded in new if folded not in own)]
    return json.dumps({**sample.record, "captions": captions}).encode()
