"""Stand-ins, in plain torch, for the functions under scaled_dot_product_attention on a GPU.

What they take and return is as in attention.cu, attention_backward.cu and flash_api.cpp of torch:
tensors [B, L, H, K], or one sequence of all tokens with the bounds of its segments, each of which
attends to itself. Heads begin at multiples of 16 bytes.
"""

import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

Segments = list[tuple[int, slice]]  # the index of a sequence, and a range of its tokens


def _segments(q: Tensor, bounds: Tensor | None, most: int | None) -> Segments:
    """Returns the segments of q [B, L, H, K]."""
    if bounds is None:
        return [(b, slice(0, q.shape[1])) for b in range(q.shape[0])]
    first, last = bounds[0], bounds[-1]
    assert (bounds.dtype, bounds.dim(), q.shape[0]) == (torch.int32, 1, 1)
    assert (first, last) == (0, q.shape[1])
    assert 0 <= bounds.diff().min() <= bounds.diff().max() <= most
    return [(0, slice(a, b)) for a, b in itertools.pairwise(bounds.tolist())]


def _check(*tensors: Tensor) -> None:
    for t in tensors:
        row = 16 // t.itemsize
        assert t.stride(-1) == 1, "rows that are not dense"
        assert t.data_ptr() % 16 == 0, "a head between multiples of 16 bytes"
        assert not any(step % row for step in t.stride()[:-1]), (
            "heads between multiples of 16 bytes"
        )
        assert not t.shape[-1] % row, "a width between multiples of 16 bytes"
        assert t.dtype == tensors[0].dtype


# [L, H, K] twice -> [H, L, L]
def _logits(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    assert scale > 0, "a scale by which a mask of -inf would not be multiplied"
    logits = scale * torch.einsum("ihk,jhk->hij", q.float(), k.float())
    if causal:
        hidden = torch.ones_like(logits[0], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits


def _forward(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[Tensor, list[Tensor]]:
    out, lse = torch.full_like(q, torch.nan), []
    for b, rows in segments:
        logits = _logits(q[b, rows], k[b, rows], causal, scale)
        lse.append(logits.logsumexp(-1))
        weights = logits.softmax(-1).to(v.dtype).float()
        out[b, rows] = torch.einsum("hij,jhk->ihk", weights, v[b, rows].float()).to(v.dtype)
    return out, lse


def _backward(grad, q, k, v, out, lse, segments: Segments, causal: bool, scale: float):
    """Returns the gradients of q, k and v. lse: the log-sum-exps of each segment."""
    gradients = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    for (b, rows), segment_lse in zip(segments, lse):
        g, o, values = (t[b, rows].float() for t in (grad, out, v))
        logits = _logits(q[b, rows], k[b, rows], causal, scale)
        weights = (logits - segment_lse[..., None]).exp().to(v.dtype).float()
        d = torch.einsum("ihk,jhk->hij", g, values) - (g * o).sum(-1).T[..., None]
        d = (scale * weights * d).to(v.dtype).float()
        gradients[0][b, rows] = torch.einsum("hij,jhk->ihk", d, k[b, rows].float()).to(q.dtype)
        gradients[1][b, rows] = torch.einsum("hij,ihk->jhk", d, q[b, rows].float()).to(q.dtype)
        gradients[2][b, rows] = torch.einsum("hij,ihk->jhk", weights, g).to(q.dtype)
    return gradients


def _batched(*tensors: Tensor, bounds: Tensor | None) -> list[Tensor]:
    """Gives one sequence of all tokens a dimension of batches."""
    return list(tensors) if bounds is None else [t[None] for t in tensors]


def _flash_attention_forward(
    q, k, v, bounds, keys, most, most_keys, dropout, causal, debug, *, scale
):
    assert (keys is bounds, most_keys, dropout, debug) == (True, most, 0, False)
    assert q.itemsize == 2
    assert q.shape[-1] <= 256
    _check(q, k, v)
    whole = _batched(q, k, v, bounds=bounds)
    out, lse = _forward(*whole, _segments(whole[0], bounds, most), causal, scale)
    joined_lse = torch.stack(lse) if bounds is None else torch.cat(lse, 1)
    return out.view(q.shape), joined_lse, None, None, None


def _flash_attention_backward(
    grad, q, k, v, out, lse, bounds, keys, most, most_keys, dropout, causal, state, unused, *, scale
):  # fmt: skip
    assert (keys is bounds, most_keys, dropout) == (True, most, 0)
    _check(grad, q, k, v, out)
    whole = _batched(grad, q, k, v, out, bounds=bounds)
    segments = _segments(whole[0], bounds, most)
    parts = lse if bounds is None else [lse[:, rows] for _, rows in segments]
    return tuple(t.view(q.shape) for t in _backward(*whole, parts, segments, causal, scale))


def _efficient_attention_forward(
    q, k, v, bias, bounds, keys, most, most_keys, dropout, mask, statistics, *, scale
):
    assert (keys is bounds, most_keys, bias, dropout, statistics) == (True, most, None, 0, True)
    _check(q, k, v)
    out, parts = _forward(q, k, v, _segments(q, bounds, most), mask == 1, scale)
    length = q.shape[1] if bounds is None else most
    lse = torch.full((len(parts), q.shape[2], -(-length // 32) * 32), torch.inf)
    for row, part in zip(lse, parts):
        row[:, : part.shape[1]] = part
    return out, lse, None, None, length, length


def _efficient_attention_backward(
    grad, q, k, v, bias, out, bounds, keys, most, most_keys, lse, dropout, seed, offset, mask,
    bias_gradient, *, scale,
):  # fmt: skip
    assert (keys is bounds, most_keys, bias, dropout, bias_gradient) == (True, most, None, 0, False)
    _check(grad, q, k, v, out)
    segments = _segments(q, bounds, most)
    assert lse.shape == (len(segments), q.shape[2], -(-most // 32) * 32)
    parts = []
    for number, (_, rows) in enumerate(segments):
        count = rows.stop - rows.start
        padding_is_infinite = lse[number, :, count:].isinf().all()
        if bounds is None or number % 2 == 0:
            assert padding_is_infinite, "rows beyond a sequence count"
        parts.append(lse[number, :, :count])
    return *_backward(grad, q, k, v, out, parts, segments, mask == 1, scale), None


class LowerTriangularMask:
    """A stand-in for the class of xformers."""


def xformers_forward(q, k, v, *, attn_bias, scale):
    mask = int(isinstance(attn_bias, LowerTriangularMask))
    return _efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0, mask, True, scale=scale
    )[:2]


def xformers_backward(grad, out, lse, q, k, v, *, attn_bias, scale):
    """Takes log-sum-exps without padding and pads them itself."""
    mask = int(isinstance(attn_bias, LowerTriangularMask))
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    most = q.shape[1]
    return _efficient_attention_backward(
        grad, q, k, v, None, out, None, None, most, most, lse, 0, None, None, mask, False,
        scale=scale,
    )[:3]  # fmt: skip


aten = SimpleNamespace(
    **{name: f for name, f in list(globals().items()) if name.endswith(("_forward", "_backward"))}
)
