"""Runs a script of this folder, or another one, on several ranks."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from support.paths import PYTHONPATH

ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
RANKS = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(
    script: str | Path,
    *arguments: object,
    ranks: int = 2,
    options: Sequence[str] = (),
    check: bool = False,
    timeout: float = 600,
) -> subprocess.CompletedProcess:
    """Runs a script by torchrun. check: a rank that fails fails the test."""
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", *options]
    command += [str(RANKS / script), *map(str, arguments)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert not (check and run.returncode), run.stderr[-5000:]
    return run


def forked_ranks(
    script: str | Path,
    *arguments: object,
    ranks: int = 2,
    check: bool = False,
    timeout: float = 600,
) -> subprocess.CompletedProcess:
    """Runs a script as `torchrun`, but on a CPU each rank is a fork, which has torch."""
    if torch.cuda.is_available():
        return torchrun(script, *arguments, ranks=ranks, check=check, timeout=timeout)
    command = [str(RANKS / script), *map(str, arguments)]
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                _run(command, environment, out.fileno(), err.fileno())
            children.append(child)
        code = _wait(children, timeout)
        out.seek(0)
        err.seek(0)
        run = subprocess.CompletedProcess(command, code, out.read(), err.read())
    assert not (check and run.returncode), run.stderr[-5000:]
    return run


def _run(command: list[str], environment: dict[str, str], out: int, err: int) -> NoReturn:
    """Runs a script in a fork, which ends here."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        sys.argv = command
        torch.set_num_threads(1)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(children: list[int], timeout: float) -> int:
    """Returns 0 if all processes end well; an error, or the end of the time, ends the others."""
    codes, deadline = {}, time.monotonic() + timeout
    while len(codes) < len(children):
        running = [child for child in children if child not in codes]
        if any(codes.values()) or time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
        for child in running:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return next((code for code in codes.values() if code), 0)
