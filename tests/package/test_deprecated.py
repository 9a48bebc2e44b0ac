"""Import paths of version 0.1 give the modules of the new paths, with a warning."""

import importlib
import subprocess
import sys

import pytest
from paths import ROOT

from simplclip import deprecated


@pytest.mark.parametrize(("old", "new"), deprecated.MOVED.items())
def test_the_old_path_is_the_new_module(old, new):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(new)


def test_python_m():
    command = [sys.executable, "-W", "always", "-m", "simplclip.openclip_train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "simplclip.openclip_train is now simplclip.integrations.open_clip_train" in done.stderr
    assert "--pm-weight" in done.stdout
