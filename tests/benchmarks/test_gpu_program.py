"""benchmarks.gpu on a CPU: selftest, rows that stay, one folder and its zip; and where it stops."""

import json
import os
import sys
import zipfile

import pytest
import torch

from benchmarks import attention_forms, gpu, similarity_forms
from benchmarks.results_file import read_csv
from support.paths import ROOT

pytestmark = pytest.mark.slow
SMI = "#!/bin/sh\necho '580.65, 350.00 W, 120.00 W, 1695 MHz, 9501 MHz, 2100 MHz, 61'\n"
OPTIONS = ["--device=cpu", "--sizes=64", "--width=32", "--dtypes=bfloat16", "--repeats=1"]
OPTIONS += ["--sequences=0.01", f"--models={ROOT / 'examples/emoji/siclip-tiny.yaml'}"]


def script(path, text, monkeypatch):
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def selftest(folder, monkeypatch, code):
    """Replaces `python -m simplclip selftest` by a script that exits with `code`."""
    script(folder / "python", f'#!/bin/sh\necho "ran $3"\nexit {code}\n', monkeypatch)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_gpu_program_on_a_cpu(monkeypatch, tmp_path, capfd):
    """A form that fails is a row with its reason. A second call measures what is left."""

    def fails(b):
        raise RuntimeError("no kernel image is available")

    plain, peer = similarity_forms.forms, similarity_forms.Form("a peer", fails, products=1)
    monkeypatch.setattr(similarity_forms, "forms", lambda *a: [*plain(*a)[:2], peer])
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(attention_forms, "SHAPES", attention_forms.SHAPES[2:3])
    script(tmp_path / "nvidia-smi", SMI, monkeypatch)
    out = tmp_path / "cpu"
    options = [*OPTIONS, "--out", str(out)]
    with monkeypatch.context() as patch:
        selftest(tmp_path, patch, 1)  # something is wrong
        gpu.main([*options, "--ops", "losses"])
    shown = capfd.readouterr().out
    assert shown.index("ran selftest") < shown.index("losses: contrastive")
    assert (out / "selftest.txt").read_text() == "ran selftest\n"
    rows = read_csv(out / "rows.csv")
    notes = {row["note"] for row in rows if row["form"] == "a peer"}
    assert notes == {"RuntimeError: no kernel image is available"}
    ours = next(row for row in rows if row["form"] == "simplclip")
    assert float(ours["p50_ms"]) > 0
    state = {"driver_version": "580.65", "power.limit": "350.00 W", "clocks.sm": "1695 MHz"}
    assert state.items() <= ours.items()

    gpu.main([*options, "--at-once"])
    assert "ran selftest" not in capfd.readouterr().out
    after = read_csv(out / "rows.csv")
    kept = [row["p50_ms"] for row in after if row["op"] == "similarity_loss"]
    assert kept == [row["p50_ms"] for row in rows]
    assert {row["op"] for row in after} == {
        "similarity_loss", "steps", "shaped_attention", "simplified_block", "training", "host",
    }  # fmt: skip
    step = next(row for row in after if row["op"] == "steps")
    assert float(step["mib"]) == pytest.approx(float(step["planned_mib"]), rel=0.1)
    with zipfile.ZipFile(f"{out}.zip") as file:
        names = {name.partition("/")[2] for name in file.namelist()} - {""}
        assert json.loads(file.read("cpu/environment.json"))["doctor"]["ops"]
        assert "no kernel image" in file.read("cpu/summary.txt").decode()
    assert names == {"rows.csv", "selftest.txt", "summary.txt", "environment.json"}


def test_gpu_program_stops_where_nothing_can_be_measured(monkeypatch, tmp_path, capfd):
    gpu.main([*OPTIONS, "--at-once", "--minutes", "0", "--out", str(tmp_path / "late")])
    assert "cases were left for the next call" in capfd.readouterr().out
    with monkeypatch.context() as patch:
        selftest(tmp_path, patch, 3)
        with pytest.raises(SystemExit, match="selftest ended with 3, so nothing is measured"):
            gpu.main(["--device", "cpu", "--minutes", "0", "--out", str(tmp_path / "cpu")])
    assert not (tmp_path / "cpu" / "rows.csv").exists()
    with pytest.raises(SystemExit, match="--ops: expected some of steps, losses, .*, got loss"):
        gpu.main(["--device", "cpu", "--ops", "loss"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        gpu.main(["--out", str(tmp_path / "cuda")])
    assert not (tmp_path / "cuda").exists()
