"""Loads and stores of Triton kernels lie within tensors, also with more than 2^31 elements (tests/support/addresses.py)."""

import itertools
import re

import interpreter
import pytest
from interpreter import needs_interpreter
from paths import ROOT

SUITE = ["many", "mlp", "attention"]  # cases that one process audits in the suite, in bfloat16; "mlp" with --prove alone
OTHERS = [
    "contrastive+pair_matching",
    "sigmoid",
    "all",
    "many sigmoid",
    "contrastive",
    "attention causal",
]
# Cases of make prove, with dtypes and cards in turn.
TURNS = ("float32", "rtx-3090"), ("float16", "rtx-5090"), ("bfloat16", "h100")
PROVED = [f"{name}:{dtype}:{card}" for name, (dtype, card) in zip([*OTHERS, *SUITE], itertools.cycle(TURNS))]


def audited(*cases: str) -> dict[str, str]:
    done = interpreter.run(str(ROOT / "tests/support/addresses.py"), *cases)
    assert done.returncode == 0, done.stderr[-8000:]
    return dict(re.findall(r"^(\S.*): (\d+ programs, \d+ addresses(?:\n    .*)*)$", done.stdout, re.M))


@pytest.mark.slow
@needs_interpreter
def test_addresses_at_large_sizes(request):
    names = SUITE if request.config.getoption("--prove") else [name for name in SUITE if name != "mlp"]
    cases = [f"{name}:bfloat16:rtx-3090" for name in names]
    reports = audited(*cases)
    assert list(reports) == cases
    for case, text in reports.items():
        programs, addresses = map(int, re.findall(r"\d+", text)[:2])
        assert programs >= 4, case
        assert addresses > 1 << 15, case
        assert "\n" not in text, f"{case}: {text}"


@pytest.mark.prove
@needs_interpreter
@pytest.mark.parametrize("case", PROVED)
def test_more_addresses(case):
    assert "\n" not in audited(case)[case]
