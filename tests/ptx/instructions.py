"""What each instruction does to the lanes that execute it.

An opcode, modifier or operand that is not here is an error.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx import numbers
from ptx.numbers import BANKS, TYPES
from ptx.parse import (
    Address,
    Immediate,
    Instruction,
    Operand,
    Register,
    Special,
    Symbol,
    UnknownPTXError,
    Vector,
)

if TYPE_CHECKING:
    from ptx.machine import Batch, Code, Lanes

Step = Callable[["Batch", "Lanes"], None]
Reader = Callable[["Batch", "Lanes"], np.ndarray]
Writer = Callable[["Batch", "Lanes", np.ndarray], None]
_TABLE: list[tuple[re.Pattern, tuple[int, ...], Callable]] = []


def instruction(pattern: str, *counts: int) -> Callable:
    """Registers what builds a step of (instruction, match, code). counts: of operands."""

    def register(build: Callable) -> Callable:
        _TABLE.append((re.compile(pattern), counts, build))
        return build

    return register


@functools.cache
def _builders(opcode: str) -> list[tuple[re.Match, tuple[int, ...], Callable]]:
    """Returns the entries of the table whose pattern an opcode matches."""
    entries = []
    for pattern, counts, build in _TABLE:
        if match := pattern.fullmatch(opcode):
            entries.append((match, counts, build))
    return entries


def step_of(instruction: Instruction, code: Code) -> Step:
    expected: list[int] = []
    for match, counts, build in _builders(instruction.opcode):
        fits = len(instruction.operands) in counts
        if fits and (step := build(instruction, match, code)):
            return step
        expected += counts
    if expected:
        raise UnknownPTXError(f"expected {expected} operands, got {len(instruction.operands)}")
    raise UnknownPTXError("the opcode is not known")


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise UnknownPTXError(f"expected {what}")


def reader(operand: Operand, kind: str, code: Code) -> Reader:
    """Returns what reads numbers of a type of TYPES: [lanes], and a vector's [lanes, items]."""
    if isinstance(operand, Vector):
        readers = [reader(item, kind, code) for item in operand.items]
        return lambda batch, lanes: np.stack([read(batch, lanes) for read in readers], 1)
    bank, decode, _ = TYPES[kind]
    if isinstance(operand, Address):
        base = reader(operand.base, kind, code)
        offset = np.int64(operand.offset).astype(BANKS[bank])
        return lambda batch, lanes: base(batch, lanes) + offset
    if isinstance(operand, Register):
        index = operand.index
        expect(operand.bank == bank, f"a register of {kind}")
        return lambda batch, lanes: decode(batch.registers[bank][index][lanes])
    if isinstance(operand, Special):
        expect(bank == "32", f"an operand of {kind}")
        return lambda batch, lanes: decode(batch.special[operand.name][lanes])
    value = code.kernel.addresses[operand.name] if isinstance(operand, Symbol) else operand.bits
    bits = np.uint64(value % (1 << 64)).astype(BANKS[bank])
    return lambda batch, lanes: decode(np.full(batch.numbers[lanes].shape, bits))


def writer(operand: Operand, kind: str) -> Writer:
    """Returns what writes numbers of a type: [lanes], to a vector [lanes, items], to _ none."""
    if isinstance(operand, Vector):
        writers = [writer(item, kind) for item in operand.items]

        def write_items(batch: Batch, lanes: Lanes, values: np.ndarray) -> None:
            for place, write in enumerate(writers):
                write(batch, lanes, values[:, place])

        return write_items
    if operand == Symbol("_"):
        return lambda batch, lanes, values: None
    bank, _, encode = TYPES[kind]
    expect(isinstance(operand, Register) and operand.bank == bank, f"a register of {kind}")
    index = operand.index

    def write(batch: Batch, lanes: Lanes, values: np.ndarray) -> None:
        batch.registers[bank][index][lanes] = encode(values)

    return write


