"""Hazards that tests/ptx must report, each in a few lines, and none in their right form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx.capture import Card
from ptx.machine import Batch, Code, LaunchError, Machine
from ptx.parse import UnknownPTXError, parse
from support.kernels.few_lines import execute, kernel_of, vectors

READ_RACE = "shared memory is read while another thread or a copy writes it"
WRITE_RACE = "shared memory is written while another thread or a copy reads it"
STORE = "st.shared.v4.b32 [%r3], {%r20, %r21, %r22, %r23};"
PLACE = """
mul.wide.u32 %d10, %r0, 16;
add.u64 %d11, %d0, %d10;
shl.b32 %r2, %r0, 4;
add.u32 %r3, %r1, %r2;
"""
FILL = PLACE + STORE
COPY = "cp.async.cg.shared.global [%r3], [%d11], 16;\ncp.async.commit_group;\n"
LOAD = "ld.shared.v4.b32 {%r24, %r25, %r26, %r27}, [%r4];\n"
OTHERS = "xor.b32 %r4, %r3, 512;\n"  # what the same lane of the other warp wrote
OWN = "mov.b32 %r4, %r3;\n"
NEXT = "xor.b32 %r4, %r3, 16;\n"  # what the next lane wrote
FIRST = "and.b32 %r4, %r3, -512;\n"  # what the first lane of the warp wrote
SYNC_WARP = "bar.warp.sync -1;\n"

# name -> body for two warps, and a part of the hazard, "" for none
CASES = {
    "a barrier between warps": (FILL + OTHERS + "bar.sync 0;\n" + LOAD, ""),
    "no barrier": (FILL + OTHERS + LOAD, READ_RACE),
    "own data need no barrier": (FILL + OWN + LOAD, ""),
    "written again with no barrier": (FILL + OTHERS + "bar.sync 0;\n" + LOAD + STORE, WRITE_RACE),
    "no barrier between lanes": (FILL + NEXT + LOAD, READ_RACE),
    "written again by another lane": (FILL + NEXT + SYNC_WARP + LOAD + STORE, WRITE_RACE),
    "written again after several lanes": (FILL + FIRST + SYNC_WARP + LOAD + STORE, WRITE_RACE),
    "a barrier of the warp": (FILL + FIRST + SYNC_WARP + LOAD + SYNC_WARP + STORE, ""),
    "a barrier of the warp between warps": (FILL + OTHERS + SYNC_WARP + LOAD, READ_RACE),
    "a barrier of some lanes": ("bar.warp.sync 1;\n", "expected all lanes as members"),
    "another lane's copy": (PLACE + COPY + "cp.async.wait_group 0;\n" + NEXT + LOAD, READ_RACE),
    "never written": (PLACE + OWN + LOAD, "shared memory is read that was never written"),
    "beyond the end": (
        FILL + "ld.shared.b32 %r24, [%r3+4000];\n",
        "shared address is outside of the program's memory",
    ),
    "unaligned": (
        FILL + "ld.shared.v2.b32 {%r24, %r25}, [%r3+4];\n",
        "shared address is not a multiple of 8",
    ),
    "a copy": (PLACE + COPY + "cp.async.wait_group 0;\n" + OWN + LOAD, ""),
    "a copy not waited for": (
        PLACE + COPY + "cp.async.wait_group 1;\n" + OWN + LOAD,
        "shared memory is read while",
    ),
    "a copy not ended": (
        PLACE + COPY.partition("cp.async.commit")[0] + "cp.async.wait_group 0;\n" + OWN + LOAD,
        READ_RACE,
    ),
    "another warp's copy": (
        PLACE + COPY + OTHERS + "cp.async.wait_group 0;\nbar.sync 0;\n" + LOAD,
        "",
    ),
    "another warp's copy, the barrier before the wait": (
        PLACE + COPY + OTHERS + "bar.sync 0;\ncp.async.wait_group 0;\n" + LOAD,
        READ_RACE,
    ),
    "a copy over what others read": (FILL + OTHERS + "bar.sync 0;\n" + LOAD + COPY, WRITE_RACE),
    "outside of a tensor": (
        PLACE + "ld.global.b32 %r24, [%d11+16];\n",
        "global address is outside of the tensors",
    ),
    "before a tensor": (
        PLACE + "st.global.b32 [%d11+-4], %r20;\n",
        "global address is outside of the tensors",
    ),
    "global unaligned": (
        PLACE + "ld.global.b32 %r24, [%d0+2];\n",
        "global address is not a multiple of 4",
    ),
    "a global race": (
        PLACE
        + OTHERS
        + "sub.u32 %r5, %r4, %r1;\ncvt.u64.u32 %d13, %r5;\nadd.u64 %d13, %d13, %d1;\n"
        "add.u64 %d12, %d1, %d10;\nst.global.b32 [%d12], %r20;\nld.global.b32 %r24, [%d13];\n",
        "global memory is read while another thread or a copy writes it",
    ),
    "different values in one place": (
        PLACE + "mov.b32 %r20, %r0;\nst.shared.b32 [%r1], %r20;\n",
        "lanes store different values to one place of shared memory",
    ),
    "equal values in one place": (PLACE + "st.shared.b32 [%r1], 7;\n", ""),
    "a barrier for one warp": (
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\n",
        "the barrier is not reached by all threads",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $L1;\nbar.sync 0;\nbra $L2;\n$L1:\nbar.sync 0;\n"
        "$L2:\n",
        "the barrier is not reached by all threads",
    ),
    "half a warp": (
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra $L1;\nshfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;\n$L1:\n",
        "executed by some of 32 lanes",
    ),
}


def kinds_of(batch: Batch) -> list[str]:
    return [hazard.kind for hazard in batch.machine.hazards.values()]


@pytest.mark.parametrize("name", CASES)
def test_hazards(name):
    body, expected = CASES[name]
    kinds = kinds_of(
        execute(body, np.zeros(64 * 4, np.uint32), np.zeros(64 * 4, np.uint32), threads=64)
    )
    assert any(kind.startswith(expected) for kind in kinds) if expected else not kinds, kinds


@pytest.mark.parametrize(
    ("directive", "allowed", "refused"),
    [
        (".reqntid 64", (64,), (32, 128)),
        (".maxntid 16, 4, 1", (1, 64), (65,)),
        (".minnctapersm 2", (1, 1024), (1025,)),
    ],
)
def test_the_threads_of_a_kernel(directive, allowed, refused):
    code = Code(parse(f".visible .entry test()\n{directive}\n{{\nret;\n}}\n")["test"])
    for threads in allowed:
        Machine().launch(code, 1, threads, 0, [])
    for threads in refused:
        with pytest.raises(LaunchError, match=rf"expected .* threads, got {threads}"):
            Machine().launch(code, 1, threads, 0, [])


def test_a_launch_beyond_the_card():
    code = Code(kernel_of(""))
    Card(sm=86).launch(code, 1, 32, 99 << 10, [])
    for programs, shared, message in (
        (1, (99 << 10) + 1, "to 101376 bytes of shared memory, got 101377"),
        (1 << 31, 0, "programs, got 2147483648"),
        (0, 0, "programs, got 0"),
    ):
        with pytest.raises(LaunchError, match=message):
            Card(sm=86).launch(code, programs, 32, shared, [])


IS_SECOND = "mov.u32 %r2, %ctaid.x;\nsetp.eq.u32 %p1, %r2, 1;\n"
# Two programs with one word: body, and the hazard.
SHARED_WORD = {
    "lanes store different values to one place of global memory": "st.global.b32 [%d0], %r0;\n",
    "global memory is read while another thread or a copy writes it": (
        IS_SECOND
        + "@%p1 bra $L1;\nst.global.b32 [%d0], 7;\nret;\n$L1:\nld.global.b32 %r2, [%d0];\n"
    ),
    "global memory is written while another thread or a copy reads it": (
        "ld.global.b32 %r3, [%d0];\nbar.sync 0;\n" + IS_SECOND + "@!%p1 st.global.b32 [%d0], 7;\n"
    ),
}


@pytest.mark.parametrize("kind", SHARED_WORD)
def test_programs_that_share_a_word(kind):
    batch = execute(SHARED_WORD[kind], np.zeros(4, np.uint32), programs=2)
    assert kinds_of(batch) == [kind]
    if "is read" in kind:
        (hazard,) = batch.machine.hazards.values()
        assert hazard.where == "program 1, warp 0, lane 0"


def test_gaps_between_the_elements_of_a_view():
    body = "mul.wide.u32 %d10, %r0, 4;\nadd.u64 %d11, %d0, %d10;\nst.global.b32 [%d11], %r0;\n"
    memory = torch.zeros(64)
    (hazard,) = execute(body, memory[::2].numpy()).machine.hazards.values()
    assert hazard.count == 16
    assert (memory[1::2] == 0).all()


# A [64, 64] and B [8, 64] of bfloat16 lie in shared memory with a swizzle of 128 bytes: chunk c of
# row r at c xor r % 8.
WGMMA = "".join(
    f"st.shared.v4.b32 [%r3+{2048 * i}], {{%r{i}0, %r{i}1, %r{i}2, %r{i}3}};\n" for i in range(1, 6)
)
WGMMA += """
fence.proxy.async.shared::cta;
bar.sync 0;
mov.pred %p1, 0;
mov.pred %p2, -1;
wgmma.fence.sync.aligned;
"""
for i in range(4):
    descriptors = [1 << 62 | 64 << 32 | 1 << 16 | 128 + first + 2 * i for first in (0, 512)]
    WGMMA += "mov.b64 %d14, {};\nmov.b64 %d15, {};\n".format(*descriptors)
    WGMMA += (
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r60, %r61, %r62, %r63}, %d14, %d15, "
        f"%p{2 if i else 1}, 1, 1, 0, 0;\n"  # the first one clears the sums
    )
WGMMA += """
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mov.b32 %r64, %r60;
"""


def multiply(body: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Returns hazards, A Bᵀ as the kernel computed it, and in float64."""
    rows = torch.from_numpy(np.random.default_rng(6).standard_normal((80, 64))).bfloat16()
    chunks = rows.view(torch.int16).numpy().reshape(80, 8, 8)
    memory = (
        np.stack([chunks[r, np.arange(8) ^ r % 8] for r in range(80)])
        .view(np.uint32)
        .reshape(5, 128, 4)
    )
    given = {"r3": 16 * np.arange(128, dtype=np.uint32)}
    for i, words in enumerate(memory, 1):
        given |= vectors(10 * i, words)
    batch = execute(body, threads=128, shared=12288, **given)
    sums = batch.registers["32"][60:64].view(np.float32).T.reshape(4, 8, 4, 2, 2)
    # from warp, groupID, threadID_in_group, row + 8, column
    out = sums.transpose(0, 3, 1, 2, 4).reshape(64, 8)
    values = rows.double().numpy()
    return kinds_of(batch), out, values[:64] @ values[64:72].T


def test_wgmma():
    kinds, got, expected = multiply(WGMMA)
    assert not kinds
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    wait = "wgmma.wait_group.sync.aligned 0;"
    for old, new, kind in (
        ("fence.proxy.async.shared::cta;", "", "wgmma reads shared memory with no fence.proxy"),
        ("bar.sync 0;", "", READ_RACE),
        (wait, "", "a register of a wgmma in flight is used"),
        (wait, "st.shared.b32 [%r3+2048], 0;", "shared memory is written while"),
    ):
        assert any(each.startswith(kind) for each in multiply(WGMMA.replace(old, new))[0]), kind
    with pytest.raises(UnknownPTXError, match="no wgmma.fence"):
        multiply(WGMMA.replace("wgmma.fence.sync.aligned;", ""))
