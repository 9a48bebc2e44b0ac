"""The table of terms: what cannot be derived from it agrees with it."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from simplclip.common.terms import BASES, TERMS
from simplclip.losses import WIKDLoss
from simplclip.train.objective import Objective
from simplclip.train.sections import LossConfig
from support.losses import loss_inputs

PAGE = Path(__file__).parents[2] / "docs" / "losses.md"
OF_WIKD = [term for term in TERMS if term.name in BASES[:1] or not term.is_base]


@pytest.mark.parametrize("term", OF_WIKD, ids=lambda term: term.name)
def test_a_loss_has_the_arguments_of_a_term(term):
    arguments = inspect.signature(WIKDLoss).parameters
    if term.choices:
        assert arguments[term.name].default == term.choices[0]
    weights = dict.fromkeys([other.weight for other in OF_WIKD], 0.0) | {term.weight: 2.0}
    loss = WIKDLoss(**weights)
    assert f"{term.weight}=2.0" in repr(loss)
    (image, text, scale, _), teacher = loss_inputs()
    values = loss(image, text, scale, *teacher, output_dict=True)
    assert list(values) == [term.key]
    values[term.key].backward()
    assert image.grad.abs().sum() > 0


def test_a_run_trains_and_logs_every_term():
    config = LossConfig(**{term.weight: 1.0 for term in TERMS})
    objective = Objective(config, 10, 16, {"width": 12, "logit_scale": 14.0})
    (image, text, scale, bias), teacher = loss_inputs(teacher_width=12, dtype=torch.float32)
    total, terms = objective(0, image, text, scale, bias, None, *teacher[:2])
    assert list(terms) == [term.column for term in OF_WIKD]
    torch.testing.assert_close(total, sum(terms.values()))
    assert [name for name, value in terms.items() if not 0 < value < torch.inf] == []


def test_the_page_lists_every_term():
    rows = re.findall(r"^\| ([a-z\d ]+) \| (.+?) \|", PAGE.read_text(), re.MULTILINE)
    shown = dict(rows)
    for term in TERMS:
        weight = f"`{term.weight}`" if term in OF_WIKD else "none: `SigLipLoss`"
        assert shown.get(term.name.replace("_", " ")) == weight, f"the row of {term.name}"
