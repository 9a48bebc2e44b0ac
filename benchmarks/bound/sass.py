"""The machine code of a kernel: its loops, and for each part the instructions by the pipe that executes them.

Clocks are those of one multiprocessor of four partitions, each of which issues an instruction of a warp a clock.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.bound.assumed import Multiprocessor
from benchmarks.bound.ptx import Instruction, Loop, nested

PIPES = ("issue", "tensor", "fma", "alu", "mufu", "lsu")
PARTITIONS = 4
WARP = 32

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.MULTILINE)
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_TENSOR = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA", "OMMA", "UTCHMMA")
_FMA = ("FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FMUL2", "FADD2", "DFMA")
_MUFU = ("MUFU", "I2F", "I2FP", "F2I", "F2F", "POPC", "FLO")
_LSU = (
    "LDS",
    "STS",
    "LDSM",
    "STSM",
    "LDG",
    "STG",
    "LDGSTS",
    "LD",
    "ST",
    "LDL",
    "STL",
    "LDC",
    "SHFL",
    "ATOM",
    "ATOMG",
    "ATOMS",
)
_LSU += ("RED", "UBLKCP", "UTMALDG", "UTMASTG")
# Instructions of a warp's scalar pipe, of control and of barriers: they take an issue slot and nothing else that counts.
_OTHER = ("R2UR", "S2R", "S2UR", "BRA", "BAR", "EXIT", "NOP", "DEPBAR", "LDGDEPBAR", "BSSY", "BSYNC", "WARPSYNC", "WARPGROUP")
_OTHER += ("MEMBAR", "FENCE", "ERRBAR", "SYNCS", "CALL", "RET", "BREAK", "YIELD", "CCTL", "ELECT", "ACQBULK", "CREDUX")
# Multiply-adds by the shape in an instruction's name, such as 16 x 8 x 16
_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
_SMALL = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "16832": 16 * 8 * 32}


def pipe(code: str) -> str:
    name = code.split(".")[0]
    if name in _TENSOR:
        return "tensor"
    if name in _MUFU:
        return "mufu"
    if name in _LSU:
        return "lsu"
    if name in _FMA:
        return "fma"
    return "issue" if name in _OTHER or name.startswith("U") else "alu"


@dataclass
class Part:
    """Instructions of a warp that run equally often."""

    codes: Counter[str] = field(default_factory=Counter)

    def count(self, which: str) -> int:
        return sum(n for code, n in self.codes.items() if pipe(code) == which)

    @property
    def products(self) -> int:
        """The number of matrix instructions; without any, that of float32 multiply-adds, if they are most of the part."""
        fused = self.codes["FFMA"] + 2 * self.codes["FFMA2"]
        return self.count("tensor") or (fused if 2 * fused > self.codes.total() else 0)

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds of products of one warp. A product of four warps together counts a quarter for each warp."""
        if not self.count("tensor"):
            return WARP * self.products
        return sum(n * _multiply_adds(code) for code, n in self.codes.items() if pipe(code) == "tensor")

    def clocks(self, warps: int, unit: Multiprocessor, rate: Callable[[str], float]) -> dict[str, float]:
        """Returns the clocks of all warps of a block on one multiprocessor, by pipe. rate: multiply-adds a clock."""
        lanes = {"fma": unit.fma, "alu": unit.alu, "mufu": unit.mufu}
        found = dict.fromkeys(PIPES, 0.0)
        for code, n in self.codes.items():
            found["issue"] += n / PARTITIONS
            of = pipe(code)
            if of == "tensor":
                found[of] += n * _multiply_adds(code) / rate(code)
            elif of in lanes:
                found[of] += n * _weight(code, unit) * WARP / lanes[of]
            elif of == "lsu":
                found[of] += n * _accesses(code, unit)
        return {name: clocks * warps for name, clocks in found.items()}


def _multiply_adds(code: str) -> float:
    if shape := _SHAPE.search(code):  # a product of four warps
        m, n, k = map(int, shape.groups())
        return m * n * k / 4
    return _SMALL.get(next((p for p in code.split(".") if p in _SMALL), ""), 0)


