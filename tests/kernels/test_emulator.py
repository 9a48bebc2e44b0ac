"""The emulator of tests/emulator: its instructions against the tables of the PTX ISA, and the errors that it must detect."""

import emulator
import numpy as np
import pytest
import torch

REASON = emulator.why_not()
if REASON:
    pytest.skip(f"kernels cannot be emulated here: {REASON}", allow_module_level=True)

SEEDS = range(20)
LANES = np.arange(32)
GROUP, IN_GROUP = LANES >> 2, LANES % 4  # groupID and threadID_in_group of the PTX ISA

# Row and column of a lane's elements: [lane, element]. "Matrix Fragments for mma.m16n8k16 with floating point type".
A16 = [(GROUP if i < 2 or 4 <= i < 6 else GROUP + 8, IN_GROUP * 2 + (i & 1) + (8 if i >= 4 else 0)) for i in range(8)]
B16 = [(IN_GROUP * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP) for i in range(4)]
C = [(GROUP if i < 2 else GROUP + 8, IN_GROUP * 2 + (i & 1)) for i in range(4)]
# "Matrix Fragments for mma.m16n8k8", .tf32
A8 = [(GROUP if i in (0, 2) else GROUP + 8, IN_GROUP if i in (0, 1) else IN_GROUP + 4) for i in range(4)]
B8 = [(IN_GROUP if i == 0 else IN_GROUP + 4, GROUP) for i in range(2)]


@pytest.fixture(scope="module")
def kernels():
    return emulator.build("wrappers")


def fragments(matrix, places):
    """Returns the fragments [32, elements] of a matrix."""
    return np.ascontiguousarray(np.stack([matrix[row, column] for row, column in places], axis=1))


