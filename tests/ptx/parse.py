"""The text of PTX -> kernels: parameters, registers and instructions, each with its line in the PTX and in the source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class UnknownPTXError(Exception):
    """PTX that is not supported. The message names the line."""


class Register(NamedTuple):
    bank: str  # "pred", "16", "32" or "64": registers of one width
    index: int  # in the bank


class Immediate(NamedTuple):
    bits: int  # of an integer, which may be negative, or of a floating-point number


class Special(NamedTuple):
    name: str  # tid.x, ctaid.x, ntid.x, nctaid.x


class Symbol(NamedTuple):
    name: str  # of a parameter, a shared variable or a label


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    items: tuple[Operand, ...]


Operand = Register | Immediate | Special | Symbol | Address | Vector


@dataclass
class Instruction:
    opcode: str  # with all modifiers
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    line: int  # in the PTX, from 1
    text: str
    source: str  # file:line

    def __str__(self) -> str:
        return f"line {self.line} ({self.source}): {self.text}"

    def registers(self, operands: tuple[Operand, ...] | None = None) -> Iterator[Register]:
        """Yields the registers in operands, by default in all."""
        for operand in self.operands if operands is None else operands:
            if isinstance(operand, Register):
                yield operand
            elif isinstance(operand, Vector):
                yield from self.registers(operand.items)
            elif isinstance(operand, Address) and isinstance(operand.base, Register):
                yield operand.base


class Parameter(NamedTuple):
    offset: int
    size: int


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of an instruction
    registers: dict[str, int] = field(default_factory=lambda: {"pred": 0, "16": 0, "32": 0, "64": 0})  # in each bank
    shared: dict[str, int] = field(default_factory=dict)  # variable -> address

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


_BANKS = {"pred": "pred", **{f"{kind}{bits}": str(bits) for kind in "busf" for bits in (16, 32, 64)}}
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w(\d+)\s+(?:\.ptr\S*\s+(?:\.global\s+)?(?:\.align\s+\d+\s+)?)?(\w+)(?:\[(\d+)\])?"
)
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+([^;]+)")
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]")
_STATEMENT = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}|0[xX][0-9A-Fa-f]+|\d+)U?")
_SPECIAL = {"%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x"}
_IGNORED = (
    ".loc",
    ".pragma",
    ".file",
    ".version",
    ".target",
    ".address_size",
    ".global",
    ".reqntid",
    ".maxnreg",
    ".maxntid",
    ".minnctapersm",
)


def _number(text: str) -> int:
    text = text.removesuffix("U")
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("-")
    return sign * int(digits[2:], 16) if digits[1:2] in tuple("fFdDxX") else sign * int(digits)


def _split(text: str) -> Iterator[str]:
    """Yields the parts between commas that are outside of brackets."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    if last := text[start:].strip():
        yield last


class _Parser:
    def __init__(self, text: str):
        self.kernels: dict[str, Kernel] = {}
        self.files = {number: Path(path).name for number, path in _FILE.findall(text)}
        self.shared: dict[str, int] = {}
        self.kernel: Kernel | None = None
        self.scopes: list[dict[str, Register]] = []
        self.source, self.line = "?", 0
        head = ""  # of a kernel, up to the end of its parameters
        for self.line, raw in enumerate(text.split("\n"), 1):
            line = raw.partition("//")[0].strip()
            if line.startswith(".section"):
                break
            if head or ".entry" in line:
                head += line + " "
                if ")" in line:
                    self.begin(head)
                    self.statements(head.partition(")")[2].strip())
                    head = ""
                continue
            self.statements(line)

    def fail(self, text: str) -> UnknownPTXError:
        return UnknownPTXError(f"line {self.line} ({self.source}): expected PTX that tests/ptx knows, got {text!r}")

    def begin(self, head: str) -> None:
        name, _, parameters = head.partition(".entry")[2].partition("(")
        self.kernel = Kernel(name.strip(), shared=self.shared)
        at = 0
        for text in filter(None, (part.strip() for part in parameters.partition(")")[0].split(","))):
            match = _PARAMETER.fullmatch(text)
            if not match:
                raise self.fail(text)
            align, bits, parameter, count = match.groups()
            size = int(bits) // 8
            at += -at % int(align or size)
            self.kernel.parameters[parameter] = Parameter(at, size * int(count or 1))
            at += size * int(count or 1)
        self.kernels[self.kernel.name] = self.kernel

    def statements(self, line: str) -> None:
        while line:
            if line[0] == "{":
                self.scopes.append({})
                line = line[1:].lstrip()
            elif line[0] == "}":
                self.scopes.pop()
                line = line[1:].lstrip()
            elif line.endswith(":"):
                self.kernel.labels[line[:-1]] = len(self.kernel.instructions)
                return
            elif line[0] == ".":
                self.directive(line)
                return
            else:
                statement, end, line = line.partition(";")
                if not end:
                    raise self.fail(statement)
                self.kernel.instructions.append(self.instruction(statement.strip()))
                line = line.lstrip()

    def directive(self, line: str) -> None:
        if match := _LOC.match(line):
            self.source = f"{self.files.get(match[1], '?')}:{match[2]}"
        elif match := _SHARED.match(line):
            self.shared[match[1]] = 0  # all dynamic shared memory begins at 0
        elif match := _DECLARED.match(line):
            self.declare(*match.groups())
        elif not line.startswith(_IGNORED):
            raise self.fail(line)

    def declare(self, kind: str, names: str) -> None:
        if kind not in _BANKS:
            raise self.fail(f".reg .{kind}")
        bank, counts = _BANKS[kind], self.kernel.registers
        for name in map(str.strip, names.split(",")):
            stem, _, count = name.partition("<")
            every = [f"{stem}{i}" for i in range(int(count.rstrip(">")))] if count else [name]
            for each in every:
                self.scopes[-1][each] = Register(bank, counts[bank])
                counts[bank] += 1

    def instruction(self, text: str) -> Instruction:
        match = _STATEMENT.fullmatch(text)
        if not match:
            raise self.fail(text)
        negated, predicate, opcode, operands = match.groups()
        return Instruction(
            opcode, tuple(self.operand(part) for part in _split(operands)), self.operand(predicate) if predicate else None,
            negated == "!", self.line, text, self.source,
        )  # fmt: skip

    def operand(self, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if text[0] == "[":
            base, plus, offset = text[1:-1].partition("+")
            return Address(self.operand(base.strip()), _number(offset.strip()) if plus else 0)
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text in _SPECIAL:
            return Special(text[1:])
        if _NUMBER.fullmatch(text):
            return Immediate(_number(text))
        if "|" in text:  # a result and a predicate
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise self.fail(text)


def parse(text: str) -> dict[str, Kernel]:
    """Returns the kernels by their names."""
    return _Parser(text).kernels
