import inspect
import math

import plain
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from simplclip.losses import ClipPMLoss


def features(n=24, width=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, width, generator=g), dim=1)
    text = F.normalize(torch.randn(n, width, generator=g) + 3 * image, dim=1)
    scale = torch.tensor(14.0, requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


def test_signature_is_open_clips():
    theirs, ours = (inspect.signature(c.__init__).parameters for c in (ClipLoss, ClipPMLoss))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default for name in theirs if name != "self")
    theirs, ours = (inspect.signature(c.forward).parameters for c in (ClipLoss, ClipPMLoss))
    assert list(ours)[: len(theirs)] == list(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [None, -10.0])
def test_without_pair_matching_it_is_clip_loss(bias, dtype):
    bias = None if bias is None else torch.tensor(bias)
    results = []
    for loss in (ClipLoss(), ClipPMLoss(pm_weight=0)):
        image, text, scale = features(dtype=dtype)
        value = loss(image, text, scale, bias, output_dict=True)
        assert list(value) == ["contrastive_loss"]
        value["contrastive_loss"].backward()
        results.append((value["contrastive_loss"], image.grad, text.grad, scale.grad))
        assert list(loss.parameters()) == []
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("plane", ["scalar", "hadamard"])
@pytest.mark.parametrize("negatives", ["all", "hard"])
def test_terms_and_plane_gradients(negatives, plane):
    loss = ClipPMLoss(pm_weight=0.5, plane=plane, negatives=negatives, embed_dim=16)
    image, text, scale = features()
    terms = loss(image, text, scale, output_dict=True)
    assert list(terms) == ["contrastive_loss", "pair_matching_loss"]
    assert loss(image, text, scale) == sum(terms.values())
    sum(terms.values()).backward()
    weight, bias = (p.detach().clone().requires_grad_() for p in (loss.plane_weight, loss.plane_bias))
    expected = plain.similarity_loss(image, text, scale, plane=(weight, bias), negatives=negatives)
    (expected["contrastive"] + 0.5 * expected["pair_matching"]).backward()
    torch.testing.assert_close(terms["contrastive_loss"], expected["contrastive"])
    torch.testing.assert_close(terms["pair_matching_loss"], 0.5 * expected["pair_matching"])
    torch.testing.assert_close(loss.plane_weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.plane_bias.grad, bias.grad, rtol=1e-4, atol=1e-6)


def test_shift_draws_another_negative_at_each_call():
    loss = ClipPMLoss(negatives="shift")
    image, text, scale = features()
    draw = lambda: loss(image, text, scale, output_dict=True)["pair_matching_loss"].item()  # noqa: E731
    torch.manual_seed(0)
    first = [draw() for _ in range(8)]
    torch.manual_seed(0)
    assert [draw() for _ in range(8)] == first
    assert len(set(first)) > 1


def test_ids_drop_out_of_the_negatives():
    loss = ClipPMLoss()
    image, text, scale = features(4)
    twice = [torch.cat([t, t]).detach() for t in (image, text)]
    ids = torch.arange(4).repeat(2)
    assert loss(*twice, scale, ids=ids) < loss(*twice, scale)
    expected = plain.similarity_loss(*twice, scale, terms=("contrastive",), ids=ids, text_ids=ids)["contrastive"]
    torch.testing.assert_close(loss(*twice, scale, output_dict=True, ids=ids)["contrastive_loss"], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pm_weight": -1}, "pm_weight: expected a weight of 0 or more, got -1"),
        ({"pm_weight": math.inf}, "pm_weight: expected a finite number, got inf"),
        ({"pm_weight": math.nan}, "pm_weight: expected a finite number, got nan"),
        ({"embed_dim": -2}, "embed_dim: expected an integer above 0 or None, got -2"),
        ({"plane": "affine"}, "plane: expected one of 'scalar', 'hadamard', got 'affine'"),
        ({"negatives": "none"}, "negatives: expected one of 'all', 'shift', 'hard', got 'none'"),
        ({"plane": "hadamard"}, "embed_dim: expected the width D"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipPMLoss(**arguments)


@pytest.mark.parametrize("weight", [None, "1", True, torch.tensor(1.0)])
def test_weights_are_numbers(weight):
    with pytest.raises(TypeError, match=f"pm_weight: expected a number, got {type(weight).__name__}"):
        ClipPMLoss(pm_weight=weight)


def test_features_of_another_width_than_embed_dim():
    image, text, scale = features()
    with pytest.raises(ValueError, match=r"image_features: expected the width embed_dim = 12, got shape \[24, 16\]"):
        ClipPMLoss(plane="hadamard", embed_dim=12)(image, text, scale)


def test_round_trips():
    loss = ClipPMLoss(plane="hadamard", embed_dim=16)
    other = ClipPMLoss(plane="hadamard", embed_dim=16)
    with torch.no_grad():
        loss.plane_weight.normal_()
    other.load_state_dict(loss.state_dict())
    image, text, scale = features()
    torch.testing.assert_close(loss(image, text, scale), other(image, text, scale))
