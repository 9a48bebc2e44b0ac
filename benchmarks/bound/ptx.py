"""Counts how often the parts of a kernel run, and its reads and writes, by computing its PTX's integers for a few threads.

Loops and addresses of a kernel depend on its integer arguments and on the indices of block and thread, hardly ever on what it
reads. So the instructions that lead to a branch or to an address are translated to Python and run; all others are left out.
A value that is read from memory counts as 0, and so does the result of an unknown instruction; an unknown predicate holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_LABEL = re.compile(r"^(\$\w+):")
_INSTRUCTION = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*?)\s*;")
_PARAMETER = re.compile(r"\.param\s+(?:\.align \d+ )?\.\w+[^,)]*?\b(\w+_param_\d+)")
_REGISTER = re.compile(r"%[a-z]+\d+")
_STEPS = 1 << 22  # most blocks that a thread may run: a longer run waits for a value that is not computed here
_FIRST = 4096  # number of a thread's first accesses to a tensor whose addresses are kept
_APART = 40  # log2 of the distance between tensors' addresses, by which `_touch` finds the tensor of an address
PRODUCTS = ("mma.", "wgmma.mma_async", "tcgen05.mma")


@dataclass
class Instruction:
    code: str
    operands: list[str]
    guard: str = ""  # register
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        return self.code.split(".")


@dataclass
class Block:
    """Instructions that run together. `target` is the block to which a branch at the end goes, if its guard holds."""

    instructions: list[Instruction] = field(default_factory=list)
    branch: Instruction | None = None
    target: int = -1


@dataclass(frozen=True)
class Loop:
    """Blocks from `first` to `last`, whose branch goes back to `first`. `own`: these blocks without those of inner loops."""

    first: int
    last: int
    own: tuple[int, ...]


@dataclass
class Reached:
    """The part of a tensor that one thread reads or writes."""

    lowest: int = 1 << 62
    end: int = 0
    bytes: int = 0
    first: list[tuple[int, int]] = field(default_factory=list)  # addresses and bytes of the first accesses


@dataclass
class Run:
    """The result of running one thread: how often each block ran; reads and writes, by the tensor's number."""

    counts: list[int]
    read: dict[int, Reached]
    written: dict[int, Reached]


def _operands(text: str) -> list[str]:
    """Returns the operands of an instruction; a group in braces or brackets is one operand."""
    found, depth, start = [], 0, 0
    for at, letter in enumerate(text + ","):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            found.append(text[start:at].strip())
            start = at + 1
    return [each for each in found if each]


class Kernel:
    """A kernel's blocks and loops."""

    def __init__(self, text: str) -> None:
        head, body = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\n}", text, re.DOTALL).groups()
        self.parameters = _PARAMETER.findall(head)
        for place, name in enumerate(self.parameters):
            body = re.sub(rf"\b{name}\b", str(parameter(place)), body)
        self.blocks, self._labels = [Block()], {}
        targets: list[tuple[int, str]] = []
        used = set(re.findall(r"\bbra(?:\.\w+)*\s+(\$\w+)", body))
        for raw in body.splitlines():
            line = raw.split("//")[0].strip()
            if label := _LABEL.match(line):
                if label[1] not in used:  # a label for the debugger
                    continue
                if self.blocks[-1].instructions or self.blocks[-1].branch or self._labels:
                    self.blocks.append(Block())
                self._labels[label[1]] = len(self.blocks) - 1
                continue
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            instruction = Instruction(match[3], _operands(match[4]), match[2] or "", match[1] == "!")
            if instruction.parts[0] in ("bra", "ret", "exit"):
                self.blocks[-1].branch = instruction
                targets.append((len(self.blocks) - 1, instruction.operands[0] if instruction.operands else ""))
                self.blocks.append(Block())
            else:
                self.blocks[-1].instructions.append(instruction)
        for at, label in targets:
            self.blocks[at].target = self._labels.get(label, len(self.blocks))
        self.loops = nested({(b.target, at) for at, b in enumerate(self.blocks) if b.branch and b.target <= at})
        self._run = self._translated()

    def products(self, blocks: Sequence[int]) -> int:
        """Returns the number of matrix instructions in these blocks; without any, counts as sass.Part.products does."""
        codes = [i.code for at in blocks for i in self.blocks[at].instructions]
        fused = sum((2 if code.endswith("x2") else 1) for code in codes if code.startswith("fma.rn.f32"))
        return sum(code.startswith(PRODUCTS) for code in codes) or (fused if 2 * fused > len(codes) else 0)

    def run(self, values: dict[int, int], block: Sequence[int], thread: int, grid: Sequence[int], threads: int) -> Run:
        """Runs one thread. values: of parameters, by `parameter(place)` plus an offset; that of tensor k is `pointer(k)`."""
        run = Run([0] * len(self.blocks), {}, {})
        special = dict(zip(("%ctaid.x", "%ctaid.y", "%ctaid.z"), block)) | {"%tid.x": thread, "%ntid.x": threads}
        special |= dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid))
        self._run(values, special, run)
        return run

    def _translated(self) -> Callable:
        wanted = {b.branch.guard for b in self.blocks if b.branch and b.branch.guard}
        everything = [i for block in self.blocks for i in block.instructions]
        for i in everything:
            if _access(i):
                wanted |= {i.guard, *_REGISTER.findall(_access(i)[1]), *_REGISTER.findall(" ".join(i.operands[3:]))}
        wanted.discard("")
        size = -1
        while len(wanted) > size:
            size = len(wanted)
            for i in everything:
                if i.operands and not _access(i) and wanted & set(_REGISTER.findall(i.operands[0])):
                    wanted |= {*_REGISTER.findall(" ".join(i.operands[1:])), *([i.guard] if i.guard else [])}
        lines = ["def run(parameters, special, out):", *(f"  {_name(each)} = 0" for each in sorted(wanted)), "  at = 0"]
        lines += ["  counts, steps = out.counts, 0", "  while at < len(counts):", "    counts[at] += 1", "    steps += 1"]
        lines.append(f"    if steps > {_STEPS}: raise RuntimeError('expected a kernel that ends, got a loop that does not')")
        for number, block in enumerate(self.blocks):
            lines.append(f"    {'el' * (number > 0)}if at == {number}:")
            body = [line for i in block.instructions for line in _python(i, wanted)]
            if block.branch:
                condition = "True"
                if block.branch.guard:
                    condition = f"{'not ' * block.branch.negated}{_name(block.branch.guard)}"
                body.append(f"at = {block.target} if {condition} else {number + 1}")
            else:
                body.append(f"at = {number + 1}")
            lines += [f"      {line}" for line in body]
        names: dict[str, object] = {"signed": _signed, "touch": _touch, "quotient": _quotient}
        exec("\n".join(lines), names)
        return names["run"]  # type: ignore[return-value]


