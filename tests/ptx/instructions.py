"""What each instruction does to the lanes that execute it. An opcode, modifier or number of operands that is not here is an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import numbers
from ptx.parse import Address, Immediate, Instruction, Operand, Register, Special, Symbol, UnknownPTXError, Vector

if TYPE_CHECKING:
    from ptx.machine import Batch, Code, Lanes

Step = Callable[["Batch", "Lanes"], None]
Reader = Callable[["Batch", "Lanes"], Any]
_TABLE: list[tuple[re.Pattern, tuple[int, ...], Callable]] = []
CONTROL = ("bra", "ret", "bar.sync")  # the machine executes these


def instruction(pattern: str, *counts: int) -> Callable:
    """Registers a function of an instruction, a match of its opcode and the code, which returns a step. counts: of operands."""

    def register(build: Callable) -> Callable:
        _TABLE.append((re.compile(pattern), counts, build))
        return build

    return register


def step_of(instruction: Instruction, code: Code) -> Step:
    expected: list[int] = []
    for pattern, counts, build in _TABLE:
        if match := pattern.fullmatch(instruction.opcode):
            if len(instruction.operands) in counts:
                return build(instruction, match, code)
            expected += counts
    if expected:
        raise UnknownPTXError(f"expected {expected} operands, got {len(instruction.operands)}")
    raise UnknownPTXError("the opcode is not known")


def dtype_of(kind: str) -> np.dtype:
    """Returns numpy's dtype of a type like b32; halves are their bits."""
    letter, size = kind[0], int(kind[1:]) // 8
    return np.dtype(f"{'f' if letter == 'f' and size > 2 else 'i' if letter == 's' else 'u'}{size}")


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise UnknownPTXError(f"expected {what}")


def reader(operand: Operand, kind: str, code: Code) -> Reader:
    """Returns a function that reads an operand of the lanes as a type: pred, b32, f32, ..."""
    if isinstance(operand, Register):
        index, key = operand.index, kind
        expect(
            operand.bank == ("64" if kind == "f32x2" else kind.lstrip("busf") or "pred") or kind == operand.bank,
            f"a register of {kind}",
        )
        return lambda batch, lanes: batch.registers[key][index][lanes]
    if isinstance(operand, Special):
        name = operand.name
        expect(kind in ("u32", "s32", "b32"), f"an operand of {kind}")
        return lambda batch, lanes: batch.special[name][lanes].view(dtype_of(kind))
    if isinstance(operand, Symbol):
        shared, parameters = code.kernel.shared, code.kernel.parameters
        bits = parameters[operand.name].offset if operand.name in parameters else shared[operand.name]
    else:
        expect(isinstance(operand, Immediate), f"an operand of {kind}")
        bits = operand.bits
    if kind == "pred":
        value = np.bool_(bits != 0)
    elif kind == "f32x2":
        value = np.array([bits & 0xFFFFFFFF, bits >> 32 & 0xFFFFFFFF], np.uint32).view(np.float32)
    else:
        width = int(kind[1:])
        value = np.array(bits & (1 << width) - 1, f"u{width // 8}").view(dtype_of(kind))[()]
    return lambda batch, lanes: value


