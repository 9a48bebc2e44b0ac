"""Result files: tables of measurements with their hardware, versions, commit and date."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import simplclip
from simplclip.common.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STATE = "driver_version power.limit power.draw clocks.sm clocks.mem clocks.max.sm temperature.gpu"


def result_path(op: str, where: dict[str, str], suffix: str = ".csv") -> Path:
    """Returns the path of a result file. where: the columns of `describe`."""
    return RESULTS / f"{op}-{slug(where['hardware'].split(',')[0])}-{where['date']}{suffix}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of an aligned table, with the columns for which some row has a value."""
    cells: dict[str, list[str]] = {}  # by column
    for column in dict.fromkeys(column for row in rows for column in row):
        values = [str(row.get(column, "")) for row in rows]
        if column != "repeats" and any(values):
            width = max(map(len, [column, *values]))
            cells[column] = [text.rjust(width) for text in [column, *values]]
    return ["  ".join(line) for line in zip(*cells.values())]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict], key: tuple[str, ...] = ()) -> None:
    """Writes the rows atomically.

    With `key`, rows of an earlier file stay unless they were measured anew. Such a file has rows of
    several commits; every row names its own.
    """
    path.parent.mkdir(exist_ok=True, parents=True)
    if key and path.exists():
        name = lambda row: tuple(str(row.get(column, "")) for column in key)  # noqa: E731
        measured = {name(row) for row in rows}
        rows = [row for row in read_csv(path) if name(row) not in measured] + rows
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def commit() -> str:
    """Returns the commit of this checkout, with "+" where the tree differs from it; "unknown"
    without git.
    """
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changes else name


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu_name() -> str:
    """Returns the processor's name from /proc/cpuinfo with its family and model, since the name
    alone may say little.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {}
    for line in lines:
        key, _, value = line.partition(":")
        info[key.strip()] = value.strip()
    name = info.get("model name", platform.machine())
    return f"{name} (family {info.get('cpu family')}, model {info.get('model')})"


def versions() -> dict[str, str]:
    """Returns the columns of a result that does not depend on this machine."""
    today = datetime.date.today().isoformat()
    library = {"torch": torch.__version__, "simplclip": simplclip.__version__}
    return library | {"commit": commit(), "date": today}


def describe(device: str = "cpu") -> dict[str, str]:
    """Returns the columns that every row of a measurement carries."""
    if device == "cuda":
        return {"hardware": torch.cuda.get_device_name()} | versions()
    isa = simplclip.report()["extension"]["cpu"].get("instruction_set", "no extension")
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    hardware = f"{cpu_name()}, {threads} of {os.cpu_count()} cores, {isa}"
    return {"hardware": hardware} | versions()


def gpu_state() -> dict[str, str]:
    """Returns driver, power, clocks and temperature as nvidia-smi reports them; nothing where
    nvidia-smi does not run.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE.split())}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = run.stdout.splitlines()[0]
    return dict(zip(STATE.split(), (value.strip() for value in first.split(","))))
