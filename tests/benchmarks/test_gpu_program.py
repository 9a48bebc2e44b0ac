"""benchmarks.gpu on a CPU, with peers that fail: each peer becomes a row with its reason, and measured rows stay."""

import csv
import json
import os
import sys
import zipfile

import pytest
import torch
from paths import ROOT

from benchmarks import attention_forms, similarity_forms, tables, training_forms
from benchmarks.bound import calls, native
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bundle, models, ops
from simplclip.ops import similarity_loss

pytestmark = pytest.mark.slow
SMI = "#!/bin/sh\necho '580.65, 350.00 W, 120.00 W, 1695 MHz, 9501 MHz, 2100 MHz, 61'\n"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def peers(monkeypatch, tmp_path):
    """Makes peers that fail in each way, compiles none, and makes an nvidia-smi."""

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
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def few_cases(monkeypatch):
    """Leaves one objective, one kernel of Triton to compile, and one of CUDA C++, without nvcc."""
    monkeypatch.setattr(training_forms, "OBJECTIVES", training_forms.OBJECTIVES[:1])
    monkeypatch.setattr(calls, "LOSSES", {"sigmoid": ("sigmoid",)})
    monkeypatch.setattr(calls, "LENGTHS", (50,))
    monkeypatch.setattr(calls, "TOWERS", {})
    monkeypatch.setattr(native.shutil, "which", lambda name: None)


OPTIONS = ["--device=cpu", "--sizes=64", "--width=32", "--dtypes=bfloat16", "--sequences=0.01", "--repeats=1"]
OPTIONS += [f"--models={ROOT / 'examples/emoji/siclip-tiny.yaml'}"]