def indices(operand: Operand, count: int, bank: str) -> list[int]:
    """Returns the indices of the registers of a vector."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    expect(
        len(items) == count and all(isinstance(each, Register) and each.bank == bank for each in items), f"{count} registers"
    )
    return [each.index for each in items]


def addresses(operand: Operand, kind: str, code: Code) -> Reader:
    expect(isinstance(operand, Address), "an address")
    base, offset = reader(operand.base, kind, code), operand.offset
    dtype = dtype_of(kind).type
    step = dtype(offset % (1 << 8 * dtype().itemsize))
    if isinstance(operand.base, Register):
        return lambda batch, lanes: base(batch, lanes) + step
    return lambda batch, lanes: np.broadcast_to(base(batch, lanes) + step, batch.numbers[lanes].shape)


def elementwise(instruction: Instruction, code: Code, result: str, kinds: list[str], function: Callable) -> Step:
    """Returns a step that writes function(sources) to the first operand. kinds: the types of the sources."""
    target, *operands = instruction.operands
    expect(isinstance(target, Register), "a register")
    reader(target, result, code)
    index, sources = target.index, [reader(operand, kind, code) for operand, kind in zip(operands, kinds, strict=True)]

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.registers[result][index][lanes] = function(*[source(batch, lanes) for source in sources])

    return run


# ---- Integers and predicates

_INT = r"(?P<kind>[bsu](?:16|32|64))"
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_INTEGER = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum}
_INTEGER |= {"div": numbers.divided, "rem": lambda a, b: a - numbers.divided(a, b) * b}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction(r"(add|sub|mul\.lo|min|max|div|rem)\." + _INT, 3)
def _integer(i, match, code):
    return elementwise(i, code, match["kind"], [match["kind"]] * 2, _INTEGER[match[1]])


@instruction(r"(and|or|xor)\.(b16|b32|b64|pred)", 3)
def _logic(i, match, code):
    return elementwise(i, code, match[2], [match[2]] * 2, _LOGIC[match[1]])


@instruction(r"(not|neg|abs)\.(" + _INT + "|pred)", 2)
def _integer_of_one(i, match, code):
    function = {"not": np.logical_not if match[2] == "pred" else np.invert, "neg": np.negative, "abs": np.abs}[match[1]]
    return elementwise(i, code, match[2], [match[2]], function)


@instruction(r"(mul|mad)\.wide\.([su])(16|32)", 3, 4)
def _wide(i, match, code):
    narrow, wide = match[2] + match[3], match[2] + str(2 * int(match[3]))
    product = lambda a, b, *c: sum(c, np.multiply(a, b, dtype=dtype_of(wide)))  # noqa: E731
    return elementwise(i, code, wide, [narrow] * 2 + [wide] * (match[1] == "mad"), product)


@instruction(r"mad\.lo\." + _INT, 4)
def _mad(i, match, code):
    return elementwise(i, code, match["kind"], [match["kind"]] * 3, lambda a, b, c: a * b + c)


@instruction(r"(shl|shr)\." + _INT, 3)
def _shift(i, match, code):
    left = match[1] == "shl"
    return elementwise(i, code, match["kind"], [match["kind"], "u32"], lambda x, by: numbers.shifted(x, by, left))


@instruction(r"bfe\.([su]32)", 4)
def _extract(i, match, code):
    return elementwise(i, code, match[1], [match[1], "u32", "u32"], numbers.extracted)


@instruction(r"bfi\.b32", 5)
def _insert(i, match, code):
    return elementwise(i, code, "b32", ["b32", "b32", "u32", "u32"], numbers.inserted)


@instruction(r"setp\.(eq|ne|lt|le|gt|ge)(u?)\.(f32|[bsu](?:16|32|64))", 3)
def _compare(i, match, code):
    compare, kind = _COMPARE[match[1]], match[3]
    if kind == "f32" and match[2] and match[1] != "ne":  # also true if one is NaN
        function = lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
    elif kind == "f32" and match[1] == "ne" and not match[2]:
        function = lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)  # noqa: E731
    else:
        expect(kind == "f32" or not match[2], "no u")
        function = compare
    return elementwise(i, code, "pred", [kind] * 2, function)


@instruction(r"selp\.([bsuf](?:16|32|64))", 4)
def _select(i, match, code):
    return elementwise(i, code, match[1], [match[1], match[1], "pred"], lambda a, b, p: np.where(p, a, b))


@instruction(r"mov\.([bsuf](?:16|32|64)|pred)", 2)
def _move(i, match, code):
    target, source = i.operands
    if not isinstance(target, Vector) and not isinstance(source, Vector):
        return elementwise(i, code, match[1], [match[1]], lambda x: x)
    parts = target.items if isinstance(target, Vector) else source.items
    part = f"b{int(match[1][1:]) // len(parts)}"
    if isinstance(target, Vector):
        whole = reader(source, match[1], code)
        targets = [(place, *indices(each, 1, part[1:])) for place, each in enumerate(parts) if each != Symbol("_")]

        def unpack(batch: Batch, lanes: Lanes) -> None:
            values = np.ascontiguousarray(whole(batch, lanes))[:, None].view(dtype_of(part))
            for place, index in targets:
                batch.registers[part][index][lanes] = values[:, place]

        return unpack
    pieces = [reader(each, part, code) for each in parts]

    def pack(batch: Batch, lanes: Lanes) -> None:
        values = [np.broadcast_to(piece(batch, lanes), batch.numbers[lanes].shape) for piece in pieces]
        batch.registers[match[1]][target.index][lanes] = np.stack(values, 1).view(dtype_of(match[1]))[:, 0]

    return pack


@instruction(r"cvta\.to\.global\.u64", 2)
def _to_global(i, match, code):
    return elementwise(i, code, "u64", ["u64"], lambda x: x)


# ---- Floating-point numbers

_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.fmin, "max": np.fmax, "div": np.divide}
_ONE = {"neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt}


def _flushing(function: Callable, ftz: bool) -> Callable:
    if not ftz:
        return function
    return lambda *sources: numbers.flushed(function(*map(numbers.flushed, sources)))


@instruction(r"(add|sub|mul|min|max)(\.rn)?(\.ftz)?\.f32", 3)
def _float(i, match, code):
    return elementwise(i, code, "f32", ["f32"] * 2, _flushing(_FLOAT[match[1]], match[3]))


@instruction(r"(min|max)(\.ftz)?\.f32", 4)
def _of_three(i, match, code):
    function = _FLOAT[match[1]]
    return elementwise(i, code, "f32", ["f32"] * 3, _flushing(lambda a, b, c: function(function(a, b), c), match[2]))


@instruction(r"(add|sub|mul)\.f32x2", 3)
def _pair(i, match, code):
    return elementwise(i, code, "f32x2", ["f32x2"] * 2, _FLOAT[match[1]])


@instruction(r"fma\.rn(\.ftz)?\.(f32|f32x2)", 4)
def _fma(i, match, code):
    return elementwise(i, code, match[2], [match[2]] * 3, _flushing(numbers.fma, match[1]))


@instruction(r"add\.rn\.f32\.(bf16|f16)", 3)
def _mixed(i, match, code):
    wide = numbers.HALVES[match[1]]
    return elementwise(i, code, "f32", ["b16", "f32"], lambda a, b: wide(a) + b)


@instruction(r"div\.(full|approx|rn)(\.ftz)?\.f32", 3)
def _divide(i, match, code):
    return elementwise(i, code, "f32", ["f32"] * 2, _flushing(np.divide, match[2]))


@instruction(r"(neg|abs)(\.ftz)?\.f32|(ex2|lg2|rcp|sqrt)\.(?:approx|rn)(\.ftz)?\.f32", 2)
def _float_of_one(i, match, code):
    function = _ONE[match[1] or match[3]]
    if match[3]:  # in float64, then rounded
        exact, function = function, lambda x: exact(np.asarray(x, np.float64)).astype(np.float32)
    return elementwise(i, code, "f32", ["f32"], _flushing(function, match[2] or match[4]))


@instruction(r"cvt\.([su](?:16|32|64))\.([su](?:16|32|64))", 2)
def _convert_integer(i, match, code):
    return elementwise(i, code, match[1], [match[2]], lambda x: x.astype(dtype_of(match[1])))


@instruction(r"cvt\.rn\.f32\.([su]32)", 2)
def _convert_to_float(i, match, code):
    return elementwise(i, code, "f32", [match[1]], lambda x: x.astype(np.float32))


@instruction(r"cvt\.f32\.(bf16|f16)", 2)
def _widen(i, match, code):
    return elementwise(i, code, "f32", ["b16"], numbers.HALVES[match[1]])


@instruction(r"cvt\.rn\.(bf16|f16)\.f32", 2)
def _narrow(i, match, code):
    return elementwise(i, code, "b16", ["f32"], numbers.TO_HALF[match[1]])


@instruction(r"cvt\.rn\.(bf16|f16)x2\.f32", 3)
def _narrow_two(i, match, code):
    narrow, shift = numbers.TO_HALF[match[1]], np.uint32(16)
    joined = lambda high, low: narrow(high).astype(np.uint32) << shift | narrow(low)  # noqa: E731
    return elementwise(i, code, "b32", ["f32"] * 2, joined)


@instruction(r"cvt\.rna\.tf32\.f32", 2)
def _to_tf32(i, match, code):
    return elementwise(i, code, "b32", ["f32"], numbers.to_tf32)


@instruction(r"cvt\.rpi(\.ftz)\.f32\.f32", 2)
def _ceil(i, match, code):
    return elementwise(i, code, "f32", ["f32"], _flushing(np.ceil, True))


# ---- Memory

_ELEMENTS = r"(?:\.v(?P<count>[24]))?\.(?P<letter>[bsuf])(?P<bits>8|16|32|64)"


def _elements(operand: Operand, count: str | None) -> list[Operand]:
    items = list(operand.items) if isinstance(operand, Vector) else [operand]
    expect(len(items) == int(count or 1), f"{count or 1} registers")
    return items


def smallest(code: Code, space: str, size: int) -> None:
    code.granules[space] = min(code.granules[space], size)


def _targets(operands: list[Operand], letter: str, bits: int) -> list[tuple[str, int]]:
    """Returns key and index of the registers that loaded values are written to, which may be wider."""
    expect(all(isinstance(each, Register) for each in operands), "registers")
    widths = [int(each.bank) for each in operands]
    expect(min(widths) >= bits, "registers as wide as the elements")
    return [(("s" if letter == "s" else "u") + each.bank, each.index) for each in operands]


@instruction(r"ld\.(?P<space>global|shared|param)" + _ELEMENTS, 2)
def _load(i, match, code):
    space, size = match["space"], int(match["bits"]) // 8
    registers = _targets(_elements(i.operands[0], match["count"]), match["letter"], 8 * size)
    at = addresses(i.operands[1], {"global": "u64", "shared": "u32", "param": "u64"}[space], code)
    signed = np.dtype(f"i{size}")
    if space != "param":
        smallest(code, space, size * len(registers))

    def run(batch: Batch, lanes: Lanes) -> None:
        places = at(batch, lanes)
        if space == "param":
            values = batch.parameters[(places[:, None] + np.arange(size * len(registers), dtype=np.uint64)).astype(np.int64)]
            values = values.view(f"u{size}")
        else:
            memory = batch.shared if space == "shared" else batch.memory
            values = memory.load(batch.access(i, lanes), places, size, len(registers))
        for place, (key, index) in enumerate(registers):
            value = values[:, place]
            batch.registers[key][index][lanes] = value.view(signed) if key[0] == "s" else value

    return run


@instruction(r"st\.(?P<space>global|shared|shared::cta)" + _ELEMENTS, 2)
def _store(i, match, code):
    size, space = int(match["bits"]) // 8, match["space"].removesuffix("::cta")
    sources = [reader(each, f"b{match['bits']}", code) for each in _elements(i.operands[1], match["count"])]
    at = addresses(i.operands[0], "u32" if space == "shared" else "u64", code)
    smallest(code, space, size * len(sources))

    def run(batch: Batch, lanes: Lanes) -> None:
        memory = batch.shared if space == "shared" else batch.memory
        shape = batch.numbers[lanes].shape
        values = np.stack([np.broadcast_to(source(batch, lanes), shape) for source in sources], 1)
        memory.store(batch.access(i, lanes), at(batch, lanes), values)

    return run


@instruction(r"cp\.async\.c[ag]\.shared\.global", 3, 4)
def _copy(i, match, code):
    to, source = addresses(i.operands[0], "u32", code), addresses(i.operands[1], "u64", code)
    size = i.operands[2].bits
    expect(size in ((16,) if ".cg." in i.opcode else (4, 8, 16)), "4, 8 or 16 bytes")
    valid = reader(i.operands[3] if len(i.operands) == 4 else Immediate(size), "u32", code)
    smallest(code, "shared", size), smallest(code, "global", size)

    def run(batch: Batch, lanes: Lanes) -> None:
        access, places = batch.access(i, lanes), source(batch, lanes)
        bytes_read = np.broadcast_to(valid(batch, lanes), places.shape)
        access.report(f"cp.async of neither 0 nor {size} bytes", (bytes_read != 0) & (bytes_read != size))
        reads = bytes_read != 0
        values = np.zeros((len(places), size // 4), np.uint32)
        if reads.any():
            values[reads] = batch.memory.load(access.of(reads), places[reads], 4, size // 4)
        batch.shared.start_copy(access, to(batch, lanes), values)

    return run


@instruction(r"cp\.async\.commit_group", 0)
def _commit(i, match, code):
    return lambda batch, lanes: batch.shared.end_group(lanes)


@instruction(r"cp\.async\.wait_group", 1)
def _wait(i, match, code):
    return lambda batch, lanes: batch.shared.wait(batch.access(i, lanes), i.operands[0].bits)


# ---- Warps


@instruction(r"shfl\.sync\.(bfly|up|down|idx)\.b32", 5)
def _shuffle(i, match, code):
    mode, (target, *operands) = match[1], i.operands
    target, valid = target.items if isinstance(target, Vector) else (target, None)
    (target_index,) = indices(target, 1, "32")
    value, by, clamp, members = (reader(each, "b32" if place == 0 else "u32", code) for place, each in enumerate(operands))

    def run(batch: Batch, lanes: Lanes) -> None:
        batch.expect_all(i, lanes, members)
        lanes = batch.whole(i, lanes)
        own = batch.numbers[lanes] % 32
        control, step = (np.asarray(each(batch, lanes)).astype(np.int64) for each in (clamp, by))
        segment, last = control >> 8 & 31, control & 31
        low, high = own & segment, own & segment | last & ~segment
        step = step & 31
        source = {"bfly": own ^ step, "up": own - step, "down": own + step, "idx": low | step & ~segment}[mode]
        inside = source >= high if mode == "up" else source <= high
        rows = np.broadcast_to(value(batch, lanes), own.shape).reshape(-1, 32)
        shuffled = np.take_along_axis(rows, np.where(inside, source, own).reshape(-1, 32) & 31, 1)
        batch.registers["b32"][target_index][lanes] = shuffled.ravel()
        if valid:
            batch.registers["pred"][valid.index][lanes] = inside

    return run


def _rows(batch: Batch, i: Instruction, lanes: Lanes, at: Reader, count: int) -> tuple[Any, np.ndarray]:
    """Returns the access and the addresses of the rows of `count` matrices of 8x8: those of the first 8 count lanes."""
    numbers_of = batch.numbers[lanes].reshape(-1, 32)[:, : 8 * count].ravel()
    return batch.access(i, numbers_of), at(batch, numbers_of)


@instruction(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", 2)
def _matrix(i, match, code):
    count, loads = int(match[2]), match[1] == "ld"
    vector, address = i.operands if loads else i.operands[::-1]
    words_of = indices(vector, count, "32")
    at = addresses(address, "u32", code)
    smallest(code, "shared", 16)

    def run(batch: Batch, lanes: Lanes) -> None:
        lanes = batch.whole(i, lanes)
        access, rows = _rows(batch, i, lanes, at, count)
        halves = batch.shared.load(access, rows, 4, 4) if loads else None
        if not loads:
            words = np.stack([batch.registers["b32"][index][lanes].reshape(-1, 32) for index in words_of], 1)
            halves = words.reshape(-1, 4)
        square = np.ascontiguousarray(halves).view(np.uint16).reshape(-1, count, 8, 8)
        if match[3]:
            square = square.swapaxes(2, 3)
        words = np.ascontiguousarray(square).view(np.uint32)  # [warps, count, 8, 4]: a lane has a word of each matrix
        if loads:
            for place, index in enumerate(words_of):
                batch.registers["b32"][index][lanes] = words[:, place].ravel()
        else:
            batch.shared.store(access, rows, words.reshape(-1, 4))

    return run


def held(batch: Batch, lanes: Lanes, registers: list[int]) -> np.ndarray:  # [warps, 32, registers]
    return np.stack([batch.registers["b32"][index][lanes] for index in registers], 1).reshape(-1, 32, len(registers))


_SHAPES = {"bf16": ("m16n8k16", numbers.A_HALF, numbers.B_HALF), "tf32": ("m16n8k8", numbers.A_TF32, numbers.B_TF32)}
_SHAPES["f16"] = _SHAPES["bf16"]
_SUMS = numbers.accumulators(8)


@instruction(r"mma\.sync\.aligned\.(m16n8k(?:8|16))\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", 4)
def _mma(i, match, code):
    kind = match[2]
    shape, order_a, order_b = _SHAPES[kind]
    expect(match[1] == shape, shape)
    d, a, b, c = (indices(operand, count, "32") for operand, count in zip(i.operands, (4, 4, 2, 4)))

    def run(batch: Batch, lanes: Lanes) -> None:
        lanes = batch.whole(i, lanes)
        left = numbers.matrices(held(batch, lanes, a), order_a, kind)
        right = numbers.matrices(held(batch, lanes, b), order_b, kind)
        sums = numbers.matrices(held(batch, lanes, c), _SUMS, "f32") + left @ right
        for place, values in enumerate(numbers.fragments(sums, _SUMS).reshape(-1, 4).T):
            batch.registers["f32"][d[place]][lanes] = values

    return run


@instruction("bra|bra.uni", 1)
def _branch(i, match, code):
    expect(isinstance(i.operands[0], Symbol), "a label")
    return _of_machine


@instruction("ret", 0)
def _return(i, match, code):
    return _of_machine


@instruction(r"bar\.sync", 1)
def _barrier(i, match, code):
    expect(i.operands == (Immediate(0),), "barrier 0")
    return _of_machine


def _of_machine(batch: Batch, lanes: Lanes) -> None:
    raise AssertionError("the machine executes this instruction itself")
