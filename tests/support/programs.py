"""Runs commands of simplclip, scripts of examples/ and blocks of docs/; kills processes."""

import contextlib
import functools
import importlib.util
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from typer.testing import CliRunner, Result

from simplclip.commands.main import app
from simplclip.common import files
from support.data.pairs import digests
from support.paths import ROOT

EXAMPLES = ROOT / "examples"


def call(*arguments: object) -> Result:
    """Runs a command of simplclip in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process; returns what it printed and its status."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def one_line(*arguments: object) -> str:
    """Runs a command that must end in an error, and returns the one line that it prints."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.strip()]
    return line


def load_example(name: str) -> ModuleType:
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
    """Runs the Python blocks of a section of docs/ as one program, and returns its names."""
    text = (ROOT / "docs" / page).read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    program = "\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    names: dict = {"__name__": heading}
    exec(compile(program, f"{page}: {heading}", "exec"), names)
    return names


def forked(action: Callable[[], object]) -> int:
    """Runs `action()` in a process of its own. Returns its exit code, 1 after an exception."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run_line(line: str) -> str:
    """Runs a line of a page in a fork of this process, which has the modules; returns its output.

    It is a command of simplclip, or a script of examples/.
    """
    program, *words = shlex.split(line)
    assert program in ("simplclip", "python"), line

    def run() -> None:
        redirect = contextlib.redirect_stdout, contextlib.redirect_stderr
        with open("printed", "w") as file, redirect[0](file), redirect[1](file):
            try:
                if program == "python":
                    load_example(Path(words[0]).stem).main(words[1:])
                else:
                    assert not app(words, standalone_mode=False)
            except BaseException:
                traceback.print_exc()
                raise

    code = forked(run)
    printed = Path("printed").read_text()
    assert code == 0, f"{line}: {printed[-3000:]}"
    return printed


def killed_at_any_point(
    folder: Path,
    work: Callable[[Path, Callable[[], None]], object],
    least: int,
    check: Callable[[Path], object] = lambda out: None,
) -> None:
    """Kills `work(out, step)` (-9) at every 16th point, with --prove at each, and repeats the work.

    A point is a call of `step` or a line that writes a file. After a kill no shard is torn and
    `check(out)` holds; the repeated work ends as undisturbed work. least: number of points.
    """
    writing = [f.__code__ for f in (files.write_atomically, files.replacing.__wrapped__)]

    def go(out: Path, point: int = -1) -> None:
        count = itertools.count()

        def step() -> None:
            if next(count) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code not in writing:
                return None
            if event == "line":
                step()
            return trace

        if point >= 0:
            sys.settrace(trace)
        work(out, step)

    go(folder / "whole")
    whole = digests(folder / "whole")
    stride = int(os.environ.get("SIMPLCLIP_TEST_STRIDE", "16"))
    for point in itertools.count(step=stride):
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
