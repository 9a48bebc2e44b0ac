"""benchmarks.gpu on a CPU, with peers that fail: every one becomes a row with its reason, and what was measured stays."""

import csv
import os

import pytest
import torch

from benchmarks import attention_forms, gpu, similarity_forms, training_forms
from benchmarks.bound import calls, native
from simplclip.ops import similarity_loss

pytestmark = pytest.mark.slow
GREEN = "tests/benchmarks/test_effects_file.py"
SMI = "#!/bin/sh\necho '580.65, 350.00 W, 120.00 W, 1695 MHz, 9501 MHz, 2100 MHz, 61'\n"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """Peers that fail in each way, none that is compiled, and an nvidia-smi."""

    def overflows(b):
        return (b.image * b.scale).sum() * 1e9

    def does_not_compile(b):
        raise RuntimeError("no kernel image is available\nand a second line")

    def does_not_fit(b):
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = iter(range(99))

    def fails_later(b):
        if next(runs):
            raise RuntimeError("an illegal memory access was encountered")
        return similarity_loss(b.image, b.text, b.scale)["contrastive"]

    plain = similarity_forms.forms
    failing = (overflows, does_not_compile, does_not_fit, fails_later)
    monkeypatch.setattr(
        similarity_forms, "forms",
        lambda objective, *a: plain(objective, *a)[:2]
        + [similarity_forms.Form(run.__name__, run, counted=1) for run in failing if objective == "contrastive"],
    )  # fmt: skip
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(attention_forms, "SHAPES", attention_forms.SHAPES[2:3])
    few_cases(monkeypatch)
    monkeypatch.setattr(gpu, "CORRECTNESS", {"cpu": [GREEN, "-k", "valid"]})
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def few_cases(monkeypatch):
    """One objective, one kernel of Triton to compile, and one of CUDA C++, without nvcc."""
    monkeypatch.setattr(training_forms, "OBJECTIVES", training_forms.OBJECTIVES[:1])
    monkeypatch.setattr(calls, "LOSSES", {"sigmoid": ("sigmoid",)})
    monkeypatch.setattr(calls, "LENGTHS", (50,))
    monkeypatch.setattr(calls, "TOWERS", {})
    monkeypatch.setattr(native.shutil, "which", lambda name: None)


def test_a_dry_run(peers, tmp_path, capfd):
    out = tmp_path / "cpu.csv"
    options = [
        "--device",
        "cpu",
        "--sizes",
        "64",
        "--width",
        "32",
        "--dtypes",
        "bfloat16",
        "--sequences",
        "0.01",
        "--repeats",
        "1",
    ]
    options += ["--out", str(out)]
    gpu.main([*options, "--ops", "losses"])
    shown = capfd.readouterr().out
    assert "1 passed" in shown  # the tests print as they go
    rows = rows_of(out)
    notes = {row["form"]: row["note"] for row in rows if row["objective"] == "contrastive" and row["op"] == "similarity_loss"}
    assert notes["simplclip"] == ""
    assert notes["overflows"].startswith("overflows: expected the value of simplclip")
    assert notes["does_not_compile"] == "RuntimeError: no kernel image is available"
    assert notes["does_not_fit"] == "out of memory"
    assert notes["fails_later"] == "RuntimeError: an illegal memory access was encountered"
    ours = next(row for row in rows if row["form"] == "simplclip")
    assert float(ours["host_ms"]) <= float(ours["p50_ms"])
    assert float(ours["device_ms"]) > 0
    assert (ours["driver_version"], ours["power.limit"], ours["clocks.sm"]) == ("580.65", "350.00 W", "1695 MHz")
    assert [row["form"] for row in rows if row["op"] == "scratch_bytes"] == ["64 MiB", "256 MiB", "1024 MiB"]

    gpu.main([*options, "--no-tests", "--minutes", "0"])
    shown = capfd.readouterr().out
    assert "cases left for the next call" in shown
    assert "correctness" not in shown
    assert rows_of(out) == rows

    failing = gpu.Case("training", "a case", lambda: 1 / 0)
    gpu.OPS["failing"] = lambda o: iter([failing])
    try:
        gpu.main([*options, "--no-tests", "--ops", "losses,kernels,block,attention,failing"])
        shown = capfd.readouterr().out
        assert "losses: contrastive" not in shown  # in the file
        assert "not predicted, RuntimeError: bf16.cu: expected nvcc" in shown
        after = rows_of(out)
        assert [row["case"] for row in after[: len(rows)]] == [row["case"] for row in rows]
        assert {row["op"] for row in after} >= {"kernels", "simplified_block", "shaped_attention"}
        assert {row["note"] for row in after if row["case"] == "training: a case"} == {"ZeroDivisionError: division by zero"}
        assert not {row["case"]: row["note"] for row in after[len(rows) : -1] if not row["form"]}
        gpu.main([*options, "--no-tests", "--ops", "failing,training", "--dtypes", "float32"])
        assert "training: a case" in capfd.readouterr().out  # a case that failed is tried again
    finally:
        del gpu.OPS["failing"]
    assert sum(row["case"] == "training: a case" for row in rows_of(out)) == 1
    assert len([row for row in rows_of(out) if row["op"] == "training" and float(row["p50_ms"] or 0) > 0]) == 3


def test_a_red_test_stops_it(monkeypatch, tmp_path):
    few_cases(monkeypatch)
    monkeypatch.setattr(gpu, "CORRECTNESS", {"cpu": [GREEN, "-k", "no_such_test"]})
    with pytest.raises(SystemExit, match="nothing is timed"):
        gpu.main(["--device", "cpu", "--out", str(tmp_path / "cpu.csv")])
    with pytest.raises(SystemExit, match="--ops: expected some of losses, kernels, .*, got loss"):
        gpu.main(["--device", "cpu", "--ops", "loss"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.main(["--out", str(tmp_path / "cpu.csv")])
    assert not list(tmp_path.iterdir())
