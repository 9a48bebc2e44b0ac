"""The recipes of docs/recipes.md against definitions over the whole matrix in float64."""

import pytest
import torch
import torch.nn.functional as F

from simplclip.losses import RowwiseLoss, rowwise
from support.programs import run_doc_blocks

N = 64  # as in the page
PAIRS = torch.arange(N) // 2
SAME, POSITIVE = PAIRS[:, None] == PAIRS, torch.eye(N, dtype=torch.bool)


@pytest.fixture(scope="module")
def page():
    return run_doc_blocks("recipes.md", "Recipes")


def several_positives(logits):
    """Khosla et al. 2020, L_out: a row's mean of -log softmax over its positives."""
    return torch.stack([-row.log_softmax(0)[same].mean() for row, same in zip(logits, SAME)])


def several_positives_sigmoid(logits):
    return -(torch.sigmoid(logits).log() * SAME + torch.sigmoid(-logits).log() * ~SAME).sum(1)


def label_smoothing(logits):
    target = 0.9 * POSITIVE.double() + 0.1 / N
    return -(target * logits.log_softmax(1)).sum(1)


def decoupled(logits):
    return -(logits.diagonal().exp() / (logits.exp() * ~POSITIVE).sum(1)).log()


@pytest.mark.parametrize(
    "definition",
    [several_positives, several_positives_sigmoid, label_smoothing, decoupled],
    ids=lambda definition: definition.__name__,
)
def test_a_recipe_equals_the_definition(definition, page, monkeypatch):
    """Values and gradients, also of the scale."""
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(N, 16, generator=g, dtype=torch.float64) for _ in range(2))
    leaves = [F.normalize(t, dim=1).requires_grad_() for t in (image, image + text)]
    leaves += [
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (9.0, -4.0)
    ]
    one_sided = definition is several_positives_sigmoid
    loss = RowwiseLoss(page[definition.__name__], symmetric=not one_sided)
    loss.scratch_bytes = 1
    monkeypatch.setattr(rowwise, "LEAST_ROWS", 24)  # three chunks
    if one_sided:
        value = loss(*leaves)
        expected = definition(leaves[2] * leaves[0] @ leaves[1].T + leaves[3]).mean()
    else:
        leaves = leaves[:3]
        logits = leaves[2] * leaves[0] @ leaves[1].T
        value = loss(*leaves)
        expected = (definition(logits).mean() + definition(logits.T).mean()) / 2
    torch.testing.assert_close(value, expected)
    for gradient, exact in zip(
        torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    ):
        torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-10)
    assert torch.equal(page["ids"], PAIRS)
