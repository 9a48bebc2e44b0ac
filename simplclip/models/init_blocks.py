"""Simplified blocks that start from pretrained ones: `simplify(init=...)`, `inherit(blocks=...)`.

docs/block.md derives what `convert` computes: [q|k] becomes W_qk diag(d1), the MLP W_1 diag(d2),
b_1 + W_1 e2, s W_2 and s b_2, for norms d n + e and a layer scale s.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.nn import SimplifiedBlock

MERGES = ("average", "first")
_EPS = 1e-5  # of batch norms in timm and torch
# the beginnings of names in other blocks -> those in timm's Block, as `convert` reads them
_RENAMED = {
    # open_clip's ResidualAttentionBlock
    "attn.in_proj_weight": "attn.qkv.weight",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_2.": "ls2.",
    # FastViT's AttentionBlock, whose MLP begins with a depthwise convolution and a batch norm
    "token_mixer.": "attn.",
    "norm.": "norm1.",
    "mlp.conv.bn.": "norm2.",
    "mlp.conv.conv.": "conv.",
    "layer_scale_2.": "ls2.",
}


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
        except KeyError as error:
            raise InputError(
                f"{path}: expected a block of open_clip's or timm's transformers or FastViT, got "
                f"one without {error}"
            ) from None
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

    tensors: those of a block by names relative to it, of which further parts are left out; those of
    a simplified block are returned as they are. Raises KeyError for a part that is missing.
    """
    if "qk.weight" in tensors:
        return dict(tensors)
    t = {}
    for name, value in tensors.items():
        start = next((old for old in _RENAMED if name.startswith(old)), "")
        t[_RENAMED.get(start, "") + name.removeprefix(start)] = value.float()
    q, k, _ = t["attn.qkv.weight"].chunk(3)
    factor1, _ = _affine(t, "norm1", q)
    factor2, shift2 = _affine(t, "norm2", q)
    spread, level = q.new_ones(()), q.new_zeros(())  # S and M
    if "conv.weight" in t:
        mean, variance = t["norm1.running_mean"], t["norm1.running_var"]
        level = mean.mean()
        spread = (variance + (mean - level).square()).mean().sqrt()
        tap = t["conv.weight"].flatten(1)
        tap = tap[:, tap.shape[1] // 2]
        shift2 = shift2 + factor2 * t["norm2.running_mean"]
        shift2 = shift2 + factor2 * tap * (level - mean)
        factor1, factor2 = factor1 * spread, factor2 * tap * spread
    fc1, bias1 = _linear(t, "mlp.fc1")
    fc2, bias2 = _linear(t, "mlp.fc2")
    scale = t.get("ls2.gamma", fc2.new_ones(len(fc2))).flatten()
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


def _affine(t: Mapping[str, Tensor], norm: str, q: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factor and shift [C] of a norm: of a batch norm for its raw input."""
    factor = t.get(f"{norm}.weight", q.new_ones(q.shape[1]))
    shift = t.get(f"{norm}.bias", q.new_zeros(q.shape[1]))
    if f"{norm}.running_var" in t:
        factor = factor / (t[f"{norm}.running_var"] + _EPS).sqrt()
        shift = shift - factor * t[f"{norm}.running_mean"]
    return factor, shift