def parameter(place: int) -> int:
    """Returns the address of a parameter, by its place among the parameters."""
    return (1 << 60) + (place << 16)


def pointer(tensor: int) -> int:
    """Returns the address that stands for the tensor with this number."""
    return (tensor + 1) << _APART


def nested(edges: set[tuple[int, int]]) -> list[Loop]:
    """Returns the loops of back edges (first, last), in order of their starts, an outer loop before its inner loops."""
    spans: dict[int, int] = {}
    for first, last in edges:
        spans[first] = max(last, spans.get(first, 0))
    found = []
    for first, last in sorted(spans.items(), key=lambda span: (span[0], -span[1])):
        inner = {at for f, l in spans.items() if first < f and l <= last for at in range(f, l + 1)}
        found.append(Loop(first, last, tuple(at for at in range(first, last + 1) if at not in inner)))
    return found


def _name(register: str) -> str:
    return register.replace("%", "v_")


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    """Returns a / b rounded to 0, as the hardware does; 0 if b is 0, which stands for an unknown divisor."""
    return 0 if not b else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _touch(side: dict[int, Reached], address: int, size: int) -> None:
    place = (address + (1 << (_APART - 1)) >> _APART) - 1
    found = side.setdefault(place, Reached())
    found.lowest, found.end = min(found.lowest, address), max(found.end, address + size)
    found.bytes += size
    if len(found.first) < _FIRST:
        found.first.append((address, size))


def _access(i: Instruction) -> tuple[str, str, int] | None:
    """Returns "read" or "written", address and bytes of an instruction that accesses global memory; None for all others."""
    if i.code.startswith("cp.async") and ".global" in i.code and len(i.operands) > 2:
        return "read", i.operands[1], int(i.operands[2], 0)
    if i.parts[0] not in ("ld", "st", "red", "atom") or "global" not in i.parts:
        return None
    lanes = next((int(p[1:]) for p in i.parts if re.fullmatch(r"v\d", p)), 1)
    size = lanes * int(re.search(r"\d+$", i.parts[-1])[0]) // 8
    read = i.parts[0] == "ld"
    return ("read", i.operands[1], size) if read else ("written", next(o for o in i.operands if o[0] == "["), size)


def _address(text: str) -> str:
    return "+".join(
        part if part.lstrip("-").isdigit() else _value(part, 64) for part in re.split(r"\s*\+\s*", text.strip("[] "))
    )


def _value(operand: str, bits: int) -> str:
    if operand.startswith(("%ctaid", "%tid", "%ntid", "%nctaid")):
        return f"special.get('{operand}', 0)"
    if operand.startswith("%"):
        return _name(operand) if _REGISTER.fullmatch(operand) else "0"
    try:
        return str(int(operand, 0) & ((1 << bits) - 1))
    except ValueError:  # a name in shared memory, or a float
        return "0"


