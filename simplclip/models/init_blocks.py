"""Simplified blocks that start from pretrained ones: `simplify(init=...)`, `inherit(blocks=...)`.

docs/block.md derives what `convert` computes. A pretrained block computes
``x + W_o softmax(q k^T / sqrt(K)) W_v n1`` with [q|k] = W_qk n1, and adds its MLP of n2; a
simplified one has a single norm n, with weight 1 and bias 0:

    [q|k]:  W_qk diag(d1)                    n1 = d1 n + e1
    MLP:    W_1 diag(d2), b_1 + W_1 e2       n2 = d2 n + e2
            s W_2, s b_2                     s: the layer scale
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.nn import SimplifiedBlock

MERGES = ("average", "first")
_EPS = 1e-5  # of batch norms in timm and torch


@dataclass(frozen=True)
class _Kind:
    """A kind of block, by its tensors' names."""

    name: str
    norm: str
    qkv: str  # the matrix [q|k|v]
    mlp_norm: str
    fc: tuple[str, str]
    scale: str = ""  # the MLP's layer scale
    conv: str = ""  # depthwise, before the MLP's norm


_KINDS = (
    _Kind(
        "open_clip's residual attention block",
        norm="ln_1",
        qkv="attn.in_proj_weight",
        mlp_norm="ln_2",
        fc=("mlp.c_fc", "mlp.c_proj"),
        scale="ls_2.gamma",
    ),
    _Kind(
        "timm's Block",
        norm="norm1",
        qkv="attn.qkv.weight",
        mlp_norm="norm2",
        fc=("mlp.fc1", "mlp.fc2"),
        scale="ls2.gamma",
    ),
    _Kind(
        "FastViT's AttentionBlock",
        norm="norm",
        qkv="token_mixer.qkv.weight",
        mlp_norm="mlp.conv.bn",
        fc=("mlp.fc1", "mlp.fc2"),
        scale="layer_scale_2.gamma",
        conv="mlp.conv.conv.weight",
    ),
)


def is_block(tensors: Collection[str]) -> bool:
    """Whether `tensors`, names relative to a block, are those of a block that `convert` knows."""
    return "qk.weight" in tensors or any(kind.qkv in tensors for kind in _KINDS)


def start(
    blocks: Mapping[str, tuple[SimplifiedBlock, Mapping[str, Tensor]]], merge: str = "first"
) -> None:
    """Starts simplified blocks from pretrained blocks, in place, or raises before it changes any.

    blocks: path -> block, and the argument for `convert`.
    merge: the value of a tensor that blocks share: the "average" of their folded tensors, or the
        tensor of the "first" block. Units of two blocks need not correspond to each other.
    """
    values: dict[nn.Parameter, list[Tensor]] = {}
    for path, (block, tensors) in blocks.items():
        parameters = dict(block.named_parameters())
        if block.norm_name != "layernorm" and "qk.weight" not in tensors:
            raise InputError(f"{path}: expected a block with a layer norm, got {block.norm_name}")
        try:
            converted = convert(tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except KeyError as error:
            raise InputError(f"{path}: expected a whole block, got one without {error}") from None
        for name, value in converted.items():
            if name not in parameters or parameters[name].shape != value.shape:
                kind = f"width {block.width}, {block.hidden} hidden units"
                raise InputError(
                    f"{path}: expected a block of {kind}, got {name} {list(value.shape)}"
                )
            values.setdefault(parameters[name], []).append(value)
    with torch.no_grad():
        for parameter, candidates in values.items():
            if merge == "average":
                wide = [value.to(parameter.device, torch.float32) for value in candidates]
                parameter.copy_(torch.stack(wide).mean(0))
            else:
                parameter.copy_(candidates[0])


@torch.no_grad()
def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns float32 tensors by name with which a `SimplifiedBlock` starts as a pretrained block.

    tensors: those of a block of _KINDS by names relative to the block, whose further parts are left
    out; of a simplified block they are returned as they are. Raises KeyError for a part that is
    missing.
    """
    if "qk.weight" in tensors:
        return dict(tensors)
    kind = next((kind for kind in _KINDS if kind.qkv in tensors), None)
    if kind is None:
        kinds = ", ".join(kind.name for kind in _KINDS)
        names = ", ".join(sorted(tensors)[:4])
        raise InputError(f"expected a block of a known kind ({kinds}), got one of {names}...")
    t = {name: value.float() for name, value in tensors.items() if value.is_floating_point()}
    q, k, _ = t[kind.qkv].chunk(3)
    width = q.shape[1]
    factor1, _ = _affine(t, kind.norm, width)
    factor2, shift2 = _affine(t, kind.mlp_norm, width)
    spread, level = q.new_ones(()), q.new_zeros(())  # S and M
    if kind.conv:
        mean, variance = t[f"{kind.norm}.running_mean"], t[f"{kind.norm}.running_var"]
        level = mean.mean()
        spread = (variance + (mean - level).square()).mean().sqrt()
        tap = t[kind.conv].flatten(1)
        tap = tap[:, tap.shape[1] // 2]
        shift2 = shift2 + factor2 * t[f"{kind.mlp_norm}.running_mean"]
        shift2 = shift2 + factor2 * tap * (level - mean)
        factor1, factor2 = factor1 * spread, factor2 * tap * spread
    fc1, bias1 = _linear(t, kind.fc[0])
    fc2, bias2 = _linear(t, kind.fc[1])
    scale = t[kind.scale].flatten() if kind.scale in t else fc2.new_ones(len(fc2))
    return {
        "qk.weight": torch.cat([q, k]) * factor1,
        "fc1.weight": fc1 * factor2,
        "fc1.bias": bias1 + fc1 @ shift2,
        "fc2.weight": scale[:, None] * fc2,
        "fc2.bias": scale * bias2 + level,
        "attention_gain": spread,
        "mlp_gain": q.new_ones(()),
    }


def _linear(t: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Returns weight [out, in] and bias [out], or zeros, of a linear layer or 1x1 convolution."""
    weight = t[f"{layer}.weight"].flatten(1)
    return weight, t.get(f"{layer}.bias", weight.new_zeros(len(weight)))


def _affine(t: Mapping[str, Tensor], norm: str, width: int) -> tuple[Tensor, Tensor]:
    """Returns factor and shift [C] of a norm: of a batch norm for its raw input."""
    like = next(iter(t.values()))
    factor = t.get(f"{norm}.weight", like.new_ones(width))
    shift = t.get(f"{norm}.bias", like.new_zeros(width))
    if f"{norm}.running_var" in t:
        factor = factor / (t[f"{norm}.running_var"] + _EPS).sqrt()
        shift = shift - factor * t[f"{norm}.running_mean"]
    return factor, shift
