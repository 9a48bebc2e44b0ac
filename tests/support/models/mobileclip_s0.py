"""Weights and inputs in the published layout of MobileCLIP-S0, made from a seed.

The published code has run with them.

tests/models/mobileclip_s0/ has
    keys.txt                        name, shape and dtype of each tensor of the published checkpoint
    expected-seed1.safetensors      image and text [2, 512]: features of `inputs()` by `weights(1)`,
                                    in eval mode, float32
    text_case.safetensors           a small text tower (width 48, 4 heads, 2 layers, vocabulary 120,
                                    32 features): tokens, its weights under "weight.", features, and
                                    all_tokens after the last
                                    norm
"""

import math
import zlib
from collections.abc import Iterator

import torch
from safetensors.torch import load_file

from support.paths import ROOT

FOLDER = ROOT / "tests" / "models" / "mobileclip_s0"
SMALL = {"width": 48, "heads": 4, "layers": 2, "vocab_size": 120}
SMALL_FEATURES = 32


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Returns a published checkpoint with weights made from the seed."""
    return {name: _weight(name, shape, dtype, seed) for name, shape, dtype in _layout()}


def _layout() -> Iterator[tuple[str, tuple[int, ...], str]]:
    for line in (FOLDER / "keys.txt").read_text().splitlines():
        name, shape, dtype = line.split("\t")
        yield name, tuple(int(n) for n in shape.strip("()").split(",") if n.strip()), dtype


def _weight(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    if dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    if name == "logit_scale":
        return torch.tensor(3.0)
    if name.endswith("running_var"):
        return torch.rand(shape, generator=g) + 0.5
    if "layer_scale" in name:
        return torch.rand(shape, generator=g) * 0.2 + 0.05
    if len(shape) <= 1:
        return torch.randn(shape, generator=g) * 0.1 + name.endswith("weight")
    fan_in = 4 if "embedding" in name else math.prod(shape[1:])
    return torch.randn(shape, generator=g) * fan_in**-0.5


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns an image batch [2, 3, 256, 256] in 0..1, and tokens [2, 77]."""
    g = torch.Generator().manual_seed(7)
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    for row, length in zip(tokens, (9, 40)):
        row[:length] = torch.randint(1, 49000, (length,), generator=g)
        row[0], row[length - 1] = 49406, 49407
    return torch.rand(2, 3, 256, 256, generator=g), tokens


def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected-seed1.safetensors")


def small_case() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the small text tower's published weights, and tokens, features and all_tokens."""
    case = load_file(FOLDER / "text_case.safetensors")
    published = {
        name.replace("weight.", "text_encoder.", 1): t
        for name, t in case.items()
        if name.startswith("weight.")
    }
    return published, case


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Returns the largest error, relative to the largest value."""
    return ((result - exact).abs().max() / exact.abs().max()).item()


def all_tokens(tower: torch.nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Returns the outputs of all tokens after a text tower's last norm, [B, L, C]."""
    embeddings, _ = tower._embeds(text)
    tokens = tower.last(tower.transformer(tower.first(embeddings)))
    return tower.ln_final(tokens)


def small_state() -> dict[str, torch.Tensor]:
    """Returns a published checkpoint of the model with the small text tower."""
    image = {name: t for name, t in weights(1).items() if name.startswith("image_encoder.")}
    image["image_encoder.model.head.proj"] = torch.randn(1024, SMALL_FEATURES)
    return image | small_case()[0] | {"logit_scale": torch.tensor(2.0)}
