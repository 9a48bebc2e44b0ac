"""The instructions of tests/ptx against scalars and the tables of the PTX ISA."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.parse import UnknownPTXError
from support.kernels.few_lines import execute, vectors

LANES = np.arange(32)
GROUP, IN_GROUP = LANES >> 2, LANES % 4  # groupID and threadID_in_group of the PTX ISA
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def elementwise(operation: str, *sources: np.ndarray, out: type = np.uint32) -> np.ndarray:
    """Runs an instruction on sources in %r21, %r22, ... or %h21, ...; returns %r20 or %h20."""
    letter = {2: "h", 4: "r", 8: "d"}
    given = {
        f"{letter[source.itemsize]}{21 + place}": source for place, source in enumerate(sources)
    }
    batch = execute(operation, threads=len(sources[0]), **given)
    assert not batch.machine.hazards
    return batch.registers[str(8 * np.dtype(out).itemsize)][20].view(out)


def test_an_unknown_instruction_names_its_line():
    for line, message in {
        "add.f16 %h1, %h2, %h3;": "the opcode is not known",
        "add.s32 %r2, %r3;": "expected .* operands, got 2",
        "add.rz.f32 %r2, %r3, %r4;": "the opcode is not known",
        "add.s64 %r2, %r3, %r4;": "expected a register of s64",
    }.items():
        with pytest.raises(UnknownPTXError, match=rf"line 11 .*{message}"):
            execute(line)


def rounded(x: Fraction) -> float:
    """Rounds to float32, ties to even, by exact arithmetic."""
    if x == 0:
        return 0.0
    exponent = max(math.frexp(float(abs(x)))[1] - 24, -149)
    return float(round(x / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_fma_rounds_once():
    random = np.random.default_rng(0)
    a, b, c = (
        np.ldexp(random.standard_normal(960), random.integers(-6, 6, 960)).astype(np.float32)
        for _ in range(3)
    )
    # products whose sum with 2^-24 of another number lies next to a tie
    near = np.float32(1 + 2**-12)
    a[:64], b[:64], c[:64] = near, near, np.ldexp(np.float32(1), -np.arange(64))
    a[64:128], b[64:128], c[64:128] = (
        1 + 2**-23,
        1 - 2**-24,
        np.ldexp(np.float32(-1), np.arange(64) - 40),
    )
    got = elementwise("fma.rn.f32 %r20, %r21, %r22, %r23;", a, b, c, out=np.float32)
    expected = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c)
    ]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


def numbers() -> np.ndarray:
    random = np.random.default_rng(4)
    values = np.ldexp(random.standard_normal(800), random.integers(-30, 20, 800)).astype(np.float32)
    ties = np.ldexp(1 + np.arange(1, 64, 2) / 2**11, np.arange(-16, 16)).astype(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 65519, 65520, 6e-8, 3e-8]
    special += [1 + 2**-8, 1 + 3 * 2**-8]
    return np.concatenate([values, ties, -ties, np.array(special, np.float32)])


def test_conversions():
    values = numbers()
    for kind, dtype in DTYPES.items():
        bits = elementwise(f"cvt.rn.{kind}.f32 %h20, %r21;", values, out=np.uint16)
        expected = torch.from_numpy(values).to(dtype)
        np.testing.assert_array_equal(
            torch.from_numpy(bits.view(np.int16)).view(dtype).float(), expected.float()
        )
        wide = elementwise(f"cvt.f32.{kind} %r20, %h21;", bits, out=np.float32)
        np.testing.assert_array_equal(wide, expected.float().numpy())
        two = elementwise(f"cvt.rn.{kind}x2.f32 %r20, %r21, %r22;", values, values[::-1].copy())
        np.testing.assert_array_equal(two & 0xFFFF, bits[::-1])
        np.testing.assert_array_equal(two >> 16, bits)
    finite = np.isfinite(values) & (np.abs(values) > 1e-37)
    mantissa, exponent = np.frexp(values[finite].astype(np.float64))
    tf32 = np.ldexp(np.trunc(np.abs(mantissa) * 2**11 + 0.5) * np.sign(mantissa), exponent - 11)
    np.testing.assert_array_equal(
        elementwise("cvt.rna.tf32.f32 %r20, %r21;", values, out=np.float32)[finite],
        tf32.astype(np.float32),
    )
    power = elementwise("ex2.approx.ftz.f32 %r20, %r21;", values, out=np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(
            power, np.exp2(values.astype(np.float64)).astype(np.float32), rtol=3e-7, atol=2.0**-126
        )


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def bfe(x: int, start: int, count: int, negative: bool) -> int:
    """As in the PTX ISA, bit by bit."""
    start, count = start & 255, count & 255
    sign = x >> min(start + count - 1, 31) & 1 if negative and count else 0
    bits = [x >> (start + i) & 1 if i < count and start + i < 32 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def permuted(a: int, b: int, selector: int) -> int:
    """As prmt in the PTX ISA, byte by byte; the top bit of a digit repeats the byte's sign."""
    bytes_ = (a | b << 32).to_bytes(8, "little")
    digits = [selector >> 4 * i & 15 for i in range(4)]
    chosen = [bytes_[digit & 7] for digit in digits]
    signed_ = [255 * (byte >> 7) if digit & 8 else byte for byte, digit in zip(chosen, digits)]
    return int.from_bytes(signed_, "little")


