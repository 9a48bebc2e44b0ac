"""MatryoshkaLoss against its definition, the sum of the wrapped loss over prefixes."""

import open_clip
import pytest
import torch
import torch.nn.functional as F

from simplclip.losses import (
    ClipLoss,
    ClipPMLoss,
    CoCaLoss,
    MatryoshkaLoss,
    RowwiseLoss,
    SigLipLoss,
    WIKDLoss,
)
from support.losses import focal, loss_inputs
from support.ops import plain

N = 24
D = 16
WIDTHS = (3, 8, 16)
WEIGHTS = (0.5, 1.0, 2.0)


def batch(dtype=torch.float64):
    """Returns leaves that are not normalised: image, text, scale."""
    image, text, scale, _ = loss_inputs(N, D, dtype=dtype)[0]
    factors = torch.linspace(0.5, 3, N, dtype=dtype)[:, None]
    return [(t.detach() * factors).requires_grad_() for t in (image, text)] + [scale]


def same(value, expected, leaves, rtol=1e-9):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-12)
    pair = (torch.autograd.grad(each, leaves, retain_graph=True) for each in (value, expected))
    torch.testing.assert_close(*pair, rtol=max(rtol, 1e-7), atol=1e-10)


def over_prefixes(loss, image, text, *args):
    total = 0
    for width, weight in zip(WIDTHS, WEIGHTS):
        prefixes = (F.normalize(t[:, :width], dim=1) for t in (image, text))
        total = total + weight * loss(*prefixes, *args)
    return total


def contrastive(image, text, scale):
    return plain.similarity_loss(image, text, scale, terms=("contrastive",))["contrastive"]


def sigmoid(image, text, scale):
    return plain.similarity_loss(image, text, scale, logit_bias=-3.0, terms=("sigmoid",))["sigmoid"]


def focal_of_rows_and_columns(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(N)
    return (focal(logits, labels).mean() + focal(logits.T, labels).mean()) / 2


BIAS = torch.tensor(-3.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "definition", "rest"),
    [
        (ClipPMLoss(pm_weight=0), contrastive, ()),
        (SigLipLoss(), sigmoid, (BIAS,)),
        (RowwiseLoss(focal), focal_of_rows_and_columns, ()),
        (open_clip.ClipLoss(), contrastive, ()),
        (open_clip.loss.SigLipLoss(), sigmoid, (BIAS,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_losses_without_parameters(loss, definition, rest):
    leaves = batch()
    matryoshka = MatryoshkaLoss(loss, WIDTHS, WEIGHTS)
    value = matryoshka(*leaves, *rest)
    same(value, over_prefixes(definition, *leaves), leaves)
    ((key, named),) = matryoshka(*leaves, *rest, output_dict=True).items()
    assert key == ("rowwise_loss" if isinstance(loss, RowwiseLoss) else "contrastive_loss")
    torch.testing.assert_close(named, value)


@pytest.mark.parametrize("kind", [ClipPMLoss, WIKDLoss])
def test_projections_have_the_whole_width_and_a_prefix_their_first_columns(kind):
    distils, leaves = kind is WIKDLoss, batch()
    options = {"interactive_weight": 0.6, "feature_weight": 0.4, "embed_dim": D, "teacher_dim": 20}
    loss = kind(pm_weight=0.5, **(options if distils else {})).double()
    teacher = loss_inputs(N, D, teacher_width=20)[1] if distils else []
    weights = {"contrastive": 1, "pair_matching": 0.5}
    if distils:
        weights |= {"relational": 1, "interactive": 0.6, "feature": 0.4}

    def definition(image, text, scale):
        exact = plain.loss_terms(loss, weights, image, text, scale, teacher=teacher or (None,) * 3)
        return sum(weight * exact[term] for term, weight in weights.items())

    matryoshka = MatryoshkaLoss(loss, WIDTHS, WEIGHTS)
    assert [name for name, _ in matryoshka.named_parameters()] == [
        f"loss.{name}" for name, _ in loss.named_parameters()
    ]
    named, values = (matryoshka(*leaves, *teacher, output_dict=flag) for flag in (True, False))
    assert list(named) == list(loss(*(t.detach() for t in leaves), *teacher, output_dict=True))
    same(sum(named.values()), over_prefixes(definition, *leaves), leaves + list(loss.parameters()))
    torch.testing.assert_close(values, tuple(named.values()) if distils else sum(named.values()))


def test_a_compiled_loss_takes_prefixes_too():
    leaves = batch()
    expected = MatryoshkaLoss(ClipPMLoss().double(), WIDTHS)(*leaves)
    compiled = torch.compile(ClipPMLoss().double(), backend="eager")
    torch.testing.assert_close(MatryoshkaLoss(compiled, WIDTHS)(*leaves), expected)


def test_the_terms_of_coca_are_all_summed():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(N, 6, 11, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 11, (N, 6), generator=g)
    leaves = batch()
    value, caption = MatryoshkaLoss(CoCaLoss(2.0, 0.7), WIDTHS, WEIGHTS)(
        *leaves[:2], logits, labels, leaves[2]
    )
    same(value, over_prefixes(lambda *args: 0.7 * contrastive(*args), *leaves), leaves)
    expected = 2 * F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=0)
    torch.testing.assert_close(caption, sum(WEIGHTS) * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    *leaves, scale = batch(dtype)
    loss = MatryoshkaLoss(ClipLoss(), WIDTHS, WEIGHTS)
    value = loss(*leaves, scale)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = over_prefixes(contrastive, *wide, scale.double())
    torch.testing.assert_close(value.double(), expected, rtol=2e-2, atol=0)
    for got, exact in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, wide)):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), exact, rtol=0, atol=3e-2 * exact.abs().max().item()
        )
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(loss(*(t.detach().float() for t in leaves), scale), value)


