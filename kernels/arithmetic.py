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
    """Returns value in DTYPE, rounded to nearest, also in the interpreter, whose cast to bfloat16 truncates (3.9.0)."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Returns sum + a b in float32."""
    if INTERPRETED:  # its dot reads bfloat16 as integers (seen with 3.9.0)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def rounded_to_tf32(x):
    """Rounds x to the nearest TF32 number; the tensor cores would cut the last bits off."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def reciprocal(x, INTERPRETED: tl.constexpr):
    """Returns 1 / x with an error of 2^-23, for x that is not denormal."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