def _weight(code: str, unit: Multiprocessor) -> float:
    """Returns the length of an instruction in usual instructions of its pipe. Integer products run on 64 lanes only."""
    if code.startswith("IMAD"):
        return unit.fma / 64
    return 2 if code.split(".")[0] in ("FFMA2", "FMUL2", "FADD2") else 1


def _accesses(code: str, unit: Multiprocessor) -> float:
    """Returns the clocks that one instruction of a warp takes on the path to shared memory and to the cache."""
    parts = code.split(".")
    if parts[0] in ("LDSM", "STSM"):
        return int(parts[-1]) if parts[-1].isdigit() else 1
    if parts[0] in ("LDS", "STS", "LDGSTS", "LDG", "STG"):
        return max(1, access_bytes(code) * WARP / unit.shared)
    return 1


def access_bytes(code: str) -> int:
    """Returns the bytes that an instruction accesses for a thread."""
    for part in code.split(".")[1:]:
        if part in ("64", "128"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


@dataclass
class Code:
    """The code of a function. parts[0] is outside all loops; parts[k] is that of loops[k - 1] without its inner loops."""

    loops: list[Loop]
    parts: list[Part]

    @property
    def all(self) -> Counter[str]:
        return sum((part.codes for part in self.parts), Counter())


def parse(text: str) -> Code:
    """Parses the lines that cuobjdump -sass prints for one function."""
    lines = [(int(at, 16), code, rest) for at, code, rest in _LINE.findall(text)]
    edges = set()
    for at, code, rest in lines:
        if code.startswith("BRA") and (target := _TARGET.search(rest)) and int(target[1], 16) < at:
            edges.add((int(target[1], 16), at))
    last = max((at for at, code, _ in lines if code == "EXIT"), default=0)
    loops = nested({(first, end) for first, end in edges if first <= last})
    parts = [Part() for _ in range(len(loops) + 1)]
    for at, code, _ in lines:
        if code == "NOP":
            continue
        inside = [n for n, loop in enumerate(loops) if loop.first <= at <= loop.last]
        parts[inside[-1] + 1 if inside else 0].codes[code] += 1
    return Code(loops, parts)


_FLOATS = ("f32", "f16", "f16x2", "bf16", "bf16x2")
_PTX_MUFU = ("ex2", "rcp", "lg2", "sqrt", "rsqrt", "tanh")


def of_ptx(i: Instruction) -> str:
    """Returns the machine instruction that an instruction of PTX becomes, as `pipe` knows it; "" if it becomes none."""
    op, parts = i.parts[0], i.parts
    lanes = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    if op == "mma":
        shape = re.search(r"m16n8k(\d+)", i.code)[1]
        return f"HMMA.168{shape}" + ".TF32" * ("tf32" in i.code)
    if op == "ldmatrix":
        return f"LDSM.{next((p[1:] for p in parts if re.fullmatch(r'x[124]', p)), '1')}"
    if op in ("ld", "st") and "param" not in parts:
        width = {16: ".128", 8: ".64"}.get(lanes * int(re.search(r"\d+$", parts[-1])[0]) // 8, "")
        return ("LD" if op == "ld" else "ST") + ("S" if "shared" in parts else "G") + width
    if op == "cp":
        return "LDGSTS.128" if "global" in parts else ""
    if op in ("mov", "ld", "cvta", "ret", "bra"):
        return ""
    if op in ("bar", "barrier"):
        return "BAR"
    if op == "shfl":
        return "SHFL"
    if op in _PTX_MUFU:
        return "MUFU"
    if op == "cvt":
        kinds = {p[0] for p in parts[1:] if re.fullmatch(r"[subf]\d+(x2)?|bf16(x2)?", p)}
        return "I2F" if "f" in kinds and kinds & {"s", "u"} else "F2FP" if kinds & {"f", "b"} else ""
    if parts[-1] in _FLOATS:
        return {"fma": "FFMA", "mul": "FMUL", "add": "FADD", "sub": "FADD"}.get(op, "FSEL")
    return "IMAD" if op in ("mul", "mad") else "IADD3"