def vector(operand: Operand, count: int) -> Vector:
    """Returns an operand of so many items; one item may be without braces."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    expect(len(items) == count, f"{count} registers")
    return Vector(items)


# ---- Memory

_ELEMENTS = r"(?:\.v(?P<count>[24]))?\.(?P<letter>[bsuf])(?P<bits>8|16|32|64)"
_ADDRESS = {"global": "u64", "shared": "u32", "param": "u64"}


@instruction(r"ld\.(?P<space>global|shared|param)" + _ELEMENTS, 2)
def _load(i, match, code):
    """A register may be wider than what is loaded: it gets the sign of a signed number."""
    space = match["space"]
    size = int(match["bits"]) // 8
    count = int(match["count"] or 1)
    targets, letter = vector(i.operands[0], count), "s" if match["letter"] == "s" else "u"
    expect(int(targets.items[0].bank) >= 8 * size, "registers as wide as the elements")
    write = writer(targets, letter + targets.items[0].bank)
    places = reader(i.operands[1], _ADDRESS[space], code)
    number = f"{'i' if letter == 's' else 'u'}{size}"
    code.accesses(space, size * count)

    def run(batch: Batch, lanes: Lanes) -> None:
        values = batch.memory[space].load(batch.access(i, lanes), places(batch, lanes), size, count)
        write(batch, lanes, values.view(number))

    return run


@instruction(r"st\.(?P<space>global|shared)(?:::cta)?" + _ELEMENTS, 2)
def _store(i, match, code):
    space, count = match["space"], int(match["count"] or 1)
    read = reader(vector(i.operands[1], count), f"b{match['bits']}", code)
    places = reader(i.operands[0], _ADDRESS[space], code)
    code.accesses(space, int(match["bits"]) // 8 * count)

    def run(batch: Batch, lanes: Lanes) -> None:
        access = batch.access(i, lanes)
        batch.memory[space].store(access, places(batch, lanes), read(batch, lanes))

    return run


@instruction(r"cp\.async\.c[ag]\.shared\.global", 3, 4)
def _copy(i, match, code):
    to, source = (reader(each, kind, code) for each, kind in zip(i.operands, ("u32", "u64")))
    size = i.operands[2].bits
    expect(size in ((16,) if ".cg." in i.opcode else (4, 8, 16)), "4, 8 or 16 bytes")
    valid = reader(i.operands[-1], "u32", code)
    code.accesses("shared", size), code.accesses("global", size)

    def run(batch: Batch, lanes: Lanes) -> None:
        access = batch.access(i, lanes)
        places = source(batch, lanes)
        count = valid(batch, lanes)
        access.report(f"cp.async of neither 0 nor {size} bytes", (count != 0) & (count != size))
        reads = count != 0
        values = np.zeros((len(places), size // 4), np.uint32)
        values[reads] = batch.memory["global"].load(access.of(reads), places[reads], 4, size // 4)
        batch.memory["shared"].start_copy(access, to(batch, lanes), values)

    return run


@instruction(r"cp\.async\.commit_group", 0)
def _commit(i, match, code):
    return lambda batch, lanes: batch.memory["shared"].end_group(lanes)


@instruction(r"cp\.async\.wait_group", 1)
def _wait(i, match, code):
    return lambda batch, lanes: batch.memory["shared"].wait(
        batch.access(i, lanes), i.operands[0].bits
    )


# ---- Warps


@instruction(r"shfl\.sync\.(bfly|up|idx)\.b32", 5)
def _shuffle(i, match, code):
    mode, (target, *sources) = match[1], i.operands
    result, valid = target.items if isinstance(target, Vector) else (target, Symbol("_"))
    write, write_valid = writer(result, "b32"), writer(valid, "pred")
    value, by, clamp, members = (reader(each, "b32", code) for each in sources)

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.expect_all_members(i, lanes, members(batch, lanes))
        lanes = batch.whole(i, lanes)
        own = batch.numbers[lanes] % 32
        step, control = (read(batch, lanes).astype(np.int64) & 0x1FFF for read in (by, clamp))
        step = step & 31
        segment = control >> 8
        last = control & 31
        low, high = own & segment, own & segment | last & ~segment
        source = {
            "bfly": own ^ step,
            "up": own - step,
            "idx": low | step & ~segment,
        }[mode]
        inside = source >= high if mode == "up" else source <= high
        rows = value(batch, lanes).reshape(-1, 32)
        chosen = np.where(inside, source, own).reshape(-1, 32)
        write(batch, lanes, np.take_along_axis(rows, chosen & 31, 1).ravel())
        write_valid(batch, lanes, inside)

    return run


@instruction(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", 2)
def _matrix(i, match, code):
    """A lane holds a word of each matrix; the first 8 pass the rows of the first, and so on."""
    count, loads = int(match[2]), match[1] == "ld"
    registers, address = i.operands if loads else i.operands[::-1]
    registers, places = vector(registers, count), reader(address, "u32", code)
    write, read = writer(registers, "b32"), reader(registers, "b32", code)
    code.accesses("shared", 16)

    def turned(words: np.ndarray) -> np.ndarray:  # [warps, count, 32]
        halves = words.view(np.uint16).reshape(-1, count, 8, 8)
        halves = np.ascontiguousarray(halves.swapaxes(2, 3) if match[3] else halves)
        return halves.view(np.uint32).reshape(-1, count, 32)

    def run(batch: Batch, lanes: Lanes) -> None:
        lanes = batch.whole(i, lanes)
        first = batch.numbers[lanes].reshape(-1, 32)[:, : 8 * count].ravel()
        access = batch.access(i, first)
        rows = places(batch, first)
        shared = batch.memory["shared"]
        if loads:
            words = turned(shared.load(access, rows, 4, 4))
            write(batch, lanes, words.swapaxes(1, 2).reshape(-1, count))
        else:
            words = read(batch, lanes).reshape(-1, 32, count).swapaxes(1, 2)
            shared.store(access, rows, turned(np.ascontiguousarray(words)).reshape(-1, 4))

    return run


_SUMS = numbers.accumulators(8)
_SHAPES = {kind: ("m16n8k16", numbers.LEFT_HALF, numbers.RIGHT_HALF) for kind in ("bf16", "f16")}
_SHAPES["tf32"] = "m16n8k8", numbers.LEFT_TF32, numbers.RIGHT_TF32


@instruction(r"mma\.sync\.aligned\.(m16n8k(?:8|16))\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", 4)
def _mma(i, match, code):
    shape, left, right = _SHAPES[match[2]]
    expect(match[1] == shape, shape)
    write = writer(vector(i.operands[0], 4), "f32")
    forms = (left, match[2], 4), (right, match[2], 2), (_SUMS, "f32", 4)
    sources = [
        (reader(vector(operand, count), "b32", code), order, kind)
        for operand, (order, kind, count) in zip(i.operands[1:], forms)
    ]

    def run(batch: Batch, lanes: Lanes) -> None:
        lanes = batch.whole(i, lanes)
        a, b, c = (
            numbers.matrices(read(batch, lanes), order, kind) for read, order, kind in sources
        )
        write(batch, lanes, numbers.fragments(c + a @ b, _SUMS))

    return run


@instruction(r"bar\.warp\.sync", 1)
def _sync_warp(i, match, code):
    members = reader(i.operands[0], "b32", code)

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.expect_all_members(i, lanes, members(batch, lanes))
        batch.sync_warps(batch.whole(i, lanes))

    return run


@instruction(r"bra(?:\.uni)?|bar\.sync|ret", 0, 1)
def _control(i, match, code):
    """The machine executes these itself."""
    expect(i.opcode != "bar.sync" or i.operands == (Immediate(0),), "barrier 0")
    return lambda batch, lanes: None
