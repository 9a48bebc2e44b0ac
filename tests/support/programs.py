"""Runs programs: simplclip's commands, the scripts of examples/, the blocks of docs/, and processes
that are killed.
"""

import contextlib
import functools
import importlib.util
import itertools
import multiprocessing
import os
import re
import signal
import sys

import torch
from typer.testing import CliRunner

from simplclip.commands.main import app
from simplclip.common import files
from support.data.pairs import digests
from support.paths import ROOT

EXAMPLES = ROOT / "examples"


def one_line(*arguments):
    """Runs a command that must end in an error, and returns the one line that it prints."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    return line


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def load_example(name):
    """Returns the module of examples/NAME.py, e.g. emoji/build; a second call returns the same
    module.
    """
    path = EXAMPLES / f"{name}.py"
    if path.parent != EXAMPLES and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where it finds the files beside it, as a script does
    module = f"example_{name.replace('/', '_')}"
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def run_doc_blocks(page: str, heading: str) -> dict:
    """Runs the blocks as one program, and returns the names that it defines."""
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    names: dict = {"__name__": heading}
    exec(
        compile(
            "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)),
            f"{page}: {heading}",
            "exec",
        ),
        names,
    )
    return names


def start_process(preload, target, *args):
    """Runs `target(*args, ready)` in a process of its own, which has `preload` imported; returns
    when `ready` is set.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    ready = context.Event()
    process = context.Process(target=target, args=(*args, ready))
    process.start()
    assert ready.wait(120)
    return process


def forked(action):
    """Runs `action()` in a process of its own. Returns its exit code, 1 after an exception."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_any_point(folder, work, least, check=lambda out: None):
    """Kills `work(out, step)` (-9) at every 16th point, with --prove at each, and repeats the work.

    A point is a call of `step` or a line that writes a file.

    After a kill no shard is torn and `check(out)` holds; the repeated work ends as undisturbed
    work. least: number of points.
    """
    writing = [f.__code__ for f in (files.write_atomically, files.replacing.__wrapped__)]

    def go(out, point=-1):
        count = itertools.count()
        step = lambda: os.kill(os.getpid(), signal.SIGKILL) if next(count) == point else None  # noqa: E731

        def trace(frame, event, _):
            if frame.f_code in writing:
                step() if event == "line" else None
                return trace

        if point >= 0:
            sys.settrace(trace)
        work(out, step)

    go(folder / "whole")
    whole = digests(folder / "whole")
    for point in itertools.count(step=int(os.environ.get("SIMPLCLIP_TEST_STRIDE", "16"))):
        out = folder / f"killed-{point}"
        code = forked(functools.partial(go, out, point))
        assert code in (0, -signal.SIGKILL)
        assert digests(out, "*.tar").items() <= whole.items()
        check(out)
        go(out)
        assert digests(out) == whole
        if code == 0:
            break
    assert point > least
