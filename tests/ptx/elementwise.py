"""Instructions that compute one result of each lane's sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx import numbers
from ptx.instructions import Step, instruction, reader, writer
from ptx.numbers import BANKS
from ptx.parse import Instruction, Vector

if TYPE_CHECKING:
    from ptx.machine import Batch, Code, Lanes


def _doubled(x: np.ndarray) -> np.ndarray:
    return x.astype(f"{x.dtype.kind}{2 * x.itemsize}")


def _ordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


def _unordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _precisely(function: Callable) -> Callable:
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


# Opcode, where T stands for a type of integers, L for bits or pred, A for any type, H for bf16 or
# f16, W for two of these, and ? follows what may be left out; types of the result and of the
# sources (2T: twice as wide); the function.
_WILD = {
    "T": "[bsu](?:16|32|64)",
    "L": "b16|b32|b64|pred",
    "A": "[bsuf](?:16|32|64)|pred",
    "H": "bf16|f16",
    "W": "bf16x2|f16x2",
}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_SUMS_AND_PRODUCTS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_ELEMENTWISE: list[tuple[str, str, Callable]] = [
    ("add.T", "T T T", np.add),
    ("sub.T", "T T T", np.subtract),
    ("mul.lo.T", "T T T", np.multiply),
    ("min.T", "T T T", np.minimum),
    ("max.T", "T T T", np.maximum),
    ("div.T", "T T T", numbers.divided),
    ("rem.T", "T T T", lambda a, b: a - numbers.divided(a, b) * b),
    ("and.L", "L L L", np.bitwise_and),
    ("or.L", "L L L", np.bitwise_or),
    ("xor.L", "L L L", np.bitwise_xor),
    ("not.L", "L L", np.invert),
    ("neg.T", "T T", np.negative),
    ("abs.T", "T T", np.abs),
    ("mul.wide.T", "2T T T", lambda a, b: _doubled(a) * _doubled(b)),
    ("mad.wide.T", "2T T T 2T", lambda a, b, c: _doubled(a) * _doubled(b) + c),
    ("mad.lo.T", "T T T T", lambda a, b, c: a * b + c),
    ("shl.T", "T T u32", lambda x, count: numbers.shifted(x, count, left=True)),
    ("shr.T", "T T u32", lambda x, count: numbers.shifted(x, count, left=False)),
    ("bfe.T", "T T u32 u32", numbers.extracted),
    ("prmt.b32", "b32 b32 b32 u32", numbers.permuted),
    ("bfi.b32", "b32 b32 b32 u32 u32", numbers.inserted),
    *((f"setp.{name}.T", "pred T T", f) for name, f in _COMPARE.items()),
    *((f"setp.{name}.ftz?.f32", "pred f32 f32", _ordered(f)) for name, f in _COMPARE.items()),
    *((f"setp.{name}u.ftz?.f32", "pred f32 f32", _unordered(f)) for name, f in _COMPARE.items()),
    *((f"setp.{name}.H", "pred H H", _ordered(f)) for name, f in _COMPARE.items()),
    *((f"setp.{name}.W", "pred W W", _ordered(f)) for name, f in _COMPARE.items()),
    ("mov.A", "A A", numbers.same),
    ("cvta.to.global.u64", "u64 u64", numbers.same),
    ("selp.A", "A A A pred", lambda a, b, p: np.where(p, a, b)),
    *((f"{name}.rn?.ftz?.f32", "f32 f32 f32", f) for name, f in _SUMS_AND_PRODUCTS.items()),
    *((f"{name}.f32x2", "f32x2 f32x2 f32x2", f) for name, f in _SUMS_AND_PRODUCTS.items()),
    ("min.ftz?.f32", "f32 f32 f32", np.fmin),
    ("max.ftz?.f32", "f32 f32 f32", np.fmax),
    ("min.ftz?.f32", "f32 f32 f32 f32", lambda a, b, c: np.fmin(np.fmin(a, b), c)),
    ("max.ftz?.f32", "f32 f32 f32 f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    ("fma.rn.ftz?.f32", "f32 f32 f32 f32", numbers.fma),
    ("fma.rn.f32x2", "f32x2 f32x2 f32x2 f32x2", numbers.fma),
    *((f"div.{how}.ftz?.f32", "f32 f32 f32", np.divide) for how in ("full", "approx", "rn")),
    ("neg.ftz?.f32", "f32 f32", np.negative),
    ("abs.ftz?.f32", "f32 f32", np.abs),
    ("add.rn.f32.H", "f32 H f32", np.add),
    ("ex2.approx.ftz?.f32", "f32 f32", _precisely(np.exp2)),
    ("lg2.approx.ftz?.f32", "f32 f32", _precisely(np.log2)),
    *((f"rcp.{how}.ftz?.f32", "f32 f32", _precisely(np.reciprocal)) for how in ("approx", "rn")),
    ("cvt.rpi.ftz?.f32.f32", "f32 f32", np.ceil),
    ("cvt.rna.tf32.f32", "tf32 f32", numbers.same),
    ("cvt.rn.f32.T", "f32 T", numbers.same),
    ("cvt.f32.H", "f32 H", numbers.same),
    ("cvt.rn.H.f32", "H f32", numbers.same),
    ("cvt.rn.W.f32", "W f32 f32", lambda high, low: np.stack([low, high], 1)),
    *(
        (f"cvt.{kind}.T", f"{kind} T", numbers.same)
        for kind in ("u16", "s16", "u32", "s32", "u64", "s64")
    ),
]


def _elementwise(i: Instruction, kinds: list[str], function: Callable, code: Code) -> Step:
    """Returns a step that writes function(sources) to the first operand. kinds: of all operands."""
    write = writer(i.operands[0], kinds[0])
    reads = [reader(operand, kind, code) for operand, kind in zip(i.operands[1:], kinds[1:])]
    flushed = numbers.flushed if ".ftz" in i.opcode else numbers.same

    def run(batch: Batch, lanes: Lanes) -> None:
        values = [flushed(read(batch, lanes)) for read in reads]
        write(batch, lanes, flushed(function(*values)))

    return run


def _register(opcode: str, kinds: list[str], function: Callable) -> None:
    pattern = ""
    for part in opcode.split("."):
        wild = f"(?P<type>{_WILD[part]})" if part in _WILD else part
        pattern += rf"(\.{part[:-1]})?" if part.endswith("?") else rf"\.{wild}"

    @instruction(pattern.removeprefix(r"\."), len(kinds))
    def build(i: Instruction, match: re.Match, code: Code) -> Step:
        kind = match.groupdict().get("type", "")
        named = dict.fromkeys(_WILD, kind)
        if "2T" in kinds:
            named["2T"] = f"{kind[0]}{2 * int(kind[1:])}"
        return _elementwise(i, [named.get(each, each) for each in kinds], function, code)


@instruction(r"mov\.b(32|64)", 2)
def _move_parts(i, match, code):
    """Splits a register into parts, or joins parts; None if there are no parts."""
    parts = next((len(each.items) for each in i.operands if isinstance(each, Vector)), 0)
    if not parts:
        return None
    bits, splits = int(match[1]), isinstance(i.operands[0], Vector)
    to, of = (bits // parts, bits) if splits else (bits, bits // parts)
    write, read = writer(i.operands[0], f"b{to}"), reader(i.operands[1], f"b{of}", code)
    word, shape = BANKS[str(to)], (-1, parts) if splits else -1
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes).view(word).reshape(shape))


for _opcode, _kinds, _function in _ELEMENTWISE:
    _register(_opcode, _kinds.split(), _function)
