"""The text of PTX -> kernels: parameters, registers, instructions with their lines."""

from __future__ import annotations

import math
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


def registers(operands: tuple[Operand, ...]) -> Iterator[Register]:
    """Yields the registers in operands."""
    for operand in operands:
        if isinstance(operand, Register):
            yield operand
        elif isinstance(operand, Vector):
            yield from registers(operand.items)
        elif isinstance(operand, Address):
            yield from registers((operand.base,))


@dataclass
class Kernel:
    name: str
    parameters: list[tuple[int, int]] = field(default_factory=list)  # offset and size of each
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of an instruction
    addresses: dict[str, int] = field(default_factory=dict)  # of parameters and shared variables
    threads: range = range(1, 1025)  # that a program may have
    # how many in each bank
    registers: dict[str, int] = field(
        default_factory=lambda: {"pred": 0, "16": 0, "32": 0, "64": 0}
    )

    @property
    def parameter_bytes(self) -> int:
        return sum(self.parameters[-1]) if self.parameters else 0


_TOKEN = re.compile(
    r"""\s*(?:
    (?P<entry>\.visible\s+\.entry\s+(?P<name>\w+)\s*\((?P<parameters>[^)]*)\))
    | (?P<open>\{) | (?P<close>\}) | (?P<label>[$\w]+):
    | \.loc\s+(?P<file>\d+)\s+(?P<at>\d+)[^\n]*
    | \.reg\s+\.(?P<kind>\w+)\s+(?P<names>[^;]+);
    | \.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(?P<shared>\w+)\[\];
    | \.(?:pragma|file|version|target|address_size|global)\b[^\n]*
    | \.(?P<bound>reqntid|maxntid)\s+(?P<threads>\d+(?:\s*,\s*\d+)*)
    | \.(?:maxnreg|minnctapersm)\b[^\n]*
    | (?P<end>\.section|$)
    | (?:@(?P<negated>!?)(?P<predicate>[%$\w]+)\s+)?(?P<opcode>[a-z][\w.:]*)(?P<operands>[^;]*);
    )""",
    re.VERBOSE,
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w(\d+)\s+(?:\.ptr\S*\s+(?:\.global\s+)?(?:\.align\s+\d+\s+)?)?(\w+)(?:\[(\d+)\])?"
)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_NUMBER = re.compile(r"(-?)(?:0[fFdDxX]([0-9A-Fa-f]+)|(\d+))U?")


class _Parser:
    def __init__(self, text: str):
        self.kernels: dict[str, Kernel] = {}
        self.shared: dict[str, int] = {}
        self.scopes: list[dict[str, Register]] = []  # of registers' names
        self.files = {number: Path(name).name for number, name in _FILE.findall(text)}
        self.source = "?"
        self.line = 1
        position = 0
        text = re.sub(r"//[^\n]*", "", text)
        while token := _TOKEN.match(text, position):
            begin = token.end() - len(token[0].lstrip())
            self.line += text.count("\n", position, begin)
            self.take(token)
            self.line += text.count("\n", begin, token.end())
            position = token.end()
            if token["end"] is not None:
                return
        raise self.fail(text[position:].strip().partition("\n")[0])

    def fail(self, text: str) -> UnknownPTXError:
        return UnknownPTXError(
            f"line {self.line} ({self.source}): expected PTX that tests/ptx knows, got {text!r}"
        )

    def take(self, token: re.Match) -> None:
        if token["entry"]:
            self.kernel = self.kernels[token["name"]] = Kernel(
                token["name"], addresses=dict(self.shared)
            )
            self.parameters(token["parameters"])
        elif token["bound"]:
            count = math.prod(map(int, token["threads"].split(",")))
            least = count if token["bound"] == "reqntid" else 1
            self.kernel.threads = range(least, count + 1)
        elif token["open"]:
            self.scopes.append({})
        elif token["close"]:
            self.scopes.pop()
        elif token["label"]:
            self.kernel.labels[token["label"]] = len(self.kernel.instructions)
        elif token["file"]:
            self.source = f"{self.files.get(token['file'], '?')}:{token['at']}"
        elif token["kind"]:
            self.declare(token["kind"], token["names"])
        elif token["shared"]:
            self.shared[token["shared"]] = 0  # all dynamic shared memory begins at 0
        elif token["opcode"]:
            self.kernel.instructions.append(self.instruction(token))

    def parameters(self, text: str) -> None:
        end = 0
        for parameter in filter(None, map(str.strip, text.split(","))):
            match = _PARAMETER.fullmatch(parameter)
            if not match:
                raise self.fail(parameter)
            align, bits, name, count = match.groups()
            size = int(bits) // 8
            end += -end % int(align or size)
            self.kernel.addresses[name] = end
            self.kernel.parameters.append((end, size * int(count or 1)))
            end = self.kernel.parameter_bytes

    def declare(self, kind: str, names: str) -> None:
        """Declares registers: %r<3> stands for %r0, %r1 and %r2."""
        bank, counts = kind if kind == "pred" else kind[1:], self.kernel.registers
        if bank not in counts:
            raise self.fail(f".reg .{kind}")
        for name in map(str.strip, names.split(",")):
            stem, _, count = name.partition("<")
            every = [name]
            if count:
                every = [f"{stem}{i}" for i in range(int(count.rstrip(">")))]
            for each in every:
                self.scopes[-1][each] = Register(bank, counts[bank])
                counts[bank] += 1

    def instruction(self, token: re.Match) -> Instruction:
        predicate = self.operand(token["predicate"]) if token["predicate"] else None
        operands = tuple(map(self.operand, _OPERAND.findall(token["operands"])))
        text = " ".join(token[0].split())
        return Instruction(
            token["opcode"],
            operands,
            predicate,
            token["negated"] == "!",
            self.line,
            text,
            self.source,
        )

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "{":
            return Vector(tuple(map(self.operand, text[1:-1].split(","))))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Address(self.operand(base), int(offset or 0))
        if "|" in text:  # a result and a predicate
            return Vector(tuple(map(self.operand, text.split("|"))))
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text in ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x"):
            return Special(text[1:])
        if match := _NUMBER.fullmatch(text):
            sign, bits, decimal = match.groups()
            if bits:
                return Immediate(int(f"{sign}{bits}", 16))
            return Immediate(int(f"{sign}{decimal}"))
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise self.fail(text)


def parse(text: str) -> dict[str, Kernel]:
    """Returns the kernels by their names."""
    return _Parser(text).kernels