def test_a_width_of_weight_0_costs_nothing_and_features_after_the_last_get_no_gradient():
    image, text, _ = batch()
    calls = []

    class Seen(ClipLoss):
        def forward(self, image, *rest):
            calls.append(image.shape[1])
            return super().forward(image, *rest)

    MatryoshkaLoss(Seen(), (3, 5, 8), (1, 0, 1))(image, text, 14.0).backward()
    assert calls == [3, 8]
    assert not image.grad[:, 8:].any()
    assert image.grad[:, :8].any(0).all()


@pytest.mark.parametrize(
    ("widths", "weights", "message"),
    [
        *(
            (widths, None, f"widths: expected ascending integers above 0, got {got}")
            for widths, got in (
                ((), r"\(\)"),
                ((8, 4), r"\(8, 4\)"),
                ((0, 4), r"\(0, 4\)"),
                (4, "int"),
            )
        ),
        ((4, 8), (1.0,), r"weights: expected 2, one above 0, got \(1.0,\)"),
        ((4, 8), (1.0, -1.0), "weights: expected a weight of 0 or more, got -1.0"),
        ((4, 8), (0, 0), r"weights: expected 2, one above 0, got \(0, 0\)"),
        ((8, 17), None, r"widths: expected at most the features' width, 16, got \(8, 17\)"),
        ((4,), 1.0, "weights: expected a number for each width, got float"),
    ],
)
def test_bad_widths_and_weights(widths, weights, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MatryoshkaLoss(ClipLoss(), widths, weights)(*batch())


@pytest.mark.parametrize("extra", [None, "text"])
def test_a_loss_returns_tensors_and_numbers_alone(extra):
    class Labelled(ClipLoss):
        def forward(self, *args):
            return {"loss": super().forward(*args), "count": 2, "extra": extra}

    with pytest.raises(TypeError, match="loss: expected .* tensors and numbers, got (None|str)"):
        MatryoshkaLoss(Labelled(), (4, 8))(*batch())
