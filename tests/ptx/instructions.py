"""What each instruction does to the lanes that execute it. An opcode, modifier or operand that is not here is an error."""

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


def instruction(pattern: str, *counts: int) -> Callable:
    """Registers a function of an instruction, a match of its opcode and the code; it returns a step. counts: of operands."""

    def register(build: Callable) -> Callable:
        _TABLE.append((re.compile(pattern), counts, build))
        return build

    return register


def step_of(instruction: Instruction, code: Code) -> Step:
    expected: list[int] = []
    for pattern, counts, build in _TABLE:
        if match := pattern.fullmatch(instruction.opcode):
            fits = len(instruction.operands) in counts
            if fits and (step := build(instruction, match, code)):
                return step
            expected += counts
    if expected:
        raise UnknownPTXError(f"expected {expected} operands, got {len(instruction.operands)}")
    raise UnknownPTXError("the opcode is not known")


def dtype_of(kind: str) -> np.dtype:
    """Returns numpy's dtype of a type like b32."""
    return np.dtype({"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8))


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise UnknownPTXError(f"expected {what}")


def bank_of(kind: str) -> str:
    """Returns the bank of registers of a type."""
    return {"pred": "pred", "f32x2": "64"}.get(kind, kind[1:])


def reader(operand: Operand, kind: str, code: Code) -> Reader:
    """Returns a function that reads an operand of lanes as a type: pred, b32, f32, f32x2, ...; halves as float32."""
    if kind in numbers.HALVES:
        bits_of, widen = reader(operand, "b16", code), numbers.HALVES[kind]
        return lambda batch, lanes: widen(bits_of(batch, lanes))
    if isinstance(operand, Register):
        index = operand.index
        expect(operand.bank == bank_of(kind), f"a register of {kind}")
        return lambda batch, lanes: batch.registers[kind][index][lanes]
    if isinstance(operand, Special):
        name, dtype = operand.name, dtype_of(kind)
        expect(dtype.itemsize == 4, f"an operand of {kind}")
        return lambda batch, lanes: batch.special[name][lanes].view(dtype)
    if isinstance(operand, Symbol):
        kernel = code.kernel
        bits = kernel.parameters[operand.name].offset if operand.name in kernel.parameters else kernel.shared[operand.name]
    else:
        expect(isinstance(operand, Immediate), f"an operand of {kind}")
        bits = operand.bits
    value: Any = np.bool_(bits != 0)
    if kind == "f32x2":
        value = np.array([bits & 0xFFFFFFFF, bits >> 32 & 0xFFFFFFFF], np.uint32).view(np.float32)
    elif kind != "pred":
        value = np.array(bits & (1 << int(kind[1:])) - 1, f"u{int(kind[1:]) // 8}").view(dtype_of(kind))[()]
    return lambda batch, lanes: value


def spread(read: Reader, batch: Batch, lanes: Lanes) -> np.ndarray:
    """Returns an operand of the lanes, each with a value of its own."""
    return np.broadcast_to(read(batch, lanes), batch.numbers[lanes].shape)


def indices(operand: Operand, count: int, bank: str) -> list[int]:
    """Returns the indices of the registers of a vector."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    fits = len(items) == count and all(isinstance(each, Register) and each.bank == bank for each in items)
    expect(fits, f"{count} registers of {bank} bits")
    return [each.index for each in items]


def addresses(operand: Operand, kind: str, code: Code) -> Reader:
    expect(isinstance(operand, Address), "an address")
    base, dtype = reader(operand.base, kind, code), dtype_of(kind).type
    offset = dtype(operand.offset % (1 << 8 * dtype().itemsize))
    return lambda batch, lanes: spread(base, batch, lanes) + offset


# ---- One result of each lane's sources


def _doubled(x: np.ndarray) -> np.ndarray:
    return x.astype(f"{x.dtype.kind}{2 * x.itemsize}")


def _ordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


def _unordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _precisely(function: Callable) -> Callable:
    return lambda x: function(np.asarray(x, np.float64)).astype(np.float32)


def _same(x: Any) -> Any:
    return x


# Opcode, where T stands for a type of integers, L for bits or pred, A for any type, H for bf16 or f16, and ? follows what may
# be left out; types of the result and of the sources (2T: twice as wide); the function.
_TYPES = {"T": "[bsu](?:16|32|64)", "L": "b16|b32|b64|pred", "A": "[bsuf](?:16|32|64)|pred", "H": "bf16|f16"}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_SUMS_AND_PRODUCTS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_ELEMENTWISE: list[tuple[str, str, Callable]] = [
    ("add.T", "T T T", np.add), ("sub.T", "T T T", np.subtract), ("mul.lo.T", "T T T", np.multiply),
    ("min.T", "T T T", np.minimum), ("max.T", "T T T", np.maximum), ("div.T", "T T T", numbers.divided),
    ("rem.T", "T T T", lambda a, b: a - numbers.divided(a, b) * b),
    ("and.L", "L L L", np.bitwise_and), ("or.L", "L L L", np.bitwise_or), ("xor.L", "L L L", np.bitwise_xor),
    ("not.L", "L L", np.invert), ("neg.T", "T T", np.negative), ("abs.T", "T T", np.abs),
    ("mul.wide.T", "2T T T", lambda a, b: _doubled(a) * _doubled(b)),
    ("mad.wide.T", "2T T T 2T", lambda a, b, c: _doubled(a) * _doubled(b) + c),
    ("mad.lo.T", "T T T T", lambda a, b, c: a * b + c),
    ("shl.T", "T T u32", lambda x, count: numbers.shifted(x, count, left=True)),
    ("shr.T", "T T u32", lambda x, count: numbers.shifted(x, count, left=False)),
    ("bfe.T", "T T u32 u32", numbers.extracted), ("bfi.b32", "b32 b32 b32 u32 u32", numbers.inserted),
    *((f"setp.{name}.T", "pred T T", f) for name, f in _COMPARE.items()),
    *((f"setp.{name}.ftz?.f32", "pred f32 f32", _ordered(f)) for name, f in _COMPARE.items()),
    *((f"setp.{name}u.ftz?.f32", "pred f32 f32", _unordered(f)) for name, f in _COMPARE.items()),
    *((f"setp.{name}.H", "pred H H", _ordered(f)) for name, f in _COMPARE.items()),
    ("mov.A", "A A", _same), ("cvta.to.global.u64", "u64 u64", _same),
    ("selp.A", "A A A pred", lambda a, b, p: np.where(p, a, b)),
    *((f"{name}.rn?.ftz?.f32", "f32 f32 f32", f) for name, f in _SUMS_AND_PRODUCTS.items()),
    *((f"{name}.f32x2", "f32x2 f32x2 f32x2", f) for name, f in _SUMS_AND_PRODUCTS.items()),
    ("min.ftz?.f32", "f32 f32 f32", np.fmin), ("max.ftz?.f32", "f32 f32 f32", np.fmax),
    ("min.ftz?.f32", "f32 f32 f32 f32", lambda a, b, c: np.fmin(np.fmin(a, b), c)),
    ("max.ftz?.f32", "f32 f32 f32 f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    ("fma.rn.ftz?.f32", "f32 f32 f32 f32", numbers.fma), ("fma.rn.f32x2", "f32x2 f32x2 f32x2 f32x2", numbers.fma),
    *((f"div.{how}.ftz?.f32", "f32 f32 f32", np.divide) for how in ("full", "approx", "rn")),
    ("neg.ftz?.f32", "f32 f32", np.negative), ("abs.ftz?.f32", "f32 f32", np.abs), ("add.rn.f32.H", "f32 H f32", np.add),
    *((f"{name}.approx.ftz?.f32", "f32 f32", _precisely(f)) for name, f in (("ex2", np.exp2), ("lg2", np.log2))),
    *((f"rcp.{how}.ftz?.f32", "f32 f32", _precisely(np.reciprocal)) for how in ("approx", "rn")),
    ("cvt.rpi.ftz?.f32.f32", "f32 f32", np.ceil), ("cvt.rna.tf32.f32", "b32 f32", numbers.to_tf32),
    ("cvt.rn.f32.T", "f32 T", _same), ("cvt.f32.H", "f32 H", _same), ("cvt.rn.H.f32", "H f32", _same),
    *((f"cvt.{kind}.T", f"{kind} T", _same) for kind in ("u16", "s16", "u32", "s32", "u64", "s64")),
]  # fmt: skip


def _elementwise(instruction: Instruction, kind: str, code: Code, kinds: list[str], function: Callable) -> Step:
    """Returns a step that writes function(sources) to the first operand. kind: what the opcode has for T, L, A or H."""
    double = f"{kind[0]}{2 * int(kind[1:])}" if "2T" in kinds else ""
    result, *of_sources = ({**dict.fromkeys(_TYPES, kind), "2T": double}.get(each, each) for each in kinds)
    narrow = numbers.TO_HALF.get(result, _same)
    result = "b16" if result in numbers.HALVES else result
    sources = [reader(operand, each, code) for operand, each in zip(instruction.operands[1:], of_sources, strict=True)]
    (index,) = indices(instruction.operands[0], 1, bank_of(result))
    flushed = numbers.flushed if ".ftz" in instruction.opcode else _same

    def run(batch: Batch, lanes: Lanes) -> None:
        values = [flushed(source(batch, lanes)) for source in sources]
        batch.registers[result][index][lanes] = narrow(flushed(function(*values)))

    return run


def _register(opcode: str, kinds: list[str], function: Callable) -> None:
    pattern = ""
    for part in opcode.split("."):
        wild = f"(?P<type>{_TYPES[part]})" if part in _TYPES else part
        pattern += rf"(\.{part[:-1]})?" if part.endswith("?") else rf"\.{wild}"

    def build(i: Instruction, match: re.Match, code: Code) -> Step:
        return _elementwise(i, match.groupdict().get("type", ""), code, kinds, function)

    instruction(pattern.removeprefix(r"\."), len(kinds))(build)


@instruction(r"mov\.([bsu](?:32|64))", 2)
def _move_parts(i, match, code):
    """Splits a register into parts, or joins parts; None if there are no parts."""
    (target, source), kind = i.operands, match[1]
    parts = next((each.items for each in i.operands if isinstance(each, Vector)), ())
    part = f"b{int(kind[1:]) // max(1, len(parts))}"
    if isinstance(target, Vector):
        whole = reader(source, kind, code)
        targets = [(place, *indices(each, 1, part[1:])) for place, each in enumerate(parts) if each != Symbol("_")]

        def split(batch: Batch, lanes: Lanes) -> None:
            values = np.ascontiguousarray(spread(whole, batch, lanes))[:, None].view(dtype_of(part))
            for place, index in targets:
                batch.registers[part][index][lanes] = values[:, place]

        return split
    (index,), pieces = indices(target, 1, kind[1:]), [reader(each, part, code) for each in parts]

    def join(batch: Batch, lanes: Lanes) -> None:
        values = np.stack([spread(piece, batch, lanes) for piece in pieces], 1)
        batch.registers[kind][index][lanes] = values.view(dtype_of(kind))[:, 0]

    return join if parts else None


@instruction(r"cvt\.rn\.(bf16|f16)x2\.f32", 3)
def _narrow_two(i, match, code):
    narrow, (high, low) = numbers.TO_HALF[match[1]], (reader(each, "f32", code) for each in i.operands[1:])
    (index,) = indices(i.operands[0], 1, "32")

    def run(batch: Batch, lanes: Lanes) -> None:
        upper, lower = (narrow(spread(each, batch, lanes)).astype(np.uint32) for each in (high, low))
        batch.registers["b32"][index][lanes] = upper << np.uint32(16) | lower

    return run


for _opcode, _kinds, _function in _ELEMENTWISE:
    _register(_opcode, _kinds.split(), _function)


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
        values = np.stack([spread(source, batch, lanes) for source in sources], 1)
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
        bytes_read = spread(valid, batch, lanes)
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
        rows = spread(value, batch, lanes).reshape(-1, 32)
        shuffled = np.take_along_axis(rows, np.where(inside, source, own).reshape(-1, 32) & 31, 1)
        batch.registers["b32"][target_index][lanes] = shuffled.ravel()
        if valid:
            batch.registers["pred"][valid.index][lanes] = inside

    return run


@instruction(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", 2)
def _matrix(i, match, code):
    count, loads = int(match[2]), match[1] == "ld"
    vector, address = i.operands if loads else i.operands[::-1]
    words_of = indices(vector, count, "32")
    at = addresses(address, "u32", code)
    smallest(code, "shared", 16)

    def run(batch: Batch, lanes: Lanes) -> None:
        lanes = batch.whole(i, lanes)
        first = batch.numbers[lanes].reshape(-1, 32)[:, : 8 * count].ravel()  # lanes that pass the rows' addresses
        access, rows = batch.access(i, first), at(batch, first)
        halves = batch.shared.load(access, rows, 4, 4) if loads else held(batch, lanes, words_of).swapaxes(1, 2)
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


@instruction(r"bra(?:\.uni)?|bar\.sync|ret", 0, 1)
def _control(i, match, code):
    """The machine executes these itself."""
    expect(i.opcode != "bar.sync" or i.operands == (Immediate(0),), "barrier 0")
    return lambda batch, lanes: None