INTEGERS = {
    "add.s32 %r20, %r21, %r22;": lambda a, b, c: a + b,
    "mul.lo.s32 %r20, %r21, %r22;": lambda a, b, c: a * b,
    "mad.lo.s32 %r20, %r21, %r22, %r23;": lambda a, b, c: a * b + c,
    "div.s32 %r20, %r21, %r22;": lambda a, b, c: int(Fraction(signed(a), signed(b))) if b else -1,
    "rem.u32 %r20, %r21, %r22;": lambda a, b, c: a % b if b else a,
    "rem.s32 %r20, %r21, %r22;": lambda a, b, c: (
        signed(a) - int(Fraction(signed(a), signed(b))) * signed(b) if b else a
    ),
    "shl.b32 %r20, %r21, %r23;": lambda a, b, c: a << c if c < 32 else 0,
    "shr.u32 %r20, %r21, %r23;": lambda a, b, c: a >> min(c, 32),
    "shr.s32 %r20, %r21, %r23;": lambda a, b, c: signed(a) >> min(c, 31),
    "bfe.u32 %r20, %r21, %r23, 7;": lambda a, b, c: bfe(a, c, 7, False),
    "bfe.s32 %r20, %r21, 3, %r23;": lambda a, b, c: bfe(a, 3, c, True),
    "bfi.b32 %r20, %r21, %r22, 29, 3;": lambda a, b, c: b & (1 << 29) - 1 | (a & 7) << 29,
    "prmt.b32 %r20, %r21, %r22, %r23;": lambda a, b, c: permuted(a, b, c),
    "prmt.b32 %r20, %r21, 0, 0x7701U;": lambda a, b, c: (a & 255) << 8 | a >> 8 & 255,
    "prmt.b32 %r20, %r21, %r22, 0xC362U;": lambda a, b, c: permuted(a, b, 0xC362),
    "max.s32 %r20, %r21, %r22;": lambda a, b, c: max(signed(a), signed(b)),
    "min.u32 %r20, %r21, %r22;": min,
}


@pytest.mark.parametrize("operation", INTEGERS)
def test_integers(operation):
    random, function = np.random.default_rng(5), INTEGERS[operation]
    a, b = (
        random.integers(0, 1 << 32, 256, dtype=np.uint32)
        >> random.integers(0, 31, 256).astype(np.uint32)
        for _ in range(2)
    )
    a[::7], b[::5] = -a[::7].astype(np.int32), 0
    c = random.integers(0, 40, 256, dtype=np.uint32)
    got = elementwise(operation, a, b, c)
    expected = [
        function(x, y, z) if function is not min else min(x, y)
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())
    ]
    np.testing.assert_array_equal(got, np.array([each % (1 << 32) for each in expected], np.uint32))


def test_comparisons_with_nan():
    a = np.array([1, 1, 2, np.nan, np.nan], np.float32)
    b = np.array([1, 2, 1, 1, np.nan], np.float32)
    expected = {"eq": "10000", "ne": "01100", "lt": "01000", "ge": "10100"}
    expected |= {"equ": "10011", "neu": "01111", "ltu": "01011"}
    for name, each in expected.items():
        body = f"setp.{name}.f32 %p1, %r21, %r22;\nselp.b32 %r20, 1, 0, %p1;"
        assert "".join(map(str, elementwise(body, a, b))) == each, name
    for kind, dtype in DTYPES.items():
        halves = [torch.from_numpy(np.stack([each, each[::-1]], 1)).to(dtype) for each in (a, b)]
        words = [each.view(torch.int32).numpy()[:, 0] for each in halves]
        body = (
            f"setp.le.{kind}x2 %p1|%p2, %r21, %r22;\nselp.b32 %r20, 1, 0, %p1;\n@%p2 add.u32 %r20, "
            "%r20, 10;"
        )
        np.testing.assert_array_equal(elementwise(body, *words), [1, 1, 0, 10, 10])


def shuffled(mode: str, lane: int, by: int, clamp: int) -> tuple[int, bool]:
    """Source lane and predicate, as in the PTX ISA."""
    segment, last = clamp >> 8 & 31, clamp & 31
    low, high = lane & segment, (lane & segment) | (last & ~segment & 31)
    source = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": low | (by & ~segment & 31),
    }[mode]
    inside = source >= high if mode == "up" else source <= high
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
def test_shuffles(mode):
    for by, clamp in itertools.product(
        (1, 3, 16), (0 if mode == "up" else 31, 0x1800 | (0 if mode == "up" else 31))
    ):
        body = (
            f"shfl.sync.{mode}.b32 %r20|%p1, %r21, {by}, {clamp}, -1;\n@%p1 add.u32 %r20, %r20, "
            "1000;"
        )
        got = elementwise(body, LANES.astype(np.uint32))
        sources = [shuffled(mode, lane, by, clamp) for lane in range(32)]
        np.testing.assert_array_equal(got, [source + 1000 * inside for source, inside in sources])


