"""simplclip doctor --compile: what it compiles is what launches ask for."""

from __future__ import annotations

import os
from functools import partial
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

import triton
from triton import knobs

import ptx
import simplclip
from ptx import capture
from simplclip.kernels.mlp.launch import _parallel_mlp_activate_kernel
from simplclip.kernels.runtime import COMPILE
from simplclip.plan import compile as compiling
from simplclip.plan.compile import CompileError, compile_launches, forms_of
from simplclip.plan.kernels import Launch, Stand
from simplclip.plan.search import Budget, Planner
from simplclip.plan.step import steps_of_terms
from simplclip.train import config
from support.ops.calls import similarity_call
from support.ops.predicted_calls import forward_and_backward, trace
from support.programs import call, one_line


class NoLauncher:
    """In place of Triton's launcher: starts nothing."""

    def __init__(self, *source: object): ...

    def __call__(self, *arguments: object) -> None: ...


class Driver(capture.Driver):
    """Triton's driver of a card for which it compiles machine code that does not run."""

    def __init__(self, card: capture.Card):
        super().__init__(card)
        self.launcher_cls = NoLauncher

    def load_binary(self, *binary: object) -> tuple:
        return object(), None, 0, 0, 1024


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of Triton's, and one process that compiles into it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "cores", lambda: 1)
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_call_finds_its_kernels(cache, monkeypatch):
    """Of other sizes than those that were compiled."""
    pairs = partial(similarity_call, terms=("contrastive",), width=64, ids=True)
    big = pairs(4000, 4000).typed(torch.bfloat16)
    kernels = trace(partial(forward_and_backward, pairs(4000, 4000)), big)
    forms = forms_of(kernel.launch for kernel in kernels if kernel.by == "triton")
    told: list[int] = []
    assert compile_launches(forms, 86, told.append) == (5, 0)
    assert told == [1] * 5
    compiled = {*cache.iterdir()}
    assert len(compiled) == 5

    started = mock.Mock()
    with ptx.card(86) as card, simplclip.backend("triton"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", None)
        monkeypatch.setattr(knobs.compilation, "listener", started)
        triton.runtime.driver.set_active(Driver(card))
        small = pairs(70, 70)
        forward_and_backward(small, small.typed(torch.bfloat16))
    assert [each.kwargs["cache_hit"] for each in started.call_args_list] == [True] * 5
    assert {*cache.iterdir()} == compiled


def activation(size: int = 4096, offset: int = 0, **options: object) -> Launch:
    h = Stand(torch.bfloat16, (size,), (1,), 0, 2 * size, offset)
    constants = {"ACT": "gelu", "BLOCK": 2048, "num_warps": 4, **COMPILE}
    return Launch(_parallel_mlp_activate_kernel, (1,), (h, h, size), constants | options)


def test_launches_of_one_form_are_compiled_once():
    first = activation()
    same = [activation(32), activation(offset=32)]
    assert forms_of([*same, first]) == [first]
    other = [activation(4095), activation(1), activation(1 << 31), activation(offset=2)]
    other += [activation(num_warps=8), activation(ACT="relu")]
    assert forms_of([first, *other]) == [first, *other]


def test_a_kernel_that_does_not_compile_is_named(cache, monkeypatch):
    monkeypatch.setattr(knobs.compilation, "listener", None)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    launch = activation(ACT="no activation")
    kernel = launch.kernel.__module__, launch.kernel.__name__
    with pytest.raises(CompileError, match="_parallel_mlp_activate_kernel: does not compile for"):
        compiling._compile(*kernel, launch.args, launch.options, 86)


def forms_of_run(path, *changes):
    values = config.load(path, changes)
    return forms_of(Planner(values, Budget(24 << 30), card="rtx-3090").launches())


@pytest.mark.slow
def test_each_set_of_terms_and_groups_is_compiled(tiny):
    """A batch of different pairs has no ids, and some terms come later or end."""
    schedules = ["loss.relational_weight={value: 0, to: 1, start: 10}"]
    schedules.append("loss.pm_weight={value: 1, until: 30}")
    steps = steps_of_terms(config.load(tiny, schedules))
    assert steps == {
        ("contrastive", "pair_matching"): 0,
        ("contrastive", "relational", "pair_matching"): 11,
        ("contrastive", "relational"): 30,
    }
    launched = [
        (form.options["ids"] is None, form.options["teacher_image"] is None, form.options["plane"])
        for form in forms_of_run(tiny, *schedules, "data.sidecars=[nowhere]")
        if form.kernel.__name__ == "_similarity_statistics_kernel"
    ]
    distinct = {(ids, teacher, plane is None) for ids, teacher, plane in launched}
    assert distinct == {
        (ids, *rest) for ids in (True, False) for rest in ((True, False), (False, True))
    }


def test_doctor_compiles_for_a_card(tiny, cache, monkeypatch):
    found = mock.Mock(return_value=(7, 2))
    monkeypatch.setattr(compiling, "compile_launches", found)
    result = call("doctor", "--compile", tiny, "--card", "RTX 4090")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"7 kernels of siclip-tiny for sm_89 in {os.fspath(cache)}, 2 of which were there; "
    )
    forms, architecture, _ = found.call_args.args
    assert architecture == 89
    assert len(forms) > 5


def test_doctor_needs_a_card(tiny):
    if not torch.cuda.is_available():
        assert one_line("doctor", "--compile", tiny) == (
            "simplclip: --card: expected a card, since this machine has no GPU, got none"
        )
    assert one_line("doctor", "--compile", tiny, "--json").startswith("simplclip: --compile: ")
    assert one_line("doctor", "--card", "4090").startswith("simplclip: --card: expected --compile")
