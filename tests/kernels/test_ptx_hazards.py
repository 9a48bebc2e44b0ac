"""The hazards that tests/ptx must report, each in a kernel of a few lines, and none in its right form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx.parse import UnknownPTXError
from test_ptx_instructions import FILL, execute

STORE = "st.shared.v4.b32 [%r3], {%r20, %r21, %r22, %r23};"
COPY = "cp.async.cg.shared.global [%r3], [%d11], 16;\ncp.async.commit_group;\n"
PLACE = FILL.replace(STORE, "")
LOAD = "ld.shared.v4.b32 {%r24, %r25, %r26, %r27}, [%r4];\n"
OTHERS = "xor.b32 %r4, %r3, 512;\n"  # what the same lane of the other warp wrote
OWN = "mov.b32 %r4, %r3;\n"
OUT = "add.u64 %d12, %d1, %d10;\nst.global.v4.b32 [%d12], {%r24, %r25, %r26, %r27};\n"

# name -> body for two warps, and a part of the hazard, "" for none
CASES = {
    "a barrier between warps": (FILL + OTHERS + "bar.sync 0;\n" + LOAD + OUT, ""),
    "no barrier": (FILL + OTHERS + LOAD + OUT, "shared memory is read while another warp or a copy writes it"),
    "own data need no barrier": (FILL + OWN + LOAD + OUT, ""),
    "written again with no barrier": (
        FILL + OTHERS + "bar.sync 0;\n" + LOAD + STORE,
        "shared memory is written while another warp or a copy reads it",
    ),
    "never written": (PLACE + OWN + LOAD + OUT, "shared memory is read that was never written"),
    "beyond the end": (FILL + "ld.shared.b32 %r24, [%r3+4000];\n", "shared address is outside of the program's memory"),
    "unaligned": (FILL + "ld.shared.v2.b32 {%r24, %r25}, [%r3+4];\n", "shared address is not a multiple of 8"),
    "a copy": (PLACE + COPY + "cp.async.wait_group 0;\n" + OWN + LOAD + OUT, ""),
    "a copy not waited for": (PLACE + COPY + "cp.async.wait_group 1;\n" + OWN + LOAD + OUT, "shared memory is read while"),
    "a copy not ended": (
        PLACE + COPY.replace("cp.async.commit_group;\n", "") + "cp.async.wait_group 0;\n" + OWN + LOAD + OUT,
        "shared memory is read while another warp or a copy writes it",
    ),
    "another warp's copy": (PLACE + COPY + OTHERS + "cp.async.wait_group 0;\nbar.sync 0;\n" + LOAD + OUT, ""),
    "another warp's copy, the barrier before the wait": (
        PLACE + COPY + OTHERS + "bar.sync 0;\ncp.async.wait_group 0;\n" + LOAD + OUT,
        "shared memory is read while another warp or a copy writes it",
    ),
    "a copy over what others read": (
        FILL + OTHERS + "bar.sync 0;\n" + LOAD + COPY,
        "shared memory is written while another warp or a copy reads it",
    ),
    "outside of a tensor": (PLACE + "ld.global.b32 %r24, [%d11+16];\n", "global address is outside of the tensors"),
    "before a tensor": (PLACE + "st.global.b32 [%d11+-4], %r20;\n", "global address is outside of the tensors"),
    "global unaligned": (PLACE + "ld.global.b32 %r24, [%d0+2];\n", "global address is not a multiple of 4"),
    "a global race": (
        PLACE + OTHERS + "sub.u32 %r5, %r4, %r1;\ncvt.u64.u32 %d13, %r5;\nadd.u64 %d13, %d13, %d1;\n"
        "add.u64 %d12, %d1, %d10;\nst.global.b32 [%d12], %r20;\nld.global.b32 %r24, [%d13];\n",
        "global memory is read while another warp or a copy writes it",
    ),
    "different values in one place": (
        PLACE + "mov.b32 %r20, %r0;\nst.shared.b32 [%r1], %r20;\n",
        "lanes store different values to one place of shared memory",
    ),
    "equal values in one place": (PLACE + "st.shared.b32 [%r1], 7;\n", ""),
    "a barrier for one warp": (
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\n", "the barrier is not reached by all threads",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $L1;\nbar.sync 0;\nbra $L2;\n$L1:\nbar.sync 0;\n$L2:\n",
        "the barrier is not reached by all threads",
    ),
    "half a warp": (
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra $L1;\nshfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;\n$L1:\n",
        "executed by some of 32 lanes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hazards(name):
    body, expected = CASES[name]
    machine = execute(body, np.zeros(64 * 4, np.uint32), np.zeros(64 * 4, np.uint32), threads=64)
    kinds = {hazard.kind for hazard in machine.hazards.values()}
    assert any(kind.startswith(expected) for kind in kinds) if expected else not kinds, kinds


def test_programs_that_write_to_one_place():
    machine = execute("st.global.b32 [%d0], %r0;\n", np.zeros(4, np.uint32), programs=2)
    assert [hazard.kind for hazard in machine.hazards.values()] == [
        "lanes store different values to one place of global memory"
    ]
    body = "mov.u32 %r2, %ctaid.x;\nsetp.eq.u32 %p1, %r2, 1;\n@%p1 bra $L1;\nst.global.b32 [%d0], 7;\nret;\n$L1:\n"
    machine = execute(f"{body}ld.global.b32 %r2, [%d0];\n", np.zeros(4, np.uint32), programs=2)
    (hazard,) = machine.hazards.values()
    assert hazard.kind == "global memory is read while another warp or a copy writes it"
    assert hazard.where == "program 1, warp 0, lane 0"
    body = "ld.global.b32 %r3, [%d0];\nbar.sync 0;\nmov.u32 %r2, %ctaid.x;\nsetp.eq.u32 %p1, %r2, 0;\n"
    machine = execute(f"{body}@%p1 st.global.b32 [%d0], 7;\n", np.zeros(4, np.uint32), programs=2)
    (hazard,) = machine.hazards.values()
    assert hazard.kind == "global memory is written while another warp or a copy reads it"


def test_gaps_between_the_elements_of_a_view():
    body = "mul.wide.u32 %d10, %r0, 4;\nadd.u64 %d11, %d0, %d10;\nst.global.b32 [%d11], %r0;\n"
    memory = torch.zeros(64)
    (hazard,) = execute(body, memory[::2].numpy(), threads=32).hazards.values()
    assert hazard.count == 16
    assert (memory[1::2] == 0).all()


# A [64, 64] and B [8, 64] of bfloat16 lie in shared memory with a swizzle of 128 bytes: chunk c of row r at c xor r % 8.
WGMMA = """
mul.wide.u32 %d10, %r0, 16;
add.u64 %d11, %d0, %d10;
shl.b32 %r2, %r0, 4;
add.u32 %r3, %r1, %r2;
""" + "".join(
    f"ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d11+{2048 * i}];\n"
    f"st.shared.v4.b32 [%r3+{2048 * i}], {{%r20, %r21, %r22, %r23}};\n"
    for i in range(5)
) + """
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b32 %r40, 0;
mov.b32 %r41, 0;
mov.b32 %r42, 0;
mov.b32 %r43, 0;
mov.pred %p2, -1;
wgmma.fence.sync.aligned;
""" + "".join(
    f"mov.b64 %d14, {1 << 62 | 64 << 32 | 1 << 16 | 2 * i};\nmov.b64 %d15, {1 << 62 | 64 << 32 | 1 << 16 | 512 + 2 * i};\n"
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r40, %r41, %r42, %r43}, %d14, %d15, %p2, 1, 1, 0, 0;\n"
    for i in range(4)
) + """
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
add.u64 %d12, %d1, %d10;
st.global.v4.b32 [%d12], {%r40, %r41, %r42, %r43};
"""  # fmt: skip


def multiply(body: str) -> tuple[set[str], np.ndarray, np.ndarray]:
    """Returns hazards, A Bᵀ as the kernel computed it, and in float64."""
    rows = torch.from_numpy(np.random.default_rng(6).standard_normal((80, 64))).bfloat16()
    chunks = rows.view(torch.int16).numpy().reshape(80, 8, 8)
    memory = np.stack([chunks[r, np.arange(8) ^ r % 8] for r in range(80)])
    out = np.zeros((4, 8, 4, 2, 2), np.float32)  # warp, groupID, threadID_in_group, row + 8, column
    machine = execute(body, memory, out, threads=128, shared=10240)
    values = rows.double().numpy()
    kinds = {hazard.kind for hazard in machine.hazards.values()}
    return kinds, out.transpose(0, 3, 1, 2, 4).reshape(64, 8), values[:64] @ values[64:72].T


def test_wgmma():
    kinds, got, expected = multiply(WGMMA)
    assert not kinds
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    for old, new, kind in (
        ("fence.proxy.async.shared::cta;", "", "wgmma reads shared memory with no fence.proxy.async after it was written"),
        ("bar.sync 0;", "", "shared memory is read while another warp or a copy writes it"),
        ("wgmma.wait_group.sync.aligned 0;", "", "a register of a wgmma in flight is used"),
        ("wgmma.wait_group.sync.aligned 0;", "st.shared.b32 [%r3], 0;", "shared memory is written while"),
    ):
        assert any(each.startswith(kind) for each in multiply(WGMMA.replace(old, new))[0]), kind
    with pytest.raises(UnknownPTXError, match="no wgmma.fence"):
        multiply(WGMMA.replace("wgmma.fence.sync.aligned;", ""))
