"""Fake tensors, and patches that let a step run on them without the card."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten


class Fakes:
    """Makes fake tensors on `device` of the same shapes, strides and dtypes, one for each tensor."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.of = functools.cache(self._of)

    def _of(self, tensor: Tensor) -> Tensor:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        like = FakeTensor(self.mode, meta, self.device)
        return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like

    def into(self, modules: list[nn.Module]) -> None:
        """Replaces parameters and buffers by fake ones, in place."""
        for module in (inner for outer in modules for inner in outer.modules()):
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: self.of(tensor) for name, tensor in tensors.items() if tensor is not None})


@contextmanager
def fake_step(mode: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """Context in which values are read as 0, random generators have no state, and a card seems to exist."""
    patches = [
        (FakeTensor, "tolist", lambda t: [0.0] * t.numel()),
        (torch, "get_rng_state", lambda: None),
        (torch, "set_rng_state", lambda state: None),
    ]
    if device.type == "cuda":
        patches += [
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", attention_of_card(F.scaled_dot_product_attention)),
        ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        stack.enter_context(mode)
        yield


def attention_of_card(plain):
    """SDPA as on a card: FlashAttention for half types without a mask, else the memory-efficient kernel.

    Without a device torch would use plain products, which keep [B, H, L, L].
    """

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if query.device.type != "cuda" or enable_gqa or query.dim() != 4 or query.dtype == torch.float64:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        half = query.dtype in (torch.float16, torch.bfloat16)
        if half and attn_mask is None and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        bias = None
        if attn_mask is not None:
            # The kernel needs an additive mask whose rows begin at multiples of 16 bytes.
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), -torch.inf)
            length = attn_mask.shape[-1]
            bias = F.pad(attn_mask.to(query.dtype), (0, -length % 16))[..., :length]
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], length)
        keep = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, bias, keep, dropout_p, is_causal, scale=scale)[0]

    return attention
