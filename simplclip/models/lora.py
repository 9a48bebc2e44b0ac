"""LoRA, arXiv 2106.09685: `add_lora` freezes towers and gives their linear layers adapters of peft.

With an adapter a layer's weight W [o, i] counts as W + alpha / rank B A, where the matrices
A [rank, i] and B [o, rank] train, and B starts at 0. The state dict of the model has peft's names;
`weights.merged` makes that of the model without adapters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from open_clip.utils import to_2tuple
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models.inherit import freeze, largest_parts, matches, release, units_of
from simplclip.models.naming import tower_of
from simplclip.nn import SimplifiedBlock


class LinearAttention(nn.Module):
    """A torch.nn.MultiheadAttention whose two projections are linear layers that are called."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Takes the parameters of `attention`, which must project q, k and v by one matrix."""
        super().__init__()
        width, bias = attention.embed_dim, attention.in_proj_bias
        self.heads, self.dropout = attention.num_heads, attention.dropout
        self.batch_first = attention.batch_first
        self.in_proj = nn.Linear(width, 3 * width, bias=bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, bias
        self.out_proj = attention.out_proj

    def forward(
        self, *inputs: Tensor, need_weights: bool = True, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Returns (output, None) for query, key and value, as torch's without weights."""
        query, key, value = inputs
        if need_weights or query.dim() != 3:
            expected = "attention of batches that returns no weights"
            raise InputError(f"model.lora: expected {expected}, got other options")
        q = self.in_proj(query)
        k = q if key is query else self.in_proj(key)
        v = k if value is key else self.in_proj(value)
        parts = [projected.chunk(3, -1)[i] for i, projected in enumerate((q, k, v))]
        if not self.batch_first:
            parts = [part.transpose(0, 1) for part in parts]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True is what is not seen
        if attn_mask is not None and attn_mask.dim() == 3:  # [B * H, L, S]
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        dropout = self.dropout if self.training else 0.0
        output = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, dropout)
        output = output.transpose(1, 2).flatten(2)
        return self.out_proj(output if self.batch_first else output.transpose(0, 1)), None


def add_lora(
    model: Any, lora: Mapping[str, Any] | None, frozen: list[str], train: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Adds adapters to towers of an open_clip model in place, and freezes all else of them.

    lora: "rank", "alpha", "dropout", "towers" ("image", "text") and "modules", patterns of linear
    layers; None changes nothing. Layers whose weight is read without a call, and those that share
    it, get none. frozen: names of what `inherit` froze. train: its patterns, of what trains fully.
    Returns the names of all that is frozen, and lines for the log.
    Raises InputError for a tower with simplified blocks or without a matching layer, for a pattern
    that matches none, for a rank above a layer's smaller side, and for `train` of a layer with an
    adapter; ModuleNotFoundError without peft.
    """
    if lora is None:
        return frozen, []
    from peft import LoraConfig, inject_adapter_in_model

    towers = [tower for tower in ("image", "text") if tower in lora["towers"]]
    trained = {
        tensor: pattern
        for unit in units_of(model)
        for pattern in train
        for tensor in unit.tensors.values()
        if matches(pattern, unit.path, unit.tensors) and tensor.requires_grad
    }
    for name, module in [*model.named_modules()]:
        if tower_of(name) not in towers:
            continue
        if isinstance(module, SimplifiedBlock):
            raise InputError(
                "model.lora: expected towers without simplified blocks, got the "
                f"{tower_of(name)} tower with {name}"
            )
        release(module)
        if (
            type(module) is nn.MultiheadAttention
            and module.in_proj_weight is not None
            and module.bias_k is None
            and not module.add_zero_attn
        ):
            model.set_submodule(name, LinearAttention(module))
    layers = _chosen_layers(model, towers, lora["modules"])
    for name, layer in layers.items():
        if lora["rank"] > min(layer.weight.shape):
            raise InputError(
                "model.lora.rank: expected at most the smaller side of each layer, got "
                f"{lora['rank']} for {name} {[*layer.weight.shape]}"
            )
        if layer.weight in trained:
            raise InputError(
                "inherit.train: expected no layer that gets an adapter by model.lora, got "
                f"{trained[layer.weight]!r}, which matches {name}"
            )
    before = [(name, weight, weight.requires_grad) for name, weight in model.named_parameters()]
    adapters = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        # a list would match ends of names, too
        target_modules="|".join(map(re.escape, layers)),
    )
    inject_adapter_in_model(adapters, model)
    for name in layers:  # under autocast peft would make inputs float32, and autocast undo it
        vars(model.get_submodule(name))["cast_input_dtype_enabled"] = False
    for name, weight, trains in before:
        weight.requires_grad_(trains and (tower_of(name) not in towers or weight in trained))
    kept = {w for name, w, _ in before if tower_of(name) in towers and not w.requires_grad}
    frozen = [name for name in frozen if tower_of(name) not in towers]
    frozen += largest_parts(model, kept)
    freeze(model.train(), frozen)
    counts = Counter(map(tower_of, layers))
    each = ", ".join(f"{counts[tower]} in the {tower} tower" for tower in towers)
    return frozen, [f"lora       adapters of rank {lora['rank']}: {each}"]


def _chosen_layers(
    model: Any, towers: Sequence[str], patterns: Sequence[str]
) -> dict[str, nn.Linear]:
    """Returns the linear layers of towers that get an adapter, by name."""
    layers = {name: m for name, m in _called_layers(model).items() if tower_of(name) in towers}
    chosen: dict[str, nn.Linear] = {}
    for pattern in patterns:
        found = {name: layer for name, layer in layers.items() if matches(pattern, name)}
        if not found:
            expected = f"patterns that match a linear layer, e.g. {next(iter(layers), 'none')}"
            raise InputError(f"model.lora.modules: expected {expected}, got {pattern!r}")
        chosen |= found
    for tower in {*towers} - {*map(tower_of, chosen)}:
        expected = f"towers with a linear layer that matches {[*patterns]}"
        raise InputError(f"model.lora: expected {expected}, got the {tower} tower without one")
    return chosen


@torch.no_grad()
def _called_layers(model: Any) -> dict[str, nn.Linear]:
    """Returns the linear layers that encoding calls and that share no weight, by name.

    On the meta device, where some models cannot run, layers that are not called count too.
    """
    owners = Counter(model.state_dict(keep_vars=True).values())
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and owners[module.weight] == 1
    }
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, *_: called.add(m)) for m in layers.values()]
    device = model.logit_scale.device
    length = getattr(model, "context_length", None) or model.text.context_length
    model.eval()
    try:
        model.encode_image(torch.zeros(1, 3, *to_2tuple(model.visual.image_size), device=device))
        model.encode_text(torch.arange(length, device=device).unsqueeze(0) % 2)
    except (RuntimeError, NotImplementedError):
        if device.type != "meta":
            raise
        return layers
    finally:
        for hook in hooks:
            hook.remove()
    return {name: layer for name, layer in layers.items() if layer in called}
