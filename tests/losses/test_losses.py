"""What both losses share: open_clip's signatures and values, pair matching, errors."""

import inspect
import math

import plain
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss
from torch import nn

from simplclip.losses import ClipPMLoss, MatryoshkaLoss, SigLipLoss, WIKDLoss

PAIRS = [(ClipLoss, ClipPMLoss), (DistillClipLoss, WIKDLoss)]


def features(n=24, width=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, width, generator=g), dim=1)
    text = F.normalize(torch.randn(n, width, generator=g) + 3 * image, dim=1)
    scale = torch.tensor(14.0, requires_grad=True)
    return image.to(dtype).requires_grad_(), text.to(dtype).requires_grad_(), scale


def teacher(**options):
    return [t.detach() for t in features(seed=1, **options)]


@pytest.mark.parametrize("classes", PAIRS)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signature_is_open_clips(classes, method):
    theirs, ours = (inspect.signature(getattr(c, method)).parameters for c in classes)
    assert list(ours)[: len(theirs)] == list(theirs)
    if method == "__init__":
        assert all(ours[name].default == theirs[name].default for name in theirs if name != "self")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rest", ["none", "bias", "teacher"])
def test_without_pair_matching_it_is_open_clips_loss(rest, dtype):
    """Values of both forms of the result, and gradients of a weighted sum of the terms."""
    more = {"none": [], "bias": [torch.tensor(-10.0)], "teacher": teacher(dtype=dtype)}[rest]
    pair = (DistillClipLoss(), WIKDLoss()) if rest == "teacher" else (ClipLoss(), ClipPMLoss(pm_weight=0))
    results = []
    for loss in pair:
        leaves = features(dtype=dtype)
        named, value = loss(*leaves, *more, output_dict=True), loss(*leaves, *more)
        assert list(named) == ["contrastive_loss", "distill_loss"][: len(named)]
        assert len(named) == (2 if rest == "teacher" else 1)
        values = value if rest == "teacher" else (value,)
        sum(weight * v for weight, v in zip((1, 2), values)).backward()
        results.append((*named.values(), *values, *(t.grad for t in leaves)))
        assert list(loss.parameters()) == []
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if rest == "teacher" else {"rtol": 1e-5, "atol": 1e-7}
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)


@pytest.mark.parametrize("plane", ["scalar", "hadamard"])
def test_terms_and_plane_gradients(plane):
    loss = ClipPMLoss(pm_weight=0.5, plane=plane, embed_dim=16)
    leaves = features()
    terms = loss(*leaves, output_dict=True)
    assert list(terms) == ["contrastive_loss", "pair_matching_loss"]
    assert loss(*leaves) == sum(terms.values())
    sum(terms.values()).backward()
    weight, bias = (p.detach().clone().requires_grad_() for p in (loss.plane_weight, loss.plane_bias))
    expected = plain.similarity_loss(*leaves, plane=(weight, bias))
    (expected["contrastive"] + 0.5 * expected["pair_matching"]).backward()
    torch.testing.assert_close(terms["contrastive_loss"], expected["contrastive"])
    torch.testing.assert_close(terms["pair_matching_loss"], 0.5 * expected["pair_matching"])
    torch.testing.assert_close(loss.plane_weight.grad, weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.plane_bias.grad, bias.grad, rtol=1e-4, atol=1e-6)


N = 12
EVERYTHING = {
    "relational_weight": 0.8,
    "interactive_weight": 0.6,
    "feature_weight": 0.4,
    "pm_weight": 0.5,
    "divergence": "kl",
}
RAW = {"contrastive_loss": "contrastive", "distill_loss": "relational"}


