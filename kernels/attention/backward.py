"""Backward kernels of shaped_attention: dq and gains by rows, dk and dv by keys; weights are computed again from lse."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import LOG2E, dot, narrowed
from simplclip.kernels.attention.tile import keys_of_block, place, rows_of, store_rows, visible_keys


@triton.jit
def _weights(q_tile, k_tile, grad_tile, v_tile, lse_tile, visible, scale, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """A, 0 where a key is not visible, and dP of a tile of rows and keys."""
    zero = tl.zeros((q_tile.shape[0], k_tile.shape[0]), tl.float32)
    logits = dot(q_tile, tl.trans(k_tile), zero, PRECISION, INTERPRETED) * (scale * LOG2E)
    weights = tl.where(visible, tl.exp2(logits - lse_tile[:, None]), 0.0)
    return weights, dot(grad_tile, tl.trans(v_tile), zero, PRECISION, INTERPRETED)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _shaped_attention_rows_kernel(
    grad,  # [B, L, H, K], contiguous
    q,  # [B, L, H, K]
    k,  # [B, L, H, K]
    v,  # [B, L, H, K]
    gains,  # [3, H] float32
    lse,  # [B, H, L] float32
    lengths,  # [B] int32, or None
    dq,  # [B, L, H, K]
    delta,  # [B, H, L] float32: sums of A dP over the keys
    parts,  # [3, B, H, blocks] float32: of the gains' gradients
    tokens,
    heads,
    width,
    scale,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    dq_b,
    dq_l,
    dq_h,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, sequence, head, pair, length = place(lengths, tokens, heads, BLOCK_M)
    first = block * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_inside = first + row < length
    limit = visible_keys(first + row, length, CAUSAL)
    end = keys_of_block(first, length, CAUSAL, BLOCK_M)

    q_at = q + sequence * q_b + head * q_h + first.to(tl.int64) * q_l
    k_at = k + sequence * k_b + head * k_h
    v_at = v + sequence * v_b + head * v_h
    grad_at = grad + ((sequence * tokens + first) * heads + head) * width
    q_tile = rows_of(q_at, row, q_l, row_inside, width, EVEN, BLOCK_K)
    grad_tile = rows_of(grad_at, row, heads * width, row_inside, width, EVEN, BLOCK_K)
    lse_tile = tl.load(lse + pair * tokens + first + row, row_inside, 0.0) * LOG2E

    own = rows_of(v_at + first.to(tl.int64) * v_l, row, v_l, row_inside, width, EVEN, BLOCK_K)
    d_alpha = tl.sum(tl.sum(grad_tile.to(tl.float32) * own.to(tl.float32), 1), 0)

    key = tl.arange(0, BLOCK_N)
    delta_tile = tl.zeros((BLOCK_M,), tl.float32)
    uniform = tl.zeros((BLOCK_M,), tl.float32)
    k_first = k_at
    v_first = v_at
    for start in range(0, end, BLOCK_N):
        k_tile = rows_of(k_at, key, k_l, start + key < length, width, EVEN, BLOCK_K)
        v_tile = rows_of(v_at, key, v_l, start + key < length, width, EVEN, BLOCK_K)
        visible = (start + key)[None, :] < limit[:, None]
        weights, d_weights = _weights(
            q_tile, k_tile, grad_tile, v_tile, lse_tile, visible, scale, PRECISION, INTERPRETED
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
        k_tile = rows_of(k_at, key, k_l, start + key < length, width, EVEN, BLOCK_K)
        v_tile = rows_of(v_at, key, v_l, start + key < length, width, EVEN, BLOCK_K)
        visible = (start + key)[None, :] < limit[:, None]
        weights, d_weights = _weights(
            q_tile, k_tile, grad_tile, v_tile, lse_tile, visible, scale, PRECISION, INTERPRETED
        )  # fmt: skip
        d_logits = narrowed(weights * (d_weights - delta_tile[:, None]), k_tile.dtype, INTERPRETED)
        dq_tile = dot(d_logits, k_tile, dq_tile, PRECISION, INTERPRETED)
        k_at += BLOCK_N * k_l
        v_at += BLOCK_N * v_l
    dq_tile = tl.where(row_inside[:, None], dq_tile * (scale * tl.load(gains + heads + head)), 0.0)
    dq_at = dq + sequence * dq_b + head * dq_h + first.to(tl.int64) * dq_l
    store_rows(dq_at, row, dq_l, first + row < tokens, width, dq_tile, INTERPRETED, EVEN, BLOCK_K)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _shaped_attention_keys_kernel(
    grad,  # [B, L, H, K], contiguous
    q,  # [B, L, H, K]
    k,  # [B, L, H, K]
    v,  # [B, L, H, K]
    gains,  # [3, H] float32
    lse,  # [B, H, L] float32
    delta,  # [B, H, L] float32
    lengths,  # [B] int32, or None
    dk,  # [B, L, H, K]
    dv,  # [B, L, H, K]
    tokens,
    heads,
    width,
    scale,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    dk_b,
    dk_l,
    dk_h,
    dv_b,
    dv_l,
    dv_h,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tiles are [keys, rows]. A padded key affects only its own row, which is overwritten."""
    block, sequence, head, pair, length = place(lengths, tokens, heads, BLOCK_N)
    first = block * BLOCK_N
    key = tl.arange(0, BLOCK_N)
    key_inside = first + key < length
    alpha = tl.load(gains + head)
    beta = tl.load(gains + heads + head)
    gamma = tl.load(gains + 2 * heads + head)

    k_at = k + sequence * k_b + head * k_h + first.to(tl.int64) * k_l
    v_at = v + sequence * v_b + head * v_h + first.to(tl.int64) * v_l
    k_tile = rows_of(k_at, key, k_l, key_inside, width, EVEN, BLOCK_K)
    v_tile = rows_of(v_at, key, v_l, key_inside, width, EVEN, BLOCK_K)

    row = tl.arange(0, BLOCK_M)
    begin = tl.where(CAUSAL, first // BLOCK_M * BLOCK_M, 0)
    q_at = q + sequence * q_b + head * q_h + begin.to(tl.int64) * q_l
    grad_at = grad + ((sequence * tokens + begin) * heads + head) * width
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

    grad_at = grad + ((sequence * tokens + first) * heads + head) * width
    own = rows_of(grad_at, key, heads * width, key_inside, width, EVEN, BLOCK_K).to(tl.float32)
    written = first + key < tokens
    dk_at = dk + sequence * dk_b + head * dk_h + first.to(tl.int64) * dk_l
    dk_tile = tl.where(key_inside[:, None], dk_tile * (scale * beta), 0.0)
    store_rows(dk_at, key, dk_l, written, width, dk_tile, INTERPRETED, EVEN, BLOCK_K)
    dv_at = dv + sequence * dv_b + head * dv_h + first.to(tl.int64) * dv_l
    dv_tile = tl.where(key_inside[:, None], dv_tile + alpha * own, 0.0)
    store_rows(dv_at, key, dv_l, written, width, dv_tile, INTERPRETED, EVEN, BLOCK_K)
