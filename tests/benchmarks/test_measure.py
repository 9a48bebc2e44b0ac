"""How benchmarks measure: forms that fail are rows with a reason, and earlier rows stay."""

import pytest
import torch

from benchmarks import similarity_forms
from benchmarks.measure import compare
from benchmarks.results_file import read_csv, write_csv


def failing(when):
    runs = iter(range(99))

    def run():
        if next(runs) >= when:
            raise RuntimeError("an illegal memory access was encountered\nand a second line")
        return 1.0

    return run


def does_not_fit():
    raise torch.OutOfMemoryError("CUDA out of memory")


def wrong(name, value, ours):
    return "" if value == ours else f"{name}: expected {ours}, got {value}"


def test_forms_that_fail_are_rows_with_their_reason():
    cases = {"simplclip": lambda: 1.0, "large": does_not_fit, "other": lambda: 2.0}
    cases |= {"late": failing(1), "early": failing(0)}
    rows = {row["form"]: row for row in compare({"op": "a"}, cases, 3, wrong=wrong, strict=False)}
    error = "RuntimeError: an illegal memory access was encountered"
    notes = {"large": "out of memory", "other": "other: expected 1.0, got 2.0"}
    notes |= {"late": error, "early": error}
    assert {form: row["note"] for form, row in rows.items()} == {"simplclip": "", **notes}
    assert [form for form, row in rows.items() if "p50_ms" in row] == ["simplclip"]
    assert (rows["simplclip"]["times_ours"], rows["simplclip"]["repeats"]) == (1.0, 3)


@pytest.mark.parametrize(
    ("form", "error"),
    [(failing(0), RuntimeError), (failing(1), RuntimeError), (lambda: 2.0, AssertionError)],
)
def test_a_strict_comparison_raises(form, error):
    with pytest.raises(error):
        compare({}, {"simplclip": lambda: 1.0, "other": form}, 3, wrong=wrong)
    compare({}, {"simplclip": lambda: 1.0, "large": does_not_fit}, 3)


def test_forms_take_turns():
    turns = []
    cases = {name: lambda name=name: turns.append(name) for name in "ab"}
    compare({}, cases, 2, base="a", warmup=1)
    assert turns == [*"ab"] * 4  # the first runs, a round to warm up, two repeats


def test_rows_that_were_measured_earlier_stay(tmp_path):
    path = tmp_path / "a.csv"
    write_csv(path, [{"form": "a", "ms": 1}, {"form": "b", "ms": 2}], key=("form",))
    write_csv(path, [{"form": "b", "ms": 3, "note": "new"}], key=("form",))
    assert read_csv(path) == [
        {"form": "a", "ms": "1", "note": ""},
        {"form": "b", "ms": "3", "note": "new"},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("objective", similarity_forms.OBJECTIVES)
def test_products_of_dense_forms(objective):
    """The numbers of products that the forms state are those that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode

    n, d = 64, 512
    batch = similarity_forms.batch(n, d, torch.float32)
    for form in similarity_forms.forms(objective, "float32"):
        if form.dense and not form.name.startswith("torch.compile"):
            with FlopCounterMode(display=False) as counter:
                batch.step(form.run)
            assert counter.get_total_flops() == form.products * 2 * n * n * d, form.name
