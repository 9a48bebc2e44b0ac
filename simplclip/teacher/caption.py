"""`simplclip caption`: writes captions that an open_clip CoCa model draws of the images of shards
into sidecars.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import get_model_preprocess_cfg
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from torch import Tensor

from simplclip import models
from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, check_count
from simplclip.common.files import sha256
from simplclip.data.find_sidecars import Folders
from simplclip.data.pack import pack_shards
from simplclip.data.samples import Pair, stable_hash
from simplclip.data.transforms import ImageTransform, finish_on_device, stack_pixels
from simplclip.data.write_sidecars import write_sidecars
from simplclip.models.weights import download


@dataclass(frozen=True)
class Sampling:
    """How captions are drawn.

    Raises InputError for a value out of range.
    """

    n: int = 3  # captions of each image
    top_p: float = 0.9  # of the most likely tokens that together have at least this probability
    temperature: float = 1.0  # below 1 captions are more likely ones, above 1 more varied
    max_tokens: int = 30  # of a caption with start and end; at most the model's context
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("n", self.n, 1)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a share above 0, up to 1, got {self.top_p!r}")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature: expected a number above 0, got {self.temperature!r}")


@dataclass
class Prepare:
    """Makes the inputs of the model, in workers."""

    transform: ImageTransform
    sampling: Sampling

    def __call__(self, sample: Pair) -> tuple[Tensor, Tensor, list[str], dict[str, Any]]:
        """Returns (pixels uint8 [3, S, S], draws, captions, json) of a sample.

        draws: float64 [n, max_tokens], in [0, 1), by seed and sample's name. Raises BrokenSample.
        """
        seed = stable_hash(f"{self.sampling.seed}/{sample.name}") >> 1
        draws = torch.rand(
            (self.sampling.n, self.sampling.max_tokens),
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        return self.transform(sample.encoded), draws, sample.captions, sample.record

    def collate(self, prepared: list[tuple]) -> tuple[Tensor, Tensor, tuple, tuple]:
        """Joins the results of N calls: [N, 3, S, S], [N, n, max_tokens], two tuples of N."""
        images, draws, captions, records = zip(*prepared)
        return stack_pixels(images), torch.stack(draws), captions, records


def run(
    data: Any,
    out: str | os.PathLike,
    model: str,
    sampling: Sampling,
    *,
    checkpoint: str | os.PathLike | None = None,
    pretrained: str | None = None,
    batch_size: int = 32,
    workers: int = 0,
    sidecars: Folders = (),
    device: str = "auto",
    precision: str = "fp32",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a sidecar of each shard to the folder `out`, with additional captions of each image.

    A sidecar holds the json of each sample with "captions", first the sample's own, and
    "synthetic", the number of captions by a model at the end. Empty captions, and captions that
    differ from an earlier one only in case and spaces, are dropped. The captions of a sample depend
    only on the seed, its shard and its key, not on the batch. All ranks have to call it.

    data: as `data.pack.pack_shards` takes them. model: an open_clip CoCa, whose weights are in the
    file `checkpoint`, or have the tag `pretrained`. batch_size: images at a time. For the others
    and errors see `data.write_sidecars.write_sidecars`, whose dict is returned with the counts
    "captions", "duplicate" and "empty" of this run. Raises InputError for an argument out of range,
    a model that is no CoCa, and weights that do not fit.
    """
    torch_device = ranks.set_device(device)
    precision, _ = hardware.pick_precision(precision, torch_device)
    coca = load_model(model, checkpoint=checkpoint, pretrained=pretrained).to(torch_device)
    if not 3 <= sampling.max_tokens <= coca.context_length:
        raise InputError(
            f"max_tokens: expected 3 to {coca.context_length}, the context of {model}, got "
            f"{sampling.max_tokens}"
        )
    tokenizer = tokenizer_of(model)
    preprocessing = PreprocessCfg(**get_model_preprocess_cfg(coca))
    prepare = Prepare(ImageTransform(preprocessing), sampling)
    counts: Counter[str] = Counter()

    def process(batch: tuple[Tensor, Tensor, tuple, tuple]) -> list[dict[str, bytes]]:
        """Returns {"json": bytes} for each sample of a batch; adds to `counts`."""
        images, draws, captions, records = batch
        images = finish_on_device(prepare.transform, images, torch_device)
        with hardware.autocast(precision, torch_device):
            tokens = generate(
                coca,
                images,
                draws,
                tokenizer,
                top_p=sampling.top_p,
                temperature=sampling.temperature,
            )
        texts = [decode(rows, tokenizer) for rows in tokens.tolist()]
        return [
            {"json": joined_record(*sample, counts)} for sample in zip(records, captions, texts)
        ]

    weights = {"pretrained": pretrained} if checkpoint is None else {"sha256": sha256(checkpoint)}
    stamp = {
        "model": model.removeprefix(models.PLAIN),
        **weights,
        **asdict(sampling),
        "precision": precision,
    }
    shards = ranks.on_first(pack_shards, data, os.path.join(out, "shards"))
    summary = write_sidecars(
        shards,
        out,
        prepare,
        process,
        stamp={"caption": stamp},
        batch_size=batch_size,
        collate=prepare.collate,
        workers=workers,
        sidecars=sidecars,
        title="captions",
        progress=progress,
    )
    total = sum(ranks.all_gather(counts), Counter())
    return summary | {name: total[name] for name in ("captions", "duplicate", "empty")}


