"""Backward kernels of shaped_attention: dq and gains by rows, dk and dv by keys; weights are computed again from lse."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import LOG2E, dot, narrowed
from simplclip.kernels.attention.tile import at_head, keys_of_block, load_head, place, rows_of, store_head, visible_keys


@triton.jit
def _weights(
    q_tile, grad_tile, lse_tile, limit, k_at, k_l, v_at, v_l, start, length, width, scale,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of a tile of rows and keys: A, 0 where a key is not visible, and dP; the tile of k; and which keys are visible."""
    key = tl.arange(0, BLOCK_N)
    k_tile = rows_of(k_at, key, k_l, start + key < length, width, EVEN, BLOCK_K)
    v_tile = rows_of(v_at, key, v_l, start + key < length, width, EVEN, BLOCK_K)
    visible = (start + key)[None, :] < limit[:, None]
    zero = tl.zeros((q_tile.shape[0], BLOCK_N), tl.float32)
    logits = dot(q_tile, tl.trans(k_tile), zero, PRECISION, INTERPRETED) * (scale * LOG2E)
    weights = tl.where(visible, tl.exp2(logits - lse_tile[:, None]), 0.0)
    return weights, dot(grad_tile, tl.trans(v_tile), zero, PRECISION, INTERPRETED), k_tile, visible