def commands(folder, monkeypatch, code):
    """Replaces `python -m simplclip` by a script that prints its command; its selftest exits with `code`."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\necho "ran $3"\n[ "$3" != selftest ] || exit {code}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.slow
def test_a_dry_run(peers, monkeypatch, tmp_path, capfd):
    out = tmp_path / "cpu"
    rows_file, options = out / "rows.csv", [*OPTIONS, "--out", str(out)]
    with monkeypatch.context() as patch:
        commands(tmp_path, patch, 1)  # something is wrong
        gpu.main([*options, "--ops", "losses"])
    shown = capfd.readouterr().out
    assert shown.index("ran selftest") < shown.index("losses: contrastive")
    assert (out / "selftest.txt").read_text() == "ran selftest\n"
    rows = rows_of(rows_file)
    notes = {row["form"]: row["note"] for row in rows if row["objective"] == "contrastive"}
    assert notes["simplclip"] == ""
    assert notes["overflows"].startswith("overflows: expected the value of simplclip")
    assert notes["does_not_compile"] == "RuntimeError: no kernel image is available"
    assert notes["does_not_fit"] == "out of memory"
    assert notes["fails_later"] == "RuntimeError: an illegal memory access was encountered"
    ours = next(row for row in rows if row["form"] == "simplclip")
    assert float(ours["host_ms"]) <= float(ours["p50_ms"])
    assert float(ours["device_ms"]) > 0
    assert (ours["driver_version"], ours["power.limit"], ours["clocks.sm"]) == ("580.65", "350.00 W", "1695 MHz")

    gpu.main([*options, "--at-once", "--minutes", "0"])
    shown = capfd.readouterr().out
    assert "cases were left for the next call" in shown
    assert "ran selftest" not in shown
    assert rows_of(rows_file) == rows

    failing = ops.Case("training", "a case", lambda: 1 / 0)
    monkeypatch.setitem(gpu.OPS, "failing", lambda o: iter([failing]))
    gpu.main([*options, "--at-once", "--ops", "losses,kernels,block,attention,failing"])
    shown = capfd.readouterr().out
    assert "\n\nlosses: contrastive" not in shown  # the file has it already
    assert "not predicted, RuntimeError: bf16.cu: expected nvcc" in shown
    assert "ZeroDivisionError: division by zero" in (out / "summary.txt").read_text()
    after = rows_of(rows_file)
    assert [row["case"] for row in after[: len(rows)]] == [row["case"] for row in rows]
    assert {row["op"] for row in after} >= {"kernels", "simplified_block", "shaped_attention"}
    assert {row["note"] for row in after if row["case"] == "training: a case"} == {"ZeroDivisionError: division by zero"}
    assert not {row["case"]: row["note"] for row in after[len(rows) : -1] if not row["form"]}
    gpu.main([*options, "--at-once", "--ops", "failing,training", "--dtypes", "float32"])
    assert "training: a case" in capfd.readouterr().out  # a case that failed is tried again
    after = rows_of(rows_file)
    assert sum(row["case"] == "training: a case" for row in after) == 1
    assert len([row for row in after if row["op"] == "training" and float(row["p50_ms"] or 0) > 0]) == 3
    assert any(row["form"] == ops.WHOLE and float(row["ms"]) > 0 for row in after if row["op"] == "kernels")


@pytest.mark.prove
def test_whole_models(monkeypatch, tmp_path, capfd):
    """Measures steps, batches and the loader of a small model, after a selftest."""
    out = tmp_path / "cpu"
    gpu.main([*OPTIONS, "--out", str(out), "--ops", "steps,batches,loader"])
    assert "all are right" in (out / "selftest.txt").read_text()
    rows = {(row["op"], row["form"]): row for row in rows_of(out / "rows.csv")}
    step, most = rows["steps", "siclip-tiny"], rows["batches", "siclip-tiny"]
    assert float(step["mib"]) == pytest.approx(float(step["predicted_mib"]), rel=0.1)
    assert int(most["pairs"]) == pytest.approx(int(most["predicted_pairs"]), rel=0.2)
    assert float(rows["loader", "the loader alone"]["samples_per_s"]) > 0
    assert 0 <= float(rows["loader", "trained from it"]["data_share"]) <= 1
    written = tables.of_bundle(out / "rows.csv")
    assert any(line.startswith("| batches: siclip-tiny") and f"| {most['predicted_pairs']} |" in line for line in written)
    with zipfile.ZipFile(f"{out}.zip") as file:
        names = {name.partition("/")[2] for name in file.namelist()} - {""}
        assert json.loads(file.read("cpu/environment.json"))["doctor"]["ops"]
    told = {"selftest.json", "selftest.txt", "environment.json", "summary.txt"}
    assert names == {"rows.csv", "predictions.csv", "predictions.png", *told}


def test_predictions_that_are_off_are_named(tmp_path):
    def row(form, **figures):
        return {"case": "a case", "form": form, **figures}

    rows = [
        row("right", ms="1.2", predicted_ms="1.0"),
        row("slow", ms="1.4", predicted_ms=1.0),
        row("none", ms=1, note="no"),
        row("fast", ms=0.6, predicted_ms="1", mib=5, predicted_mib=5),
        row("far", pairs=10, predicted_pairs=40),
    ]
    assert [(found["form"], found["what"], found["off"]) for found in bundle.compared(rows)] == [
        ("far", "pairs", "-75%"), ("fast", "ms", "-40%"), ("slow", "ms", "+40%"), ("right", "ms", ""), ("fast", "mib", ""),
    ]  # fmt: skip
    (tmp_path / "cpu").mkdir()
    lines = bundle.write_bundle(tmp_path / "cpu", "cpu", rows, 3)
    assert "Measured against predicted: 3 of 5 are off by more than a third." in lines
    assert any("far" in line for line in lines)
    assert not any("right" in line for line in lines)


@pytest.mark.parametrize("most", [1, 7, 100, 240, 256, 300, 380, 5000])
def test_the_largest_batch_is_found_in_few_tries(most):
    tried = []
    found = models.bisected(256, lambda n: tried.append(n) or n <= most)
    assert found <= most
    assert len(tried) <= 7
    if 200 <= most <= 400:
        assert found >= most - 16  # the search is exact up to a sixteenth of its start


def test_it_stops_where_nothing_can_be_measured(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        commands(tmp_path, patch, 3)
        with pytest.raises(SystemExit, match="selftest ended with 3, so nothing is measured"):
            gpu.main(["--device", "cpu", "--minutes", "0", "--out", str(tmp_path / "cpu")])
    assert not (tmp_path / "cpu" / "rows.csv").exists()
    with pytest.raises(SystemExit, match="--ops: expected some of steps, losses, .*, got loss"):
        gpu.main(["--device", "cpu", "--ops", "loss"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.main(["--out", str(tmp_path / "cuda")])
    assert not (tmp_path / "cuda").exists()


def test_all_of_a_dtype_comes_before_the_next():
    options = gpu.arguments(["--device", "cpu", "--sizes", "64", "--dtypes", "bfloat16,float32", "--ops", "steps,block"])
    found = [(case.op, str(case).split(" ")[-1] if case.op == "steps" else "") for case in gpu.cases(options)]
    assert found == [("steps", "bfloat16")] * 2 + [("block", "")] * 2 + [("steps", "float32")] * 2 + [("block", "")] * 2
