"""shaped_attention's CUDA C++ kernels under the emulator: values, gradients and log-sum-exps against float64.

SIMPLCLIP_EMULATE_ALL=1 (make prove) runs every width with every number of tokens, more schedules, and all faults.
"""

import os

import emulator
import pytest
import torch
from shaped_attention_emulated import TYPES, Case, by_reference, check, emulate, inputs

if emulator.why_not():
    pytest.skip(emulator.why_not(), allow_module_level=True)

TOKENS = (1, 2, 15, 16, 17, 50, 64, 77, 80)
WIDTHS = (32, 64, 80, 96, 128)
ALL = os.environ.get("SIMPLCLIP_EMULATE_ALL") == "1"
SEEDS = range(10) if ALL else (7,)


@pytest.fixture(scope="module")
def kernels():
    return emulator.build("shaped_attention")


def cases(tokens, width, kind):
    """Yields all tokens, and sequences of several lengths in a batch with two heads; nothing if tokens do not fit."""
    if kind == "tf32" and tokens > 64 and width > 64:
        return
    for causal in (False, True):
        yield Case(kind, tokens, width, causal)
        yield Case(kind, tokens, width, causal, lengths=(tokens // 2, 0, tokens), batch=3, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_values_and_gradients(kernels, tokens, kind):
    for width in WIDTHS if ALL else WIDTHS[TOKENS.index(tokens) % 2 :: 2]:
        for case in cases(tokens, width, kind):
            check(kernels, case, SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("tokens", "width"), [(77, 64), (64, 128), (80, 16)])
def test_other_schedules_give_the_same_bits(kernels, tokens, width, kind):
    schedules = range(20 if ALL else 3)
    check(kernels, Case(kind, tokens, width, causal=True, lengths=(tokens - 3,)), schedules)
    check(kernels, Case(kind, tokens, width), schedules)


def test_every_width(kernels):
    for kind in TYPES:
        for width in range(16, 129, 16):
            check(kernels, Case(kind, 33, width, causal=True), (1,))


def test_a_scale_of_other_size_and_sign(kernels):
    for scale in (-0.5, 0.0, 4.0):
        check(kernels, Case("f16", 77, 32, scale=scale), (1,))


def test_lengths_out_of_range_count_as_none_and_all(kernels):
    inside, outside = Case("bf16", 33, 32, lengths=(0, 33), batch=2), Case("bf16", 33, 32, lengths=(-5, 70), batch=2)
    given = inputs(inside)
    expected = emulate(kernels, inside, given, 1)
    results = emulate(kernels, outside, given | {"lengths": torch.tensor(outside.lengths, dtype=torch.int32)}, 1)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def test_softmax_minus_mean_is_rounded_after_the_subtraction(kernels):
    """At initialisation q is zero: softmax equals the mean, and with equal gains their difference is zero."""
    case = Case("bf16", 77, 64)
    given = inputs(case)
    given["q"].mul_(1e-3)
    given["gains"].copy_(torch.tensor([[0.0], [1.0], [1.0]]))
    truth, results = by_reference(case, given, torch.float64), emulate(kernels, case, given, 1)
    for name in ("out", "dv"):
        largest = truth[name].abs().max()
        assert largest < 0.01
        assert (results[name] - truth[name]).abs().max() < 0.01 * largest, name


@pytest.mark.prove
def test_sanitizers_find_nothing():
    shapes = [(17, 80), (80, 64), (1, 16), (64, 128), (77, 64), (33, 112)]
    done = emulator.sanitized(
        f"""
        import emulator
        from shaped_attention_emulated import Case, check
        without = {{f"if (*type == 'f') launch_shaped_{{name}}<f16>(p, seed);": "" for name in ("forward", "backward")}}
        kernels = emulator.build("shaped_attention", sanitize=True, replace=without)  # compiles faster
        for kind in ("bf16", "tf32"):
            for tokens, width in {shapes}:
                check(kernels, Case(kind, tokens, width, True, (tokens - 1, 0), 2), (1,))
                check(kernels, Case(kind, tokens, width), (1,))
        print("clean")
        """
    )
    assert done.stdout.strip() == "clean", done.stderr[-3000:]


# Text that is removed or replaced in the kernels, and a case that must detect the change.
FAULTS = {
    "no barrier before keys and values are written over": (
        "  sync_block();  // keys and values are not read any more", "", Case("bf16", 77, 64),
    ),
    "no barrier before a slot is filled again": ("if (s + 2 < 2 * slices) sync_block();", "", Case("tf32", 77, 64)),
    "a fragment's halves exchanged": (
        "(lane() & 7) + (lane() >> 4) * 8, chunk + (lane() >> 3 & 1)", "(lane() & 15), chunk + (lane() >> 4)",
        Case("f16", 16, 32),
    ),
    "rows of a tile in the same banks": ("(chunk ^ (row >> shift & mask))", "chunk", Case("bf16", 16, 64)),
    "a transposed fragment's halves exchanged": (
        "column_tile * 2 + (lane() >> 3 & 1)", "column_tile * 2 + (lane() >> 3 & 1 ^ 1)", Case("f16", 16, 32),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS if ALL else list(FAULTS)[::3])
def test_the_emulator_detects_faults_of_kernels(fault):
    old, new, case = FAULTS[fault]
    with pytest.raises((AssertionError, RuntimeError)):
        check(emulator.build("shaped_attention", replace={old: new}), case, range(20))
