"""The command `simplclip` with kernels that are wrong on purpose, and less to do in selftest (SPOIL="HOW OP ...").

Selftest's own processes import this file again, and so have the same kernels.
"""

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from paths import ROOT

from simplclip import selftest
from simplclip.commands.main import EXTRAS, main
from simplclip.ops import backends
from simplclip.selftest.calls import DRAW, LARGE


def replace(op: str, backend: str, wrong) -> None:
    """Replaces a backend's function by wrong(function, call)."""
    row = backends.TABLE[op]
    function = row[backend].function
    row[backend] = backends.Implementation(lambda call: wrong(function, call), row[backend].why_not)


def without_extras() -> None:
    """Leaves kernels right, but hides the packages of the extra train, except those that torch and typer may import."""
    modules = {*EXTRAS["train"].split()} - {"numpy", "pydantic"}

    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in modules:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Block())


def flipped_sign() -> None:
    """Flips the sign of the gradient of the second weight, in float32."""
    turn = lambda d: -d if d.dtype == torch.float32 else d  # noqa: E731
    replace("parallel_mlp_bwd", "cpu", lambda function, call: turn(function(call)))


def one_fault_a_dtype() -> None:
    """In float32, gives other bits in every 20th run; in bfloat16, writes beside a tensor; in float16, crashes."""
    runs = iter(range(10**9))

    def wrong(function, call):
        if call.student.dtype == torch.float32:
            return function(call) * (1 + 1e-6 * (next(runs) % 20 == 19))
        if call.student.dtype == torch.float16:
            os.kill(os.getpid(), signal.SIGSEGV)
        call.student.as_strided((1,), (1,), call.student.storage_offset() + call.student.numel()).fill_(0)
        return function(call)

    replace("feature_loss_bwd", "cpu", wrong)


def wrong_mask() -> None:
    """Makes a Triton kernel that does not read the last column."""
    source = (ROOT / "kernels" / "feature" / "op.py").read_text()
    right, wrong = "inside = (rows[:, None] < n) & (columns[None, :] < d)\n    return", "< d - 1)\n    return"
    assert right in source
    copy = Path(tempfile.mkdtemp()) / "op.py"
    copy.write_text(source.replace(right, right.replace("< d)\n    return", wrong)))
    spec = importlib.util.spec_from_file_location("simplclip.kernels.feature.op", copy)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


how, *ops = os.environ["SPOIL"].split()
for op in [op for op in DRAW if op not in ops]:
    del DRAW[op]
if how != "one_fault_a_dtype":
    del selftest.PRECISIONS["float16"], selftest.PRECISIONS["float64"]
if how == "wrong_mask":  # interpreted, and thus slow
    LARGE.clear()
    selftest.DRAWS["feature_loss"] = range(3)
globals()[how]() if how != "nothing" else None
if __name__ == "__main__":
    main()
