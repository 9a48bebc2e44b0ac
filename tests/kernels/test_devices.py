"""Kernels start on the device of the call's tensors, whichever is the current one.

No GPU is needed: what the launchers make current is recorded, and the host code of CUDA C++ is
read. test_gpu_attention.py runs it.
"""

import re

import pytest
from torch import Tensor

from support.kernels.calls import QUICK, QUICK_IN_BF16
from support.paths import ROOT

pytest.importorskip("triton", reason="the package triton is not installed")

import ptx
from simplclip.kernels import runtime
from support.kernels.calls import case_of, kernels_alone
from support.kernels.launched import launches_of, recorded


def test_launchers_make_the_tensors_device_the_current_one():
    launches = [each for name in QUICK for each in launches_of(name, "fp16", 86)]
    assert launches
    for each in launches:
        assert isinstance(each.current, Tensor), each.kernel.__name__


def test_launchers_ask_the_tensors_device_for_its_properties():
    """The index of a CPU tensor's device is None."""
    name = next(iter(QUICK_IN_BF16))
    with kernels_alone(name), ptx.card(86), recorded():
        case_of(name, "bf16").run()
        assert {of_call.args for of_call in runtime._card.call_args_list} == {(None,)}


def test_the_host_code_of_cuda_begins_with_a_guard():
    """Each function that launches kernels makes q's device current first, and takes its stream."""
    text = (ROOT / "csrc/cuda/attention/attention.cpp").read_text()
    functions = re.split(r"^(?=\S.*\{$)", text, flags=re.MULTILINE)
    launching = [each for each in functions if "launch_shaped_" in each]
    assert len(launching) == 2
    for each in launching:
        before, guard, after = each.partition("  const DeviceGuard guard(")
        assert guard, before
        assert "allocate(" not in before
        assert re.match(r"(call\.)?q\.get_device_index\(\)\);", after), after
        assert re.search(r"stream_of\((call\.)?q\)", after), after