@pytest.mark.parametrize(
    ("loss", "widths"),
    [
        (ClipPMLoss(pm_weight=0.5), None),
        (ClipPMLoss(pm_weight=0.5, plane="hadamard", embed_dim=16), (4, 16)),
        (ClipPMLoss(pm_weight=0.5, plane="hadamard", embed_dim=16), None),
        (SigLipLoss(pm_weight=0.5), None),
        (SigLipLoss(pm_weight=0.5), (4, 16)),
        (WIKDLoss(**EVERYTHING), None),
        (WIKDLoss(**EVERYTHING, interactive="kl"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_term_has_the_gradient_that_it_has_alone(loss, widths):
    """Of the dict and of the tuple, in float64 against plain torch, so that reweighting trains what it says."""
    loss.double()
    image, text, scale, bias = (t.detach().double().requires_grad_() for t in (*features(N), torch.tensor(-3.0)))
    distils = isinstance(loss, WIKDLoss)
    more = [t.detach().double() for t in features(N, seed=1)] if distils else []
    leaves = [image, text, scale, loss.plane_weight, loss.plane_bias, *([] if distils else [bias])]

    def truth(term, image, text):
        weight = loss.plane_weight[: image.shape[1]] if loss.plane == "hadamard" else loss.plane_weight
        if term == "feature":
            return (plain.feature_loss(image, more[0]) + plain.feature_loss(text, more[1])) / 2
        given = dict(zip(("teacher_image", "teacher_text", "teacher_scale"), more))
        given |= {"interactive": loss.interactive, "divergence": "kl"} if distils else {"logit_bias": bias}
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


def test_ids_drop_out_of_the_negatives():
    loss = ClipPMLoss()
    image, text, scale = features(4)
    twice = [torch.cat([t, t]).detach() for t in (image, text)]
    ids = torch.arange(4).repeat(2)
    assert loss(*twice, scale, ids=ids) < loss(*twice, scale)
    expected = plain.similarity_loss(*twice, scale, terms=("contrastive",), ids=ids, text_ids=ids)["contrastive"]
    torch.testing.assert_close(loss(*twice, scale, output_dict=True, ids=ids)["contrastive_loss"], expected)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (ClipPMLoss, {"pm_weight": -1}, "pm_weight: expected a weight of 0 or more, got -1"),
        (ClipPMLoss, {"pm_weight": math.inf}, "pm_weight: expected a finite number, got inf"),
        (ClipPMLoss, {"pm_weight": math.nan}, "pm_weight: expected a finite number, got nan"),
        (ClipPMLoss, {"embed_dim": -2}, "embed_dim: expected an integer above 0 or None, got -2"),
        (ClipPMLoss, {"plane": "affine"}, "plane: expected one of 'scalar', 'hadamard', got 'affine'"),
        (ClipPMLoss, {"plane": "hadamard"}, "embed_dim: expected the width D"),
        (WIKDLoss, {"relational_weight": -1}, "relational_weight: expected a weight of 0 or more, got -1"),
        (WIKDLoss, {"contrastive_weight": math.nan}, "contrastive_weight: expected a finite number, got nan"),
        (WIKDLoss, {"interactive_weight": math.inf}, "interactive_weight: expected a finite number, got inf"),
        (
            WIKDLoss,
            {"contrastive_weight": 0, "relational_weight": 0},
            "contrastive_weight and the other weights: expected one",
        ),
        (WIKDLoss, {"embed_dim": 16, "teacher_dim": (20, -1)}, "teacher_dim: expected an integer above 0 or None, got -1"),
        (WIKDLoss, {"interactive": "mse"}, "interactive: expected one of 'infonce', 'kl', got 'mse'"),
        (WIKDLoss, {"divergence": "js"}, "divergence: expected one of 'kl', 'cross_entropy', got 'js'"),
        (WIKDLoss, {"feature_distance": "l1"}, "feature_distance: expected one of 'mse', 'smooth_l1', got 'l1'"),
        (WIKDLoss, {"teacher_dim": 20, "feature_weight": 1}, "embed_dim: expected the width D"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(("pm_weight", v, f"a number, got {type(v).__name__}") for v in (None, "1", True, torch.tensor(1.0))),
        ("feature_weight", None, "a number, got NoneType"),
        ("embed_dim", 16.0, "an integer above 0 or None, got 16.0"),
        ("embed_dim", True, "an integer above 0 or None, got True"),
        ("teacher_dim", "20", "an integer above 0 or None, got '20'"),
    ],
)
def test_arguments_of_another_type(name, value, message):
    with pytest.raises(TypeError, match=f"{name}: expected {message}"):
        WIKDLoss(**{"embed_dim": 16, name: value})


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda: ClipPMLoss(plane="hadamard", embed_dim=16), []),
        (
            lambda: WIKDLoss(
                interactive_weight=0.6, feature_weight=0.4, pm_weight=0.5, learn_interactive_scale=True, plane="hadamard",
                embed_dim=16, teacher_dim=(16, 20),
            ),
            list(zip(teacher(), teacher(width=20))),
        ),
    ],
)  # fmt: skip
def test_state_round_trips(make, more):
    loss, other = make(), make()
    with torch.no_grad():
        loss.plane_weight.normal_()
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss(*features(), *more), other(*features(), *more))
