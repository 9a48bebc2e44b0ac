"""Paths for tests that start other processes."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
# Where a process finds the package, these helpers, and the tests of ops and kernels.
PYTHONPATH = os.pathsep.join(
    str(ROOT / path) for path in (".", "tests", "tests/support", "tests/ops")
)