@triton.jit(do_not_specialize=["tokens", "heads"])
def _shaped_attention_rows_kernel(
    grad, q, k, v,  # [B, L, H, K], grad contiguous
    gains,  # [3, H] float32
    lse,  # [B, H, L] float32
    lengths,  # [B] int32, or None
    dq,  # [B, L, H, K]
    delta,  # [B, H, L] float32: sums of A dP over the keys
    parts,  # [3, B, H, blocks] float32: of the gains' gradients
    tokens, heads, width, scale, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, dq_b, dq_l, dq_h,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, sequence, head, pair, length = place(lengths, tokens, heads, BLOCK_M)
    first = block * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_inside = first + row < length
    limit = visible_keys(first + row, length, CAUSAL)
    end = keys_of_block(first, length, CAUSAL, BLOCK_M)

    k_at = k + sequence * k_b + head * k_h
    v_at = v + sequence * v_b + head * v_h
    grad_b = tokens.to(tl.int64) * heads * width
    q_tile = load_head(q, sequence, head, first, q_b, q_l, q_h, length, width, EVEN, BLOCK_M, BLOCK_K)
    grad_tile = load_head(
        grad, sequence, head, first, grad_b, heads * width, width, length, width, EVEN, BLOCK_M, BLOCK_K
    )  # fmt: skip
    lse_tile = tl.load(lse + pair * tokens + first + row, row_inside, 0.0) * LOG2E

    own = load_head(v, sequence, head, first, v_b, v_l, v_h, length, width, EVEN, BLOCK_M, BLOCK_K)
    d_alpha = tl.sum(tl.sum(grad_tile.to(tl.float32) * own.to(tl.float32), 1), 0)

    delta_tile = tl.zeros((BLOCK_M,), tl.float32)
    uniform = tl.zeros((BLOCK_M,), tl.float32)
    k_first = k_at
    v_first = v_at
    for start in range(0, end, BLOCK_N):
        weights, d_weights, _, visible = _weights(
            q_tile, grad_tile, lse_tile, limit, k_at, k_l, v_at, v_l, start, length, width, scale,
            EVEN, PRECISION, INTERPRETED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        delta_tile += tl.sum(weights * d_weights, 1)
        uniform += tl.sum(tl.where(visible, d_weights, 0.0), 1)
        k_at += BLOCK_N * k_l
        v_at += BLOCK_N * v_l
    tl.store(delta + pair * tokens + first + row, delta_tile, row_inside)
    part = parts + pair * tl.cdiv(tokens, BLOCK_M) + block
    of_gain = tl.num_programs(0).to(tl.int64)
    tl.store(part, d_alpha)
    tl.store(part + of_gain, tl.sum(delta_tile, 0))
    tl.store(part + 2 * of_gain, -tl.sum(tl.where(row_inside, uniform / limit.to(tl.float32), 0.0), 0))

    dq_tile = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    k_at = k_first
    v_at = v_first
    for start in range(0, end, BLOCK_N):
        weights, d_weights, k_tile, _ = _weights(
            q_tile, grad_tile, lse_tile, limit, k_at, k_l, v_at, v_l, start, length, width, scale,
            EVEN, PRECISION, INTERPRETED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        d_logits = narrowed(weights * (d_weights - delta_tile[:, None]), k_tile.dtype, INTERPRETED)
        dq_tile = dot(d_logits, k_tile, dq_tile, PRECISION, INTERPRETED)
        k_at += BLOCK_N * k_l
        v_at += BLOCK_N * v_l
    dq_tile *= scale * tl.load(gains + heads + head)
    store_head(
        dq, sequence, head, first, dq_b, dq_l, dq_h, dq_tile, length, tokens, width, INTERPRETED, EVEN, BLOCK_M, BLOCK_K
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "heads"])
def _shaped_attention_keys_kernel(
    grad, q, k, v,  # [B, L, H, K], grad contiguous
    gains,  # [3, H] float32
    lse, delta,  # [B, H, L] float32
    lengths,  # [B] int32, or None
    dk, dv,  # [B, L, H, K]
    tokens, heads, width, scale, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, dk_b, dk_l, dk_h, dv_b, dv_l, dv_h,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles are [keys, rows]. A padded key affects only its own row, which is overwritten."""
    block, sequence, head, pair, length = place(lengths, tokens, heads, BLOCK_N)
    first = block * BLOCK_N
    key = tl.arange(0, BLOCK_N)
    alpha = tl.load(gains + head)
    beta = tl.load(gains + heads + head)
    gamma = tl.load(gains + 2 * heads + head)

    k_tile = load_head(k, sequence, head, first, k_b, k_l, k_h, length, width, EVEN, BLOCK_N, BLOCK_K)
    v_tile = load_head(v, sequence, head, first, v_b, v_l, v_h, length, width, EVEN, BLOCK_N, BLOCK_K)

    row = tl.arange(0, BLOCK_M)
    begin = tl.where(CAUSAL, first // BLOCK_M * BLOCK_M, 0)
    grad_b = tokens.to(tl.int64) * heads * width
    q_at = at_head(q, sequence, head, begin, q_b, q_l, q_h)
    grad_at = at_head(grad, sequence, head, begin, grad_b, heads * width, width)
    rows_at = pair * tokens + row
    dk_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(begin, tl.where(first < length, length, 0), BLOCK_M):
        row_inside = start + row < length
        q_tile = rows_of(q_at, row, q_l, row_inside, width, EVEN, BLOCK_K)
        grad_tile = rows_of(grad_at, row, heads * width, row_inside, width, EVEN, BLOCK_K)
        lse_tile = tl.load(lse + rows_at + start, row_inside, 0.0) * LOG2E
        delta_tile = tl.load(delta + rows_at + start, row_inside, 0.0)
        limit = visible_keys(start + row, length, CAUSAL)
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        weights = tl.exp2(dot(k_tile, tl.trans(q_tile), zero, PRECISION, INTERPRETED) * (scale * LOG2E) - lse_tile[None, :])
        mixing = beta * weights - (gamma / limit.to(tl.float32))[None, :]
        if CAUSAL:
            visible = (first + key)[:, None] < limit[None, :]
            weights = tl.where(visible, weights, 0.0)
            mixing = tl.where(visible, mixing, 0.0)
        dv_tile = dot(narrowed(mixing, grad_tile.dtype, INTERPRETED), grad_tile, dv_tile, PRECISION, INTERPRETED)
        d_weights = dot(v_tile, tl.trans(grad_tile), zero, PRECISION, INTERPRETED)
        d_logits = narrowed(weights * (d_weights - delta_tile[None, :]), q_tile.dtype, INTERPRETED)
        dk_tile = dot(d_logits, q_tile, dk_tile, PRECISION, INTERPRETED)
        q_at += BLOCK_M * q_l
        grad_at += BLOCK_M * heads * width

    own = load_head(grad, sequence, head, first, grad_b, heads * width, width, length, width, EVEN, BLOCK_N, BLOCK_K)
    dk_tile *= scale * beta
    store_head(
        dk, sequence, head, first, dk_b, dk_l, dk_h, dk_tile, length, tokens, width, INTERPRETED, EVEN, BLOCK_N, BLOCK_K
    )  # fmt: skip
    dv_tile += alpha * own.to(tl.float32)
    store_head(
        dv, sequence, head, first, dv_b, dv_l, dv_h, dv_tile, length, tokens, width, INTERPRETED, EVEN, BLOCK_N, BLOCK_K
    )  # fmt: skip
