"""Behaviour that the losses share: each term's own gradient, groups, states, errors. Values: test_drop_in.py."""

import math

import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simplclip import losses
from simplclip.losses import ClipPMLoss, MatryoshkaLoss, SigLipLoss, WIKDLoss


def features(n=24, width=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, width, generator=g), dim=1)
    text = F.normalize(torch.randn(n, width, generator=g) + 3 * image, dim=1)
    scale = torch.tensor(14.0, requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


N = 12
EVERYTHING = {"relational_weight": 0.8, "interactive_weight": 0.6, "feature_weight": 0.4, "pm_weight": 0.5}
RAW = {"contrastive_loss": "contrastive", "distill_loss": "relational"}


@pytest.mark.parametrize(
    ("loss", "widths"),
    [
        (ClipPMLoss(pm_weight=0.5), None),
        (ClipPMLoss(pm_weight=0.5, plane="hadamard", embed_dim=16), (4, 16)),
        (ClipPMLoss(pm_weight=0.5, plane="hadamard", embed_dim=16), None),
        (SigLipLoss(pm_weight=0.5), None),
        (SigLipLoss(pm_weight=0.5), (4, 16)),
        (WIKDLoss(**EVERYTHING, divergence="kl"), None),
        (WIKDLoss(**EVERYTHING, divergence="kl", interactive="kl"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_term_has_the_gradient_that_it_has_alone(loss, widths):
    """Compares the dict and the tuple with plain torch in float64: each term keeps its gradient when terms are reweighted."""
    loss.double()
    image, text, scale, bias = (t.detach().double().requires_grad_() for t in (*features(N), torch.tensor(-3.0)))
    distils = isinstance(loss, WIKDLoss)
    more = [t.detach().double() for t in features(N, seed=1)] if distils else []
    leaves = [image, text, scale, loss.plane_weight, loss.plane_bias, *([] if distils else [bias])]

    def truth(term, image, text):
        weight = loss.plane_weight[: image.shape[1]] if loss.plane == "hadamard" else loss.plane_weight
        if term == "feature":
            return (plain.feature_loss(image, more[0]) + plain.feature_loss(text, more[1])) / 2
        if term == "interactive":
            return plain.interactive(image, text, scale, *more, form=loss.interactive)
        given = dict(zip(("teacher_image", "teacher_text", "teacher_scale"), more)) if distils else {"logit_bias": bias}
        return plain.similarity_loss(image, text, scale, terms=(term,), plane=(weight, loss.plane_bias), **given)[term]

    wrapped = MatryoshkaLoss(loss, widths) if widths else loss
    arguments = (image, text, scale, *(more or [bias]))
    terms = wrapped(*arguments, output_dict=True)
    values = wrapped(*arguments)
    raw = RAW | ({"contrastive_loss": "sigmoid"} if isinstance(loss, SigLipLoss) else {})
    for index, (key, value) in enumerate(terms.items()):
        term = raw.get(key, key.removesuffix("_loss"))
        weight = getattr(loss, {"pair_matching": "pm_weight"}.get(term, f"{term}_weight"), 1.0)
        units = [[F.normalize(t[:, :w], dim=1) for t in (image, text)] for w in widths or ()] or [[image, text]]
        expected = weight * sum(truth(term, *unit) for unit in units)
        for got in (value, values[index]) if distils else (value,):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
            gradients = (torch.autograd.grad(v, leaves, retain_graph=True, materialize_grads=True) for v in (got, expected))
            torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)
    if not distils:
        torch.testing.assert_close(values, sum(terms.values()))


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (ClipPMLoss, {"pm_weight": -1}, "pm_weight: expected a weight of 0 or more, got -1"),
        (ClipPMLoss, {"pm_weight": math.inf}, "pm_weight: expected a finite number, got inf"),
        (ClipPMLoss, {"embed_dim": -2}, "embed_dim: expected an integer above 0 or None, got -2"),
        (ClipPMLoss, {"plane": "affine"}, "plane: expected one of 'scalar', 'hadamard', got 'affine'"),
        (ClipPMLoss, {"plane": "hadamard"}, "embed_dim: expected the width D"),
        (WIKDLoss, {"contrastive_weight": math.nan}, "contrastive_weight: expected a finite number, got nan"),
        (WIKDLoss, {"contrastive_weight": 0, "relational_weight": 0}, "contrastive_weight and the other weights: expected"),
        (WIKDLoss, {"embed_dim": 16, "teacher_dim": -1}, "teacher_dim: expected an integer above 0 or None, got -1"),
        (WIKDLoss, {"interactive": "mse"}, "interactive: expected one of 'infonce', 'kl', got 'mse'"),
        (WIKDLoss, {"divergence": "js"}, "divergence: expected one of 'kl', 'cross_entropy', got 'js'"),
        (WIKDLoss, {"teacher_dim": 20, "feature_weight": 1}, "embed_dim: expected the width D"),
        *((WIKDLoss, {"pm_weight": v}, f"pm_weight: expected a number, got {type(v).__name__}") for v in (None, "1", True)),
        (WIKDLoss, {"pm_weight": torch.tensor(1.0)}, "pm_weight: expected a number, got Tensor"),
        (WIKDLoss, {"embed_dim": 16.0}, "embed_dim: expected an integer above 0 or None, got 16.0"),
        (WIKDLoss, {"embed_dim": 16, "teacher_dim": "20"}, "teacher_dim: expected an integer above 0 or None, got '20'"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**arguments)


def test_dir_lists_all_losses():
    assert set(losses.__all__) <= set(dir(losses))
    assert all(hasattr(losses, name) for name in losses.__all__)
