"""Paths of the repository, and where other processes find the package and these helpers."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
PYTHONPATH = os.pathsep.join(str(ROOT / path) for path in (".", "tests"))
