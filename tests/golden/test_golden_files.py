"""A shard, a sidecar and a checkpoint that version 0.1.0 wrote are read as they were then; make.py
has made them.
"""

import lzma
import os
import shutil

import numpy as np
import pytest
from golden import make

from support.paths import ROOT

VERSIONS = sorted(
    path.name for path in (ROOT / "tests" / "golden").iterdir() if path.name[0].isdigit()
)


@pytest.fixture(params=VERSIONS)
def expected(request, tmp_path, monkeypatch):
    """What the files of a version gave when they were made; a copy of them is in the current
    folder.
    """
    shutil.copytree(ROOT / "tests" / "golden" / request.param, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in os.listdir("run"):
        if name.endswith(".xz"):
            with (
                lzma.open(f"run/{name}") as file,
                open(f"run/{name.removesuffix('.xz')}", "wb") as out,
            ):
                shutil.copyfileobj(file, out)
    with np.load("expected.npz") as stored:
        return dict(stored)


def test_a_shard_and_its_sidecar_give_the_same_batch(expected):
    batch = make.read()
    for name in ("key", "text", "group", "teacher_image", "teacher_text"):
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)
    # of 255: views are resampled, then change colour
    assert abs(batch["image"].astype(int) - expected["image"]).max() <= 6


def test_a_checkpoint_encodes_the_same_features(expected):
    for name, features in make.features().items():
        np.testing.assert_allclose(features, expected[name], atol=1e-5, err_msg=name)


def test_a_run_resumes_with_the_same_losses(expected):
    np.testing.assert_allclose(make.resumed(), expected["losses"], rtol=1e-4)
