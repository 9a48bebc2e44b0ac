"""Arithmetic for the kernels of several ops, with workarounds for Triton's interpreter.

Logarithms and exponentials have base 2, as in hardware: the scale of a logit is multiplied by log2(e) once.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def narrowed(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """value in DTYPE, rounded to nearest. The interpreter truncates to bfloat16 (seen with 3.9.0), so it rounds here."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """sum + a b in float32."""
    if INTERPRETED:  # its dot reads bfloat16 as integers (seen with 3.9.0)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))
