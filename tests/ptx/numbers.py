"""Arithmetic as the hardware does it: types, rounding, integers, and the matrices that the lanes of
a warp hold together.

What is not as in hardware: the approximate functions (ex2, lg2, rcp, div) are rounded correctly,
and the sums of a tensor core are sums in float32 in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

TF32_MASK = np.uint32(0xFFFFE000)
# bits of a float64's mantissa that float32 lacks
_HALFWAY, _BELOW_FLOAT32 = np.int64(1 << 28), np.int64((1 << 29) - 1)


def flushed(x: np.ndarray) -> np.ndarray:
    """Returns float32 numbers with 0 of the same sign for denormal ones (.ftz)."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Returns a b + c of float32, rounded once.

    In float64 the product is exact, and the sum is rounded to 53 bits, then to 24. This differs
    from one rounding only where the first one makes a tie: there the sum moves by its own error.
    (Denormal results may be rounded twice.)
    """
    product, wide = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = product + wide
    bits = total.view(np.int64)
    tie = (bits & _BELOW_FLOAT32) == _HALFWAY
    if tie.any():
        back = total - product
        error = (product - (total - back)) + (wide - back)  # of the sum, exactly
        away = np.where((error > 0) == (total > 0), 1, -1)
        total = np.where(tie & (error != 0), bits + away, bits).view(np.float64)
    return total.astype(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Returns the bits of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Returns the bits of float32 numbers rounded to TF32, ties away from zero (cvt.rna)."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & TF32_MASK
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def truncated_tf32(bits: np.ndarray) -> np.ndarray:
    """Returns what a tensor core reads of a register in TF32: it ignores the low 13 bits."""
    return (bits & TF32_MASK).view(np.float32)


def same(x: Any) -> Any:
    return x


class Type(NamedTuple):
    """How registers hold the numbers of a type."""

    bank: str  # of registers: "pred", "16", "32" or "64"
    decode: Callable[[np.ndarray], np.ndarray]  # bits -> numbers; halves as float32
    encode: Callable[[np.ndarray], np.ndarray]  # numbers -> bits


def _plain(letter: str, bits: int) -> Type:
    word, number = np.dtype(f"u{bits // 8}"), np.dtype(f"{letter}{bits // 8}")
    return Type(
        str(bits), lambda x: x.view(number), lambda x: x.astype(number, copy=False).view(word)
    )


def _two(decode: Callable, encode: Callable) -> Type:
    """Returns the type of two halves in a register, the low one first: [lanes, 2]."""
    return Type(
        "32",
        lambda x: decode(x.view(np.uint16)).reshape(-1, 2),
        lambda x: encode(x).view(np.uint32)[:, 0],
    )


BANKS = {"pred": np.dtype(bool), **{str(bits): np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)}}
# What registers hold before they are written: NaN as a number of any floating-point type, and as an
# address one outside of all memory.
POISON = {"pred": True, "16": 0x7FC0, "32": 0x7FC07FC0, "64": 0x7FC07FC07FC07FC0}
TYPES = {
    f"{kind}{bits}": _plain(letter, bits)
    for kind, letter in zip("busf", "uuif")
    for bits in (16, 32, 64)
}
TYPES |= {
    "pred": Type("pred", same, lambda x: x.astype(bool, copy=False)),
    "bf16": Type("16", from_bf16, to_bf16),
    "f16": Type("16", from_f16, to_f16),
    "tf32": Type("32", truncated_tf32, to_tf32),
    "f32x2": Type(
        "64", lambda x: x.view(np.float32).reshape(-1, 2), lambda x: x.view(np.uint64)[:, 0]
    ),
    "bf16x2": _two(from_bf16, to_bf16),
    "f16x2": _two(from_f16, to_f16),
}


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a / b of integers, rounded to zero; all bits set where b is 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    quotient += ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(quotient.dtype)
    return np.where(b == 0, ~quotient.dtype.type(0), quotient)


def shifted(x: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """Returns x shifted by counts that may be larger than its width."""
    bits = x.dtype.itemsize * 8
    kept = np.minimum(count, bits - 1).astype(x.dtype)
    moved = x << kept if left else x >> kept
    filled = x.dtype.kind == "i" and not left  # with the sign
    return moved if filled else np.where(count >= bits, x.dtype.type(0), moved)


def extracted(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns bfe of 32 bits: `length` bits from `start` on, with the sign if x has one."""
    start, length = (np.minimum(each & 255, 32).astype(np.int64) for each in (start, length))
    wide = x.astype(np.int64)
    mask = (np.int64(1) << length) - 1
    last = np.clip(start + length - 1, 0, 31)
    field = wide >> start & mask
    negative = (x.dtype.kind == "i") & (length > 0) & (wide >> last & 1 == 1)
    return np.where(negative, field | ~mask, field).astype(x.dtype)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Returns prmt: byte i is the byte of b:a that digit i of the selector names, or its sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros(both.shape, np.uint64)
    for i in range(4):
        digit = (selector >> 4 * i & 15).astype(np.uint64)
        byte = both >> 8 * (digit & 7) & 255
        sign = np.where(byte >> 7, 255, 0).astype(np.uint64)
        result |= np.where(digit & 8, sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def inserted(a: np.ndarray, b: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns bfi of 32 bits: the low `length` bits of a at bit `start` of b."""
    start, length = (np.minimum(each & 255, 32).astype(np.uint64) for each in (start, length))
    mask = ((np.uint64(1) << length) - np.uint64(1)) << start
    return (a.astype(np.uint64) << start & mask | b & ~mask).astype(np.uint32)


# The lanes of a warp hold a matrix together: lane 4 g + t has rows g, g + 8 and columns around t.
# An order says where each element of a matrix lies in [lanes, elements of a lane]. ("Matrix
# Fragments for mma" in the PTX ISA.)
_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def _order(shape: tuple[int, int], elements: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """elements: rows and columns [32] of each element of a lane."""
    order = np.empty(shape, np.intp)
    for place, (row, column) in enumerate(elements):
        order[row, column] = _LANE * len(elements) + place
    return order


def accumulators(width: int) -> np.ndarray:
    """Returns the order of 16 rows of sums: rows g and g + 8, two columns of each eight."""
    blocks = [(b, i, c) for b in range(width // 8) for i in range(2) for c in range(2)]
    return _order((16, width), [(_G + 8 * i, 8 * b + 2 * _T + c) for b, i, c in blocks])


# Left and right operands of a product of 16 rows and 8 columns.
LEFT_HALF = accumulators(16)
RIGHT_HALF = _order((16, 8), [(8 * h + 2 * _T + c, _G) for h in range(2) for c in range(2)])
LEFT_TF32 = _order((16, 8), [(_G + 8 * i, _T + 4 * h) for h in range(2) for i in range(2)])
RIGHT_TF32 = _order((8, 8), [(_T + 4 * h, _G) for h in range(2)])


def matrices(words: np.ndarray, order: np.ndarray, kind: str) -> np.ndarray:
    """Returns the matrices [warps, rows, columns] that whole warps hold in words [lanes, n].

    kind: the type of the elements, of 16 or 32 bits.
    """
    bits = words.view(np.uint16) if TYPES[kind].bank == "16" else words
    return TYPES[kind].decode(bits.reshape(-1, order.size)[:, order])


def fragments(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the elements of each lane, [lanes, elements], of matrices [warps, rows, columns]."""
    out = np.empty((len(values), order.size), values.dtype)
    out[:, order.ravel()] = values.reshape(len(values), -1)
    return out.reshape(-1, order.size // 32)
