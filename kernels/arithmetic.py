"""Arithmetic for the kernels of several ops, and the order of their programs.

Logarithms and exponentials have base 2 in hardware: e^x is 2^(x log2(e)).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
INF: tl.constexpr = tl.constexpr(float("inf"))
# of a group of blocks: of half types 2 MB of a cache at a width of 1024
GROUP_ROWS: tl.constexpr = tl.constexpr(1024)


@triton.jit
def rounded_to_tf32(x):
    """Rounds float32 x to the nearest TF32 number; the tensor cores would cut the last bits off."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x):
    """Returns 1 / (1 + e^-x) of each element."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def reciprocal(x):
    """Returns 1 / x with an error of 2^-23, for x that is not denormal."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def block_of_program(row_blocks, column_blocks, BLOCK_M: tl.constexpr):
    """Returns (row, column), in blocks, of this program's block of a matrix of blocks.

    Programs go through groups of blocks of rows, 1024 rows in each, so that those that run together
    read the same rows and columns.
    """
    GROUP: tl.constexpr = GROUP_ROWS // BLOCK_M
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return first + within % group, within // group
