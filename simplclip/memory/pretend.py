"""Fake tensors, and patches that let a step run on them without the card."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

aten = torch.ops.aten


def faker(mode: FakeTensorMode, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that makes a fake tensor on `device` of the same shape, strides and dtype, one for each tensor."""

    @functools.cache
    def fake(tensor: Tensor) -> Tensor:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        like = FakeTensor(mode, meta, device)
        return nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like

    return fake


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
        if enable_gqa or query.dim() != 4:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.itemsize == 2 and attn_mask is None and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if attn_mask is not None:  # as an additive mask whose rows begin at multiples of 16 bytes
            length = attn_mask.shape[-1]
            padded = F.pad(attn_mask.to(query.dtype), (0, -length % 16))[..., :length]
            attn_mask = padded.expand(*query.shape[:3], length)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale)[0]

    return attention
