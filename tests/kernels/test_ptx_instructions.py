"""Instructions of tests/ptx whose faults the values of kernels would not show: rounding, NaN.

The kernels' values show what integers, shuffles and the matrices of a warp are.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.parse import UnknownPTXError
from support.kernels.few_lines import execute

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


def test_comparisons_with_nan():
    a = np.array([1, 1, 2, np.nan, np.nan], np.float32)
    b = np.array([1, 2, 1, 1, np.nan], np.float32)
    expected = {"eq": "10000", "lt": "01000", "ge": "10100", "neu": "01111", "ltu": "01011"}
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
