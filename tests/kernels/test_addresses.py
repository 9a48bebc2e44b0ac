"""Addresses of compiled kernels are computed in 64 bits where tensors may have 2^31 elements.

test_ptx.py and test_shaped_attention_cuda.py check the kernels of their calls.
"""

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from ptx.overflow import overflows
from support.kernels.few_lines import kernel_of

ROW = """
ld.param.u64 %d0, [p0];
ld.param.b32 %r4, [p0];
mov.u32 %r5, %ctaid.x;
mov.b32 %r6, 0;
$L1:
{place}
add.s64 %d3, %d0, %d1;
ld.global.b16 %h1, [%d3];
add.s32 %r6, %r6, 1;
setp.lt.s32 %p1, %r6, %r4;
@%p1 bra $L1;
"""
# How a place is computed, and the part of an error, "" for none.
PLACES = {
    "a wide product": ("mul.wide.s32 %d1, %r5, %r4;", ""),
    "a product": ("mul.lo.s32 %r7, %r5, %r4;\ncvt.s64.s32 %d1, %r7;", "mul.lo.s32 %r7"),
    "a masked index": (
        "and.b32 %r8, %r5, 127;\nmul.lo.s32 %r7, %r8, %r4;\ncvt.s64.s32 %d1, %r7;",
        "",
    ),
    "a loop": ("mul.lo.s32 %r7, %r6, 2;\ncvt.s64.s32 %d1, %r7;", ""),
    "a loop's product": ("mul.lo.s32 %r7, %r6, %r4;\ncvt.s64.s32 %d1, %r7;", "mul.lo.s32 %r7"),
    "a remainder": (
        "div.s32 %r8, %r5, %r4;\nmul.lo.s32 %r7, %r8, %r4;\nsub.s32 %r9, %r5, %r7;\n"
        "mul.wide.s32 %d1, %r9, 2;",
        "",
    ),
    "half of an address": ("cvt.u32.u64 %r7, %d2;\ncvt.u64.u32 %d1, %r7;", "cvt.u32.u64 %r7"),
    "no part of it": ("mul.lo.s32 %r7, %r5, %r4;\nmul.wide.s32 %d1, %r5, 2;", ""),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_may_overflow_is_found(name):
    place, expected = PLACES[name]
    body = "ld.param.u64 %d2, [p0];\n" + ROW.format(place=place)
    found = overflows(kernel_of(body))
    assert len(found) == bool(expected)
    assert all(expected in each for each in found)
