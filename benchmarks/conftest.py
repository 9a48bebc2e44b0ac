"""The device of a session, and what its JSON says of the machine beside pytest-benchmark's own."""

import os
import subprocess

import pytest
import torch

import simplclip

QUERY = "driver_version,power.limit,clocks.sm,clocks.mem,temperature.gpu"


def pytest_addoption(parser):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption("--device", choices=("cuda", "cpu"), default=default)
    parser.addoption("--op", help="the benchmarks of this op alone")


@pytest.fixture
def device(request):
    return request.config.getoption("--device")


def pytest_benchmark_update_machine_info(config, machine_info):
    extension = simplclip.report()["extension"]["cpu"]
    machine_info |= {
        "torch": torch.__version__,
        "simplclip": simplclip.__version__,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "instruction_set": extension.get("instruction_set", "no extension"),
    }
    if config.getoption("--device") == "cuda":
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv"]
        state = subprocess.run(command, capture_output=True, text=True, check=False)
        machine_info |= {"gpu": torch.cuda.get_device_name(), "gpu_state": state.stdout}
