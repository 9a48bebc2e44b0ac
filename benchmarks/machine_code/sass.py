"""Reads SASS, NVIDIA's machine code, as cuobjdump prints it: loops, and what a warp asks of the
units of a multiprocessor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LANES = 32  # threads of a warp


class Instruction(NamedTuple):
    """An instruction, e.g. `@P0 LDG.E.128 R4, [R2.64]` at address 0x120."""

    address: int
    predicate: str  # "@P0", "@!UP1" or ""
    name: str  # "LDG.E.128"
    operands: str

    @property
    def family(self) -> str:
        """The first part of the name, "LDG"."""
        return self.name.split(".")[0]


_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.MULTILINE)


def functions(text: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each function, up to its end.

    What follows the last instruction that every thread reaches are slow paths and padding.
    """
    parts = _FUNCTION.split(text)
    return {name: _parse(code) for name, code in zip(parts[1::2], parts[2::2])}


def _parse(text: str) -> list[Instruction]:
    instructions = []
    for address, predicate, name, operands in _LINE.findall(text):
        made = Instruction(int(address, 16), predicate.strip(), name, operands.strip())
        instructions.append(made)
        if (made.family, made.predicate) == ("EXIT", ""):
            break
    return instructions


class Loop(NamedTuple):
    """The addresses of the first and the last instruction of a loop."""

    first: int
    last: int

    def has(self, other: Loop) -> bool:
        """Whether the other loop is inside this one."""
        return self != other and self.first <= other.first and other.last <= self.last

    def body(self, instructions: Iterable[Instruction]) -> list[Instruction]:
        """Returns the loop's instructions among these."""
        return [made for made in instructions if self.first <= made.address <= self.last]


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Returns the loops: the jumps backwards. Of those with one beginning the longest counts."""
    last: dict[int, int] = {}
    for made in instructions:
        target = re.search(r"0x([0-9a-f]+)", made.operands)
        if made.family == "BRA" and target and int(target[1], 16) < made.address:
            first = int(target[1], 16)
            last[first] = max(last.get(first, 0), made.address)
    return [Loop(*ends) for ends in sorted(last.items())]


def innermost(instructions: Sequence[Instruction]) -> list[Loop]:
    """Returns the loops with tensor-core instructions that have no such loop inside."""
    every = [loop for loop in loops(instructions) if tensor_macs(loop.body(instructions))]
    return [loop for loop in every if not any(loop.has(other) for other in every)]


def without(instructions: Iterable[Instruction], inside: Iterable[Loop]) -> list[Instruction]:
    """Returns the instructions that are in none of these loops."""
    taken = {made.address for loop in inside for made in loop.body(instructions)}
    return [made for made in instructions if made.address not in taken]


def around(instructions: Sequence[Instruction], inside: Sequence[Loop]) -> list[Instruction]:
    """Returns the body of the smallest loop that has all of these inside, else everything."""
    outer = [loop for loop in loops(instructions) if all(loop.has(each) for each in inside)]
    if not outer:
        return list(instructions)
    return min(outer, key=lambda loop: loop.last - loop.first).body(instructions)


# The units of each family of instructions. Of other families only the issue counts.
_FAMILIES = {
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HADD2 HMUL2 HFMA2",
    "imad": "IMAD",
    "alu": "BMSK CS2R F2FP FCHK FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSET2 HSETP2 IABS IADD IADD3 "
    "ICMP I2FP IMNMX ISETP LEA LOP LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD "
    "VIADDMNMX VIMNMX VIMNMX3 VOTE",
    "mufu": "BREV F2F F2I FLO FRND I2F MUFU POPC",
    "shuffle": "SHFL",
    "shared": "LDS LDSM STS STSM LDGSTS LDL STL",  # the last two are of spilled registers
    "mma.sync": "HMMA",
    "tensor": "HGMMA",
}
_UNIT_OF = {family: unit for unit, names in _FAMILIES.items() for family in names.split()}


def counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """Returns what the instructions ask of the units for a warp, and as "issue" their number.

    It is a number of instructions, of "shared" of bytes (with wgmma's operands), of "mma.sync" and
    "tensor" (wgmma) of multiply-adds. Branches count as if every warp went through them.
    """
    asked: Counter[str] = Counter()
    for made in instructions:
        asked["issue"] += 1
        unit = _UNIT_OF.get(made.family)
        if unit in ("mma.sync", "tensor"):
            asked[unit] += _macs(made)
            asked["shared"] += _wgmma_operands(made)
        elif unit == "shared":
            asked["shared"] += _shared_bytes(made)
        elif unit:
            asked[unit] += 1
    return asked


def tensor_macs(instructions: Iterable[Instruction]) -> int:
    """Returns the multiply-adds of a warp in the tensor cores."""
    asked = counts(instructions)
    return asked["tensor"] + asked["mma.sync"]


def tensor_instructions(instructions: Iterable[Instruction]) -> int:
    """Returns how many instructions are of the tensor cores."""
    return sum(_UNIT_OF.get(made.family) in ("mma.sync", "tensor") for made in instructions)


# Rows, columns and depth of mma.sync, by SASS's name for the shape.
_HMMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}
_WIDTHS = ("U8", "S8", "U16", "S16", "64", "128")  # bits of an access; without one they are 32
_WARPS = 4  # that execute a wgmma together


def _hgmma(made: Instruction) -> tuple[int, int, int]:
    """Returns M, N and K of a wgmma."""
    m, n, k = (int(size) for size in made.name.split(".")[1].split("x"))
    return m, n, k


def _macs(made: Instruction) -> int:
    if made.family == "HGMMA":
        m, n, k = _hgmma(made)
        return m * n * k // _WARPS
    m, n, k = _HMMA[made.name.split(".")[1]]
    return m * n * k


def _wgmma_operands(made: Instruction) -> int:
    """Returns the bytes of shared memory that a warp's part of a wgmma reads by descriptors.

    `gdesc` first among the sources means that both operands are there; A may be in registers.
    """
    if made.family != "HGMMA":
        return 0
    m, n, k = _hgmma(made)
    itemsize = 4 if "TF32" in made.name else 2
    in_registers = not made.operands.split(",")[1].strip().startswith("gdesc")
    return (n if in_registers else m + n) * k * itemsize // _WARPS


def _shared_bytes(made: Instruction) -> int:
    """Returns the bytes of shared memory that a warp reads or writes."""
    if made.predicate == "@!PT":  # never executed
        return 0
    words = made.name.split(".")
    if made.family in ("LDSM", "STSM"):
        matrices = next((int(word) for word in words if word in ("2", "4")), 1)
        return matrices * 8 * 8 * 2
    bits = next((int(word.lstrip("US")) for word in words if word in _WIDTHS), 32)
    return LANES * bits // 8
