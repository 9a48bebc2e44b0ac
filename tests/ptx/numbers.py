"""Arithmetic as the hardware does it: rounding, conversions, and the matrices that the lanes of a warp hold together.

What is not as in hardware: the approximate functions (ex2, lg2, rcp, div) are rounded correctly, and the sums of a tensor
core are sums in float32 in any order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

BF16, TF32_MASK = np.uint32(0xFFFF0000), np.uint32(0xFFFFE000)
_HALFWAY, _BELOW_FLOAT32 = np.int64(1 << 28), np.int64((1 << 29) - 1)  # bits of a float64's mantissa that float32 lacks


def flushed(x: np.ndarray) -> np.ndarray:
    """Returns float32 numbers with 0 of the same sign for denormal ones (.ftz)."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x) if np.any(small) else x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a b + c of float32, rounded once.

    In float64 the product is exact, and the sum is rounded to 53 bits, then to 24. This differs from one rounding only where
    the first one makes a tie: there the sum moves by its own error. (Denormal results may be rounded twice.)
    """
    product, wide = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = np.asarray(product + wide)
    bits = total.view(np.int64)
    tie = (bits & _BELOW_FLOAT32) == _HALFWAY
    if np.any(tie):
        back = total - product
        error = (product - (total - back)) + (wide - back)  # of the sum, exactly
        away = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(tie & (error != 0), bits + away, bits).view(np.float64)
    return total.astype(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Returns the bits of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Returns the bits of float32 numbers rounded to the nearest TF32 number, ties away from zero (cvt.rna)."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & TF32_MASK
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def truncated_tf32(bits: np.ndarray) -> np.ndarray:
    """Returns what a tensor core reads of a register in TF32: it ignores the low 13 bits."""
    return (bits & TF32_MASK).view(np.float32)


HALVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bf16": from_bf16, "f16": from_f16}
TO_HALF: dict[str, Callable[[np.ndarray], np.ndarray]] = {"bf16": to_bf16, "f16": to_f16}


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a / b of integers, rounded to zero; all bits set where b is 0."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = np.asarray(a // safe)
    if np.issubdtype(quotient.dtype, np.signedinteger):
        quotient += ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(quotient.dtype)
    return np.where(zero, ~quotient.dtype.type(0), quotient)


def shifted(x: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """Returns x shifted by counts that may be larger than its width."""
    bits = x.dtype.itemsize * 8
    kept = np.minimum(count, bits - 1).astype(x.dtype)
    moved = x << kept if left else x >> kept
    if not left and np.issubdtype(x.dtype, np.signedinteger):
        return moved
    return np.where(count >= bits, x.dtype.type(0), moved)


def extracted(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns bfe of 32 bits: `length` bits from bit `start` on, extended by the sign if x is signed."""
    start, length = start & 255, length & 255
    wide = x.astype(np.int64)
    moved = wide >> np.minimum(start, 32)
    field = moved & ((np.int64(1) << np.minimum(length, 32).astype(np.int64)) - 1)
    if x.dtype == np.int32:
        last = np.minimum(start.astype(np.int64) + length - 1, 31)
        negative = (length > 0) & ((wide >> np.maximum(last, 0)) & 1 == 1)
        field = np.where(negative, field | (np.int64(-1) << np.minimum(length, 32).astype(np.int64)), field)
    return (field & 0xFFFFFFFF).astype(np.uint32).view(x.dtype)


def inserted(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns bfi of 32 bits: the low `length` bits of a at bit `start` of b."""
    start, length = np.minimum(start & 255, 32).astype(np.uint64), np.minimum(length & 255, 32).astype(np.uint64)
    mask = ((np.uint64(1) << length) - np.uint64(1)) << start
    joined = (a.astype(np.uint64) << start) & mask | b.astype(np.uint64) & ~mask
    return (joined & np.uint64(0xFFFFFFFF)).astype(np.uint32)


# The lanes of a warp hold a matrix together: lane 4 g + t has rows g, g + 8 and columns around t. An order says where each
# element of a matrix lies in [lanes, elements of a lane]. ("Matrix Fragments for mma" in the PTX ISA.)
_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def _order(shape: tuple[int, int], elements: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """elements: rows and columns [32] of each element of a lane."""
    order = np.empty(shape, np.intp)
    for place, (row, column) in enumerate(elements):
        order[row, column] = _LANE * len(elements) + place
    return order


def accumulators(width: int) -> np.ndarray:
    """Returns the order of 16 rows of sums: each lane has two columns of eight, in rows g and g + 8."""
    blocks = [(b, i, c) for b in range(width // 8) for i in range(2) for c in range(2)]
    return _order((16, width), [(_G + 8 * i, 8 * b + 2 * _T + c) for b, i, c in blocks])


A_HALF = _order((16, 16), [(_G + 8 * i, 8 * h + 2 * _T + c) for h in range(2) for i in range(2) for c in range(2)])
B_HALF = _order((16, 8), [(8 * h + 2 * _T + c, _G) for h in range(2) for c in range(2)])
A_TF32 = _order((16, 8), [(_G + 8 * i, _T + 4 * h) for h in range(2) for i in range(2)])
B_TF32 = _order((8, 8), [(_T + 4 * h, _G) for h in range(2)])


def matrices(registers: np.ndarray, order: np.ndarray, kind: str) -> np.ndarray:  # -> [warps, rows, columns] float32
    """Returns the matrices of numbers of a kind (f32, tf32, bf16, f16) that warps hold in registers [warps, 32, count]."""
    if kind in HALVES:
        return HALVES[kind](np.ascontiguousarray(registers).view(np.uint16).reshape(len(registers), -1)[:, order])
    each = registers.reshape(len(registers), -1)[:, order]
    return truncated_tf32(each) if kind == "tf32" else each.view(np.float32)


def fragments(values: np.ndarray, order: np.ndarray) -> np.ndarray:  # [warps, rows, columns] -> [warps, 32, elements]
    """Returns the elements of each lane."""
    out = np.empty((len(values), order.size), values.dtype)
    out[:, order.ravel()] = values.reshape(len(values), -1)
    return out.reshape(len(values), 32, -1)
