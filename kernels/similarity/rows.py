"""The rows of the statistics and of the sigmoids, as constants of kernels."""

import triton
import triton.language as tl

from simplclip.calls.similarity import RowStat, SigmoidRow

# Rows of the statistics; ColumnStat's numbers are those of the first.
LSE_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.LSE_STUDENT))
LSE_TEACHER: tl.constexpr = tl.constexpr(int(RowStat.LSE_TEACHER))
MEAN: tl.constexpr = tl.constexpr(int(RowStat.MEAN))
DIAGONAL_STUDENT: tl.constexpr = tl.constexpr(int(RowStat.DIAGONAL_STUDENT))
PAIR_MATCHING: tl.constexpr = tl.constexpr(int(RowStat.PAIR_MATCHING))

# Rows of the sigmoids.
WEIGHT: tl.constexpr = tl.constexpr(int(SigmoidRow.WEIGHT))
BIAS: tl.constexpr = tl.constexpr(int(SigmoidRow.BIAS))
NEGATIVE: tl.constexpr = tl.constexpr(int(SigmoidRow.NEGATIVE))
POSITIVE: tl.constexpr = tl.constexpr(int(SigmoidRow.POSITIVE))
MIX: tl.constexpr = tl.constexpr(int(SigmoidRow.MIX))


@triton.jit
def sigmoid_number(sigmoids, ROW: tl.constexpr, k: tl.constexpr, TERMS: tl.constexpr):
    """Loads the number of term k in this row of the sigmoids, [5, TERMS]."""
    return tl.load(sigmoids + ROW * TERMS + k)