_INFIX = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def _python(i: Instruction, wanted: set[str]) -> list[str]:
    """Returns the lines of Python that compute the wanted results of an instruction."""
    guard = f"if {'not ' * i.negated}{_name(i.guard)}: " if i.guard else ""
    if access := _access(i):
        side, address, size = access
        if i.code.startswith("cp.async") and len(i.operands) > 3:  # the bytes that are copied; the rest is filled with 0
            guard = f"if {_value(i.operands[3], 32)}: "
        lines = [f"{guard}touch(out.{side}, {_address(address)}, {size})"]
        return lines + [f"{_name(r)} = 0" for r in _REGISTER.findall(i.operands[0]) if r in wanted and side == "read"]
    outs = _REGISTER.findall(i.operands[0]) if i.operands else []
    if not wanted & set(outs):
        return []
    if i.code.startswith("ld.param"):
        size, at = int(re.search(r"\d+$", i.code)[0]) // 8, _address(i.operands[1])
        return [f"{_name(r)} = parameters.get({at} + {n * size}, 0)" for n, r in enumerate(outs) if r in wanted]
    if i.code.startswith("mov") and i.operands[0].startswith("{"):
        source = _value(i.operands[1], 64)
        each = 64 // len(outs) if "64" in i.code else 32 // len(outs)
        return [f"{_name(r)} = {source} >> {n * each} & {(1 << each) - 1}" for n, r in enumerate(outs) if r in wanted]
    expression = _expression(i)
    if expression is None:  # a predicate that is not known holds, so that a loop that waits for it ends
        return [f"{_name(r)} = {int(r.startswith('%p'))}" for r in outs if r in wanted]
    return [f"{guard}{_name(outs[0])} = {expression}"]


def _expression(i: Instruction) -> str | None:
    parts, op = i.parts, i.parts[0]
    kind = parts[-1]
    match = re.fullmatch(r"([subf])(\d+)", kind)
    is_signed, bits = (match[1] == "s", int(match[2])) if match else (False, 1)
    if match and match[1] == "f":
        return None
    mask = (1 << bits) - 1
    a, b, c = [_value(each, bits) for each in (*i.operands[1:4], "0", "0", "0")][:3]

    def of_sign(text: str, width: int = bits) -> str:
        return f"signed({text}, {width})" if is_signed else text

    if op in ("mov", "cvta"):
        if i.operands[1].startswith("{"):
            halves = _REGISTER.findall(i.operands[1])
            return "|".join(f"{_value(h, 64)} << {n * bits // len(halves)}" for n, h in enumerate(halves))
        return f"({a}) & {mask}"
    if op in _INFIX and kind != "cc":
        return f"({a} {_INFIX[op]} {b}) & {mask}"
    if op == "not":
        return f"{a} ^ {mask}" if kind != "pred" else f"{a} ^ 1"
    if op in ("mul", "mad"):
        wide = "wide" in parts
        product = f"{of_sign(a)} * {of_sign(b)}"
        if "hi" in parts:
            product = f"({product}) >> {bits}"
        added = f" + {_value(i.operands[3], 2 * bits if wide else bits)}" if op == "mad" else ""
        return f"(({product}){added}) & {(1 << 2 * bits) - 1 if wide else mask}"
    if op in ("div", "rem"):
        quotient = f"quotient({of_sign(a)}, {of_sign(b)})"
        return f"{quotient} & {mask}" if op == "div" else f"({of_sign(a)} - {quotient} * {of_sign(b)}) & {mask}"
    if op in ("shl", "shr"):
        amount = f"min({_value(i.operands[2], 32)}, {bits})"
        return f"{a} << {amount} & {mask}" if op == "shl" else f"{of_sign(a)} >> {amount} & {mask}"
    if op in ("min", "max"):
        return f"{op}({of_sign(a)}, {of_sign(b)}) & {mask}"
    if op in ("neg", "abs"):
        return f"{'-' if op == 'neg' else ''}{'abs' * (op == 'abs')}({of_sign(a)}) & {mask}"
    if op == "setp" and parts[1] in _COMPARE:
        found = f"int({of_sign(a)} {_COMPARE[parts[1]]} {of_sign(b)})"
        return f"{found} {_INFIX[parts[2]]} {_value(i.operands[3], 1)}" if parts[2] in _INFIX else found
    if op == "selp":
        return f"{a} if {c} else {b}"
    if op == "cvt" and (source := re.fullmatch(r"([su])(\d+)", kind)) and re.fullmatch(r"[su]\d+", parts[-2]):
        to = (1 << int(parts[-2][1:])) - 1
        return f"{of_sign(f'({a} & {mask})', int(source[2]))} & {to}"
    if op == "bfe":
        start, length = _value(i.operands[2], 32), _value(i.operands[3], 32)
        found = f"({a} >> {start} & (1 << {length}) - 1)"
        return f"signed({found}, {length}) & {mask}" if is_signed else found
    if op == "bfi":
        into, start, length = (_value(each, 32) for each in i.operands[2:5])
        return f"{into} & ~((1 << {length}) - 1 << {start}) | ({a} & (1 << {length}) - 1) << {start}"
    return None
