"""The origin of figures, as result files state it: hardware, versions, commit and date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import simplclip

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Returns the commit of this checkout, with "+" where the tree differs from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def cpu_name() -> str:
    """Returns the processor's name from /proc/cpuinfo with its family and model, since the name alone may say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{info.get('model name', platform.machine())} (family {info.get('cpu family')}, model {info.get('model')})"


def describe(device: str = "cpu") -> dict[str, str]:
    """Returns the columns that every row of a result file carries."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        isa = simplclip.report()["extension"]["cpu"].get("instruction_set", "no extension")
        threads = torch.get_num_threads()
        hardware = f"{cpu_name()}, {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores, {isa}"
    return {
        "hardware": hardware,
        "torch": torch.__version__,
        "simplclip": simplclip.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


STATE = ("driver_version", "power.limit", "power.draw", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu")


def gpu_state() -> dict[str, str]:
    """Returns driver, power, clocks and temperature as nvidia-smi reports them; nothing where nvidia-smi does not run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(STATE, (value.strip() for value in lines[0].split(","))))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
