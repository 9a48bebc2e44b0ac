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
from torch import Tensor, nn

from simplclip.common.errors import InputError
from simplclip.models.inherit import freeze, largest_parts, matches, trained_units, units_of
from simplclip.models.naming import tower_of
from simplclip.nn import SimplifiedBlock


class LinearAttention(nn.Module):
    """A torch.nn.MultiheadAttention whose two projections are linear layers that are called."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        """Takes the parameters of `attention`, which must project q, k and v by one matrix."""
        super().__init__()
        width, bias = attention.embed_dim, attention.in_proj_bias
        self.heads, self.dropout = attention.num_heads, attention.dropout
        self.in_proj = nn.Linear(width, 3 * width, bias=bias is not None, device="meta")
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, bias
        # torch's own layer is of another class, since its attention reads it without a call
        self.out_proj = nn.Linear(width, width, bias=bias is not None, device="meta")
        self.out_proj.weight = attention.out_proj.weight
        self.out_proj.bias = attention.out_proj.bias

    def forward(
        self, *inputs: Tensor, need_weights: bool = True, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Returns (output, None) for batches of query, key and value; never the weights."""
        query, key, value = inputs
        q = self.in_proj(query)
        k = q if key is query else self.in_proj(key)
        v = k if value is key else self.in_proj(value)
        parts = [projected.chunk(3, -1)[i] for i, projected in enumerate((q, k, v))]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True is what is not seen
        if attn_mask is not None and attn_mask.dim() == 3:  # [B * H, L, S]
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        dropout = self.dropout if self.training else 0.0
        output = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask, dropout)
        return self.out_proj(output.transpose(1, 2).flatten(2)), None


def add_lora(
    model: Any, lora: Mapping[str, Any] | None, frozen: list[str], train: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Adds adapters to towers of an open_clip model in place, and freezes all else of them.

    lora: "rank", "alpha", "dropout", "towers" ("image", "text") and "modules", patterns of linear
    layers; None changes nothing. Layers that share their weight get no adapter. frozen: names of
    what `inherit` froze. train: its patterns, of what trains fully, beside its adapter if it has
    one. Returns the names of all that is frozen, and lines for the log.
    Raises InputError for a tower with simplified blocks or without a matching layer, and for a
    pattern that matches none; ModuleNotFoundError without peft.
    """
    if lora is None:
        return frozen, []
    from peft import LoraConfig, inject_adapter_in_model

    towers = [tower for tower in ("image", "text") if tower in lora["towers"]]
    trained = {
        tensor for unit in trained_units(units_of(model), train) for tensor in unit.tensors.values()
    }
    for name, module in [*model.named_modules()]:
        if tower_of(name) not in towers:
            continue
        if isinstance(module, SimplifiedBlock):
            raise InputError(
                "model.lora: expected towers without simplified blocks, got the "
                f"{tower_of(name)} tower with {name}"
            )
        vars(module).pop("train", None)  # undoes `freeze`
        if (
            type(module) is nn.MultiheadAttention
            and module.batch_first
            and module.in_proj_weight is not None
            and module.bias_k is None
        ):
            model.set_submodule(name, LinearAttention(module))
    layers = _chosen_layers(model, towers, lora["modules"])
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
    owners = Counter(model.state_dict(keep_vars=True).values())
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and owners[module.weight] == 1 and tower_of(name) in towers
    }
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