# Row and column of a lane's elements: [lane, element]. "Matrix Fragments for mma.m16n8k16 with
# floating point type".
A16 = [
    (GROUP if i < 2 or 4 <= i < 6 else GROUP + 8, IN_GROUP * 2 + (i & 1) + (8 if i >= 4 else 0))
    for i in range(8)
]
B16 = [(IN_GROUP * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP) for i in range(4)]
SUMS = [(GROUP if i < 2 else GROUP + 8, IN_GROUP * 2 + (i & 1)) for i in range(4)]
# "Matrix Fragments for mma.m16n8k8", .tf32
A8 = [
    (GROUP if i in (0, 2) else GROUP + 8, IN_GROUP if i in (0, 1) else IN_GROUP + 4)
    for i in range(4)
]
B8 = [(IN_GROUP if i == 0 else IN_GROUP + 4, GROUP) for i in range(2)]


def fragments(matrix: np.ndarray, places: list) -> np.ndarray:  # [32, elements]
    return np.ascontiguousarray(np.stack([matrix[row, column] for row, column in places], axis=1))


def stored(matrix: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tf32":
        return matrix
    return torch.from_numpy(matrix).to(DTYPES[kind]).view(torch.int16).numpy()


def as_read(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Returns what a tensor core reads, in float64: rounded halves, or truncated TF32."""
    if kind == "tf32":
        return (matrix.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    return torch.from_numpy(matrix).to(DTYPES[kind]).double().numpy()


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind):
    depth, order_a, order_b = (8, A8, B8) if kind == "tf32" else (16, A16, B16)
    random = np.random.default_rng(1)
    a, b, c = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((16, depth), (depth, 8), (16, 8))
    )
    operands = (20, stored(a, kind), order_a), (24, stored(b, kind), order_b), (26, c, SUMS)
    given = {}
    for first, matrix, order in operands:
        given |= vectors(first, fragments(matrix, order).view(np.uint32))
    opcode = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    sums = "{%r26, %r27, %r28, %r29}"
    batch = execute(
        f"{opcode} {sums}, {{%r20, %r21, %r22, %r23}}, {{%r24, %r25}}, {sums};", **given
    )
    expected = fragments(c + as_read(a, kind) @ as_read(b, kind), SUMS)
    np.testing.assert_allclose(
        batch.registers["32"][26:30].view(np.float32).T, expected, rtol=0, atol=1e-5
    )


def test_registers_that_nobody_wrote_are_nan():
    """As a number of any floating-point type; and where they hold an address, it is a hazard."""
    body = """
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r26, %r27, %r28, %r29},
        {%r2, %r2, %r2, %r2}, {%r2, %r2}, {%r26, %r27, %r28, %r29};
    cvt.f32.bf16 %r30, %h20;
    cvt.f32.f16 %r31, %h20;
    mov.b64 {%r32, %r33}, %d20;
    ld.global.b32 %r40, [%d0];
    ld.shared.b32 %r40, [%r41];
    """
    batch = execute(body, r2=np.zeros(32, np.uint32))
    assert np.isnan(batch.registers["32"][26:34].view(np.float32)).all()
    assert [hazard.kind for hazard in batch.machine.hazards.values()] == [
        "global address is outside of the tensors",
        "shared address is outside of the program's memory",
    ]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans):
    """Lane 8 i + j passes row j of matrix i, and gets row groupID of each matrix."""
    memory = np.arange(256, dtype=np.uint16)
    body = f"""
    shl.b32 %r3, %r0, 4;
    st.shared.v4.b32 [%r3], {{%r20, %r21, %r22, %r23}};
    bar.sync 0;
    xor.b32 %r4, %r3, 496;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r24, %r25, %r26, %r27}}, [%r4];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r24, %r25, %r26, %r27}};
    ld.shared.v4.b32 {{%r28, %r29, %r30, %r31}}, [%r3+512];
    """
    batch = execute(body, **vectors(20, memory.view(np.uint32).reshape(32, 4)))
    assert not batch.machine.hazards
    words = batch.registers["32"]
    matrices = memory.reshape(32, 8)[::-1].reshape(4, 8, 8)
    np.testing.assert_array_equal(
        np.ascontiguousarray(words[28:32].T).view(np.uint16).ravel(), matrices.ravel()
    )
    if trans:
        matrices = matrices.swapaxes(1, 2)
    expected = (
        matrices[:, GROUP, IN_GROUP * 2]
        | matrices[:, GROUP, IN_GROUP * 2 + 1].astype(np.uint32) << 16
    )
    np.testing.assert_array_equal(words[24:28], expected)
