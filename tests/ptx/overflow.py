"""Whether the addresses of a kernel hold at sizes that no memory here has: bounds of its integers.

A number of 32 bits that may reach 2^31, and that is part of an address in global memory, is an
error: a product of an index and a stride has to be one of 64 bits. Bounds are those of absolute
values, from what the sizes, the programs, the threads and the masks are at most.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ptx.parse import Immediate, Instruction, Kernel, Register, Special, registers

LIMIT = 1 << 31
THREADS = 1 << 10
SHARED = 1 << 18  # bytes
WIDE = 1 << 40  # a parameter of 64 bits
# the bound of a result from the bounds of the sources
_BOUNDS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a + b,
    "or": lambda a, b: a + b,
    "xor": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "shl": lambda a, count: a << min(count, 32),
    "shr": lambda a, count: a >> count,
    "and": min,
    "min": min,
    "rem": min,
    "max": max,
    "div": lambda a, b: a,
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "neg": lambda a: a,
    "not": lambda a: a + 1,
    "abs": lambda a: a,
    "selp": lambda a, b, chosen: max(a, b),
    "bfe": lambda a, start, count: (1 << count) - 1,
}


class Bounds:
    """Bounds of a kernel's registers of 32 bits.

    sizes: a bound of parameters, of what is loaded, and of how often a loop runs. named: bounds of
    single parameters, by their places.
    """

    def __init__(self, kernel: Kernel, programs: int, sizes: int, named: Mapping[int, int]):
        self.kernel, self.sizes = kernel, sizes
        self.special = {"tid.x": THREADS, "ntid.x": THREADS}
        self.special |= {"ctaid.x": programs, "nctaid.x": programs}
        self.parameters = {kernel.parameters[place][0]: bound for place, bound in named.items()}
        self.definitions: dict[Register, list[Instruction]] = defaultdict(list)
        for i in kernel.instructions:
            if not i.opcode.startswith(("st", "cp.async")):
                for register in registers(i.operands[:1]):
                    self.definitions[register].append(i)
        self.known: dict[Register, int] = {}

    def of(self, operand: Any) -> int:
        """Returns the bound of an operand."""
        if isinstance(operand, Immediate):
            bits = operand.bits % (1 << 32)
            return min(bits, (1 << 32) - bits)
        if isinstance(operand, Special):
            return self.special[operand.name]
        if not isinstance(operand, Register):
            return SHARED
        if operand not in self.known:
            self.known[operand] = self.sizes  # where a loop comes back to it
            self.known[operand] = max(map(self.of_result, self.definitions[operand]), default=0)
        return self.known[operand]

    def of_result(self, i: Instruction) -> int:
        name, *kind = i.opcode.split(".")
        if name == "ld":
            base = i.operands[1].base
            at = self.kernel.addresses.get(getattr(base, "name", ""), 0) + i.operands[1].offset
            if kind[0] == "param" and kind[-1].endswith("64"):
                return WIDE
            return self.parameters.get(at, self.sizes) if kind[0] == "param" else self.sizes
        if name not in _BOUNDS:
            return LIMIT - 1
        bounds = [*map(self.of, i.operands[1:])]
        if name == "mul" and (divided := self.divided(i)):
            return self.of(divided)
        if name == "sub":  # a % b is computed as a - a / b * b
            for product in self.definitions[i.operands[2]]:
                if product.opcode == "mul.lo.s32" and self.divided(product) == i.operands[1]:
                    return min(bounds[0], *map(self.of, product.operands[1:]))
        return _BOUNDS[name](*bounds)

    def divided(self, product: Instruction) -> Register | None:
        """Returns a of a product a / b * b."""
        _, *factors = product.operands
        for quotient, divisor in (factors, factors[::-1]):
            for i in self.definitions.get(quotient, ()):
                if i.opcode.startswith("div") and i.operands[2] == divisor:
                    return i.operands[1]
        return None


def _of_addresses(bounds: Bounds) -> Iterator[Instruction]:
    """Yields the instructions of which addresses in global memory are made."""
    found: set[Register] = set()
    left: list[Register] = []
    for i in bounds.kernel.instructions:
        if i.opcode.startswith(("ld.global", "st.global", "cp.async.c")):
            left += registers(i.operands[:1] if i.opcode.startswith("st") else i.operands[1:2])
    while left:
        register = left.pop()
        if register in found or register.bank == "pred":
            continue
        found.add(register)
        for i in bounds.definitions[register]:
            yield i
            if not i.opcode.startswith("ld"):
                left += registers(i.operands[1:])


def overflows(
    kernel: Kernel,
    *,
    programs: int = 1 << 20,
    sizes: int = 1 << 23,
    named: Mapping[int, int] | None = None,
) -> list[str]:
    """Returns the instructions that may overflow. programs, sizes, named: see `Bounds`."""
    bounds = Bounds(kernel, programs, sizes, named or {})
    found = []
    for i in _of_addresses(bounds):
        narrow = isinstance(i.operands[0], Register) and i.operands[0].bank == "32"
        if narrow and bounds.of_result(i) >= LIMIT:
            found.append(f"{i}: a bound of 2^{math.log2(bounds.of_result(i)):.1f}")
    return found
