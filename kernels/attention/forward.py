"""Forward kernels of shaped_attention: the sums of v by blocks, and the attention with a running softmax."""

import triton
import triton.language as tl

from simplclip.kernels.arithmetic import INF, LN2, LOG2E, dot, narrowed
from simplclip.kernels.attention.tile import at_head, keys_of_block, load_head, place, rows_of, store_head, visible_keys


@triton.jit(do_not_specialize=["tokens", "heads"])
def _shaped_attention_sums_kernel(
    v,  # [B, L, H, K]
    lengths,  # [B] int32, or None
    sums,  # [B, H, blocks, K] float32
    tokens, heads, width, v_b, v_l, v_h,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum of v over the valid tokens of each block of rows."""
    block, sequence, head, pair, length = place(lengths, tokens, heads, BLOCK_M)
    rows = load_head(v, sequence, head, block * BLOCK_M, v_b, v_l, v_h, length, width, EVEN, BLOCK_M, BLOCK_K)
    total = tl.sum(rows.to(tl.float32), 0)
    depth = tl.arange(0, BLOCK_K)
    tl.store(sums + (pair * tl.cdiv(tokens, BLOCK_M) + block) * width + depth, total, depth < width)


@triton.jit(do_not_specialize=["tokens", "heads"])
def _shaped_attention_fwd_kernel(
    q, k, v,  # [B, L, H, K]
    gains,  # [3, H] float32: alpha, beta, gamma
    lengths,  # [B] int32, or None
    sums,  # [B, H, blocks, K] float32, None if there is one block
    out,  # [B, L, H, K], contiguous
    lse,  # [B, H, L] float32
    tokens, heads, width, scale, q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    block, sequence, head, pair, length = place(lengths, tokens, heads, BLOCK_M)
    first = block * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    row_inside = first + row < length
    limit = visible_keys(first + row, length, CAUSAL)

    q_tile = load_head(q, sequence, head, first, q_b, q_l, q_h, length, width, EVEN, BLOCK_M, BLOCK_K)
    k_at = k + sequence * k_b + head * k_h
    v_at = v + sequence * v_b + head * v_h
    own_at = at_head(v, sequence, head, first, v_b, v_l, v_h)

    key = tl.arange(0, BLOCK_N)
    maximum = tl.full((BLOCK_M,), -INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, keys_of_block(first, length, CAUSAL, BLOCK_M), BLOCK_N):
        key_inside = start + key < length
        k_tile = rows_of(k_at, key, k_l, key_inside, width, EVEN, BLOCK_K)
        logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        logits = dot(q_tile, tl.trans(k_tile), logits, PRECISION, INTERPRETED) * (scale * LOG2E)
        logits = tl.where((start + key)[None, :] < limit[:, None], logits, -INF)
        maximum_now = tl.maximum(maximum, tl.max(logits, 1))
        shrink = tl.exp2(maximum - maximum_now)
        weights = tl.exp2(logits - maximum_now[:, None])
        total = total * shrink + tl.sum(weights, 1)
        v_tile = rows_of(v_at, key, v_l, key_inside, width, EVEN, BLOCK_K)
        weights = narrowed(weights, v_tile.dtype, INTERPRETED)
        mixed = dot(weights, v_tile, mixed * shrink[:, None], PRECISION, INTERPRETED)
        maximum = maximum_now
        k_at += BLOCK_N * k_l
        v_at += BLOCK_N * v_l

    alpha = tl.load(gains + head)
    beta = tl.load(gains + heads + head)
    gamma = tl.load(gains + 2 * heads + head)
    own = rows_of(own_at, row, v_l, row_inside, width, EVEN, BLOCK_K)
    result = mixed * (beta / total)[:, None] + alpha * own.to(tl.float32)
    if CAUSAL:
        mean = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in tl.range(0, BLOCK_M, BLOCK_N, num_stages=1):
            v_tile = rows_of(own_at, key, v_l, first + start + key < length, width, EVEN, BLOCK_K)
            seen = narrowed(tl.where(start + key[None, :] <= row[:, None], 1.0, 0.0), v_tile.dtype, INTERPRETED)
            mean = dot(seen, v_tile, mean, PRECISION, INTERPRETED)
            own_at += BLOCK_N * v_l
    else:
        mean = tl.sum(own.to(tl.float32), 0)[None, :]
    if sums is not None:
        blocks = tl.cdiv(tokens, BLOCK_M)
        other = tl.arange(0, SUMS)
        depth = tl.arange(0, BLOCK_K)
        sums_at = sums + pair * blocks * width + other[:, None] * width + depth[None, :]
        rest = tl.zeros((SUMS, BLOCK_K), tl.float32)
        end = block if CAUSAL else blocks
        for start in range(0, end, SUMS):
            used = (start + other < end) & (start + other != block)
            rest += tl.load(sums_at + start * width, used[:, None] & (depth < width)[None, :], 0.0)
        mean += tl.sum(rest, 0)[None, :]
    result -= mean * (gamma / limit.to(tl.float32))[:, None]
    store_head(
        out, sequence, head, first, tokens.to(tl.int64) * heads * width, heads * width, width, result, length, tokens, width,
        INTERPRETED, EVEN, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    lse_tile = tl.where(row_inside, (maximum + tl.log2(total)) * LN2, 0.0)
    tl.store(lse + pair * tokens + first + row, lse_tile, first + row < tokens)
