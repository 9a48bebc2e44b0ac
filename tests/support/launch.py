"""Starts a script of this folder on several ranks by torchrun."""

import os
import subprocess
import sys

from paths import PYTHONPATH, SUPPORT

ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(script, *arguments, ranks=2, options=(), check=False, timeout=600) -> subprocess.CompletedProcess:
    """Runs a script by torchrun. check: fail the test with the end of the output if a rank failed."""
    command = [*TORCHRUN, f"--nproc-per-node={ranks}", *options, str(SUPPORT / script), *map(str, arguments)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert not (check and run.returncode), run.stderr[-5000:]
    return run