def bits(values, dtype):
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def round_to_tf32(values):
    """Rounds to 10 bits behind the leading bit, with ties away from zero, in float64."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.trunc(np.abs(mantissa) * 2**11 + 0.5) * np.sign(mantissa), exponent - 11).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_of_halves(kernels, dtype):
    random = np.random.default_rng(1)
    a, b, c = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    left, right, d = fragments(bits(a, dtype), A16), fragments(bits(b, dtype), B16), fragments(c, C)
    kernels.mma(16 if dtype == torch.float16 else 0, left, right, d, 3)
    a, b = (torch.from_numpy(matrix).to(dtype).double().numpy() for matrix in (a, b))
    np.testing.assert_allclose(d, fragments(c + a @ b, C), rtol=0, atol=1e-5)


def test_mma_of_tf32(kernels):
    random = np.random.default_rng(2)
    a, b, c = (random.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    left, right, d = fragments(a, A8), fragments(b, B8), fragments(c, C)
    kernels.mma(19, left, right, d, 3)
    a, b = ((matrix.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for matrix in (a, b))
    np.testing.assert_allclose(d, fragments(c + a @ b, C), rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [True, False])
def test_ldmatrix(kernels, transposed):
    """Lane 8 i + j passes row j of matrix i; of each matrix a lane gets row groupID, columns 2 threadID_in_group and next."""
    random = np.random.default_rng(3)
    memory = np.arange(512, dtype=np.uint16)
    offsets = (random.permutation(64)[:32] * 16).astype(np.int32)
    out = np.zeros((32, 4), np.uint32)
    kernels.ldmatrix(memory, offsets, transposed, out, 5)
    matrices = memory.reshape(64, 8)[offsets // 16].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    expected = matrices[:, GROUP, IN_GROUP * 2] | matrices[:, GROUP, IN_GROUP * 2 + 1].astype(np.uint32) << 16
    np.testing.assert_array_equal(out, expected.T)


def test_ldmatrix_counts_bank_conflicts(kernels):
    memory, out = np.zeros(512, np.uint16), np.zeros((32, 4), np.uint32)
    for stride, replays in ((16, 0), (32, 4 * 1), (64, 4 * 3), (128, 4 * 7)):
        offsets = (np.arange(32) % 8 * stride).astype(np.int32)
        assert kernels.ldmatrix(memory, offsets, False, out, 1) == replays


def test_cp_async_is_seen_after_its_wait_and_not_before(kernels):
    memory = np.arange(1, 257, dtype=np.uint32).reshape(2, 32, 4)
    early, late = np.zeros_like(memory), np.zeros_like(memory)
    kernels.cp_async(memory, 20, early, late, 1)
    memory[:, 20:] = 0
    np.testing.assert_array_equal(late, memory)
    np.testing.assert_array_equal(early[0], memory[0])
    assert np.isnan(early[1].view(np.float32)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(kernels, dtype):
    random = np.random.default_rng(4)
    exponents = random.integers(-30, 20, 4096)
    values = np.ldexp(random.standard_normal(4096), exponents).astype(np.float32)
    ties = np.ldexp(1 + np.arange(1, 64, 2) / 2**11, np.arange(-16, 16)).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519, 65520, 6e-8, 3e-8, 1 + 2**-8, 1 + 3 * 2**-8, 3e38])
    values = np.concatenate([values, ties, -ties, special.astype(np.float32)])
    packed, tf32 = np.zeros(len(values) // 2, np.uint32), np.zeros(len(values), np.uint32)
    back, power = np.zeros(len(values), np.float32), np.zeros(len(values), np.float32)
    kernels.convert(dtype == torch.float16, values, len(packed), packed, back, tf32, power)
    rounded = torch.from_numpy(values).to(dtype)
    np.testing.assert_array_equal(torch.from_numpy(packed.view(np.int16)).view(dtype).float(), rounded.float())
    np.testing.assert_array_equal(back, rounded.float().numpy())
    finite = np.isfinite(values) & (np.abs(values) < 1e38)
    np.testing.assert_array_equal(tf32.view(np.float32)[finite], round_to_tf32(values[finite]))
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(power, np.exp2(values.astype(np.float64)).astype(np.float32), rtol=3e-7)


def test_the_emulator_detects_a_missing_barrier():
    """Without it, lanes read rows that other lanes have not copied yet, under some schedules."""
    wrong = emulator.build("wrappers", replace={"  sync_block();  // the rows have been copied\n": ""})
    memory, out = np.arange(512, dtype=np.uint16), np.zeros((len(SEEDS), 32, 4), np.uint32)
    offsets = (np.arange(32, dtype=np.int32) * 16)[::-1].copy()
    for seed in SEEDS:
        wrong.ldmatrix(memory, offsets, False, out[seed], seed)
    expected = memory.reshape(64, 4, 2)[31 - (np.arange(4) * 8 + GROUP[:, None]), IN_GROUP[:, None]]
    differs = (out != (expected[..., 0] | expected[..., 1].astype(np.uint32) << 16)).any((1, 2))
    assert differs.sum() > len(SEEDS) // 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two barriers", r"sync_block \(wrappers.cpp:\d+\): thread \d+ waits in another, sync_block \(wrappers.cpp:\d+\)"),
        ("missing thread", r"no thread can go on. Threads 0-32 in sync_block \(wrappers.cpp:\d+\); 33 returned; 34-63 in"),
        (
            "divergent warp",
            r"in (shuffle|ldmatrix)_x\w+ \(.*\): thread \d+ of the same warp is in (shuffle|ldmatrix)_x\w+ \(.*\)",
        ),
        ("missing lane", r"Threads 0-2 in shuffle_xor \(wrappers.cpp:\d+\); 3 returned; 4-34 in shuffle_xor"),
        ("misaligned ldmatrix", r"thread (9|41) in ldmatrix_x4 \(.*\): offset 24 in shared memory is not a multiple of 16"),
        ("misaligned cp.async", r"cp_async_16 \(.*\): the global address is not a multiple of 16"),
        ("outside", r"cp_async_16 \(.*\): offset 256 is outside of the 256 bytes of shared memory"),
    ],
)
def test_errors_of_the_emulator_name_threads_and_barriers(kernels, kind, message):
    memory = np.zeros(64, np.float32)
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=r"^block \([01], 0, 0\).*" + message):
            kernels.fault(kind, memory, seed)
    kernels.fault("none", memory, 1)
    assert (memory == 2).all()


def test_every_block_finds_nan_in_shared_memory(kernels):
    memory = np.zeros(64, np.float32)
    kernels.fault("unwritten", memory, 1)
    assert np.isnan(memory).all()


CAUGHT = {
    "shared overrun": "heap-buffer-overflow",
    "global overrun": "heap-buffer-overflow",
    "misaligned vector": "misaligned address",
}


@pytest.mark.slow
def test_sanitizers_pass_what_is_right_and_catch_what_is_wrong():
    """Each fault ends a child process."""
    done = emulator.sanitized(
        f"""
        import os, numpy as np, emulator
        kernels = emulator.build("wrappers", sanitize=True)
        memory = np.zeros(64, np.float32)
        for kind in ("two barriers", "none"):
            try:
                kernels.fault(kind, memory, 1)
            except RuntimeError as error:
                print(error)
        for kind in {[*CAUGHT]}:
            os.write(2, f"FAULT {{kind}}: ".encode())
            child = os.fork()
            if not child:
                kernels.fault(kind, memory, 1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] != 0, kind
        """
    )
    assert done.returncode == 0, done.stderr
    assert "waits in another" in done.stdout
    reports = dict(text.split(":", 1) for text in done.stderr.split("FAULT ")[1:])
    assert reports.keys() == CAUGHT.keys()
    for kind, message in CAUGHT.items():
        assert message in reports[kind]
        assert "wrappers.cpp" in reports[kind]
