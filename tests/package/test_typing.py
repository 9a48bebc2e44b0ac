"""What an editor and a type checker know of the public names: jedi and mypy read the sources,
nothing is imported.
"""

import importlib
import os
import subprocess
import sys

import pytest

from support.paths import ROOT

jedi = pytest.importorskip("jedi")
pytest.importorskip("mypy")

PACKAGES = [
    "simplclip",
    *(f"simplclip.{name}" for name in ("data", "evaluation", "losses", "models", "ops", "train")),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_an_editor_shows_signature_and_docstring_of_each_public_name(package):
    module = importlib.import_module(package)
    unknown = []
    for name in module.__all__:
        if not callable(getattr(module, name)):  # a module, a number
            continue
        found = jedi.Script(f"import {package}\n{package}.{name}").infer(
            2, len(f"{package}.{name}")
        )
        signatures = found[0].get_signatures() if found else []
        if not signatures or not found[0].docstring(raw=True):
            unknown.append(name)
        hidden = {parameter.name for signature in signatures for parameter in signature.params} & {
            "args",
            "modes",
            "options",
        }
        # that one passes on what another loss takes
        if package == "simplclip.losses" and name != "MatryoshkaLoss":
            assert not hidden, name
    assert not unknown


def test_an_editor_lists_public_names_alone_and_completes_a_loss():
    for package in PACKAGES:
        script = jedi.Script(f"import {package}\n{package}.")
        names = {found.name for found in script.complete(2, len(package) + 1)}
        assert not names & {"Any", "TYPE_CHECKING", "attribute"}, package
    script = jedi.Script("from simplclip.losses import ClipLoss\nClipLoss()(x, y, scale).backw")
    assert "backward" in {found.name for found in script.complete()}


RIGHT = """
import torch
import simplclip
from simplclip.losses import ClipLoss, ClipPMLoss, CoCaLoss, SigLipLoss, WIKDLoss

model = simplclip.create_model("siclip-tiny")
simplclip.crop_texts(model)
loss = ClipPMLoss(local_loss=True, gather_with_grad=True, rank=1, world_size=2, pm_weight=0.5)
ClipLoss(), CoCaLoss(1.0, 2.0, rank=0), SigLipLoss(dist_impl="gather"), WIKDLoss(teacher_dim=512)
pair = torch.ones(2, 8), torch.ones(2, 8)
scale = torch.tensor(1.0)
with simplclip.backend("reference"):
    value: torch.Tensor = loss(*pair, scale)
terms: dict[str, torch.Tensor] = loss(*pair, scale, output_dict=True)
contrastive, caption = CoCaLoss(1.0, 2.0)(*pair, torch.ones(2, 3, 8), pair[0].long(), scale)
"""
WRONG = {
    'ClipPMLoss(pm_weight="x")': 'Argument "pm_weight" to "ClipPMLoss" has incompatible '
    'type "str"; expected "float"',
    "ClipLoss(typo=1)": 'Argument "typo" to "ClipLoss" has incompatible type "int"; '
    'expected "Never"',
    "loss(*pair, 1.0)": 'No overload variant of "__call__" of "PairLoss" matches argument types '
    '"tuple[Tensor, Tensor]", "float"',
    "value.backwards()": '"Tensor" has no attribute "backwards"',
    "simplclip.crop_text(model)": 'Module has no attribute "crop_text"',
    "CoCaLoss(1.0)": 'Missing positional argument "clip_loss_weight" in call to "CoCaLoss"',
    "WIKDLoss(teacher_dim=True, divergence=1)": 'Argument "divergence" to "WIKDLoss" has '
    'incompatible type "int"',
}


# Of other packages than these mypy would read 2,700 files.
MYPY = f"""
[mypy]
strict = true
mypy_path = {ROOT}
cache_dir = {os.devnull}
follow_imports = skip
[mypy-simplclip.*,torch,torch._C.*,torch._tensor,torch.types,torch.nn.*]
follow_imports = silent
"""


@pytest.mark.slow
def test_a_type_checker_finds_wrong_arguments_and_no_others(tmp_path):
    (tmp_path / "user.py").write_text(RIGHT + "\n".join(WRONG) + "\n")
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "user.py"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    first = RIGHT.count("\n") + 1
    found = [line for line in run.stdout.splitlines() if ": error: " in line]
    for number, message in enumerate(WRONG.values(), first):
        assert any(f"user.py:{number}: error: {message}" in line for line in found), run.stdout
    assert len(found) == len(WRONG), run.stdout