def load_model(
    name: str, *, checkpoint: str | os.PathLike | None = None, pretrained: str | None = None
) -> CoCa:
    """Returns a CoCa of open_clip in eval mode, with the weights of a file or of a tag.

    name: with or without "open_clip:". Raises the errors of `run`.
    """
    plain = name.removeprefix(models.PLAIN)
    if "multimodal_cfg" not in (open_clip.get_model_config(plain) or {}):
        names = ", ".join(model for model in open_clip.list_models() if model.startswith("coca"))
        raise InputError(
            f"model: expected a CoCa model of open_clip, such as {names}, got {name!r}"
        )
    if (checkpoint is None) == (pretrained is None):
        got = "neither" if checkpoint is None else "both"
        raise InputError(
            f"checkpoint, pretrained: expected a file or a tag with the weights of {plain}, got "
            f"{got}"
        )
    if pretrained is not None:
        return download(plain, pretrained, "pretrained").eval()
    return models.create(models.PLAIN + plain, checkpoint=checkpoint).eval()


def tokenizer_of(name: str) -> SimpleTokenizer:
    """Returns the tokenizer of a CoCa model; InputError if it is not of open_clip's vocabulary."""
    tokenizer = models.tokenizer(models.PLAIN + name.removeprefix(models.PLAIN))
    if not isinstance(tokenizer, SimpleTokenizer):
        raise InputError(
            f"model: expected a CoCa with open_clip's vocabulary, got {name}, which has "
            f"{type(tokenizer).__name__}"
        )
    return tokenizer


# open_clip's CoCa.generate needs a part of transformers that version 5 has removed, encodes an
# image again for each of its captions, and draws from the global generator, so that a caption would
# depend on its batch.
@torch.no_grad()
def generate(
    coca: CoCa,
    images: Tensor,  # [B, 3, S, S]
    draws: Tensor,  # float64 [B, n, T], uniform in [0, 1)
    tokenizer: SimpleTokenizer,
    *,
    top_p: float,
    temperature: float,
) -> Tensor:  # int64 [B, n, T]
    """Returns n captions of each of B images, in T tokens: start of text, drawn ones, ends of text.

    Token t of a caption is drawn from softmax(logits / temperature), restricted to the most likely
    tokens that together have at least the probability `top_p`, by the uniform number draws[..., t]
    in [0, 1). Each step processes the whole text so far: nothing is cached between steps. Raises
    InputError if logits are not finite.
    """
    count, n, length = draws.shape
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    tokens = torch.full((count * n, length), end, device=images.device)
    tokens[:, 0] = start
    draws = draws.flatten(0, 1).to(images.device)
    latent, embedded = (t.repeat_interleave(n, 0) for t in coca._encode_image(images))
    alive = torch.arange(len(tokens), device=images.device)  # captions without an end
    for t in range(1, length - 1):
        out = coca(
            None, tokens[alive, :t], image_latent=latent, image_embs=embedded, output_labels=False
        )
        logits = out["logits"][:, -1].float()
        if not logits.isfinite().all():
            raise InputError(
                "checkpoint: expected a model with finite logits, got logits that are not finite"
            )
        logits[:, start] = -torch.inf
        tokens[alive, t] = _draw(logits / temperature, draws[alive, t], top_p)
        going = tokens[alive, t] != end
        if not going.all():
            alive = alive[going]
            latent = latent[going]
            embedded = embedded[going]
        if not len(alive):
            break
    return tokens.unflatten(0, (count, n))


def _draw(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Returns a token for each row: int64 [R], of logits [R, V] and draws `uniform` [R]."""
    probabilities, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    total = probabilities.cumsum(-1)
    # position of the token that reaches `top_p`
    last = (total - probabilities < top_p).sum(-1, keepdim=True) - 1
    positions = torch.searchsorted(total, uniform[:, None] * total.gather(-1, last), right=True)
    return order.gather(-1, positions.minimum(last))[:, 0]


def decode(rows: list[list[int]], tokenizer: SimpleTokenizer) -> list[str]:
    """Returns the text of each row between start and end, with single spaces between words."""
    end = tokenizer.eot_token_id
    return [" ".join(tokenizer.decode(row[1 : row.index(end)]).split()) for row in rows]


def joined_record(
    record: dict[str, Any], captions: list[str], drawn: list[str], counts: Counter[str]
) -> bytes:
    """Returns a sample's json with its own captions and the drawn ones that are new.

    "synthetic" in it counts the new ones, and those of an earlier run. Adds to `counts`.
    """
    seen = {_normal(caption) for caption in captions}
    new = []
    for caption in drawn:
        normal = _normal(caption)
        if not normal:
            counts["empty"] += 1
        elif normal in seen:
            counts["duplicate"] += 1
        else:
            seen.add(normal)
            new.append(caption)
    counts["captions"] += len(new)
    synthetic = len(new)
    earlier = record.get("synthetic")
    if isinstance(earlier, int):
        synthetic += earlier
    return json.dumps({**record, "captions": [*captions, *new], "synthetic": synthetic}).encode()


def _normal(caption: str) -> str:
    """Returns a caption to compare by: case folded, with single spaces."""
    return " ".join(caption.split()).casefold()
