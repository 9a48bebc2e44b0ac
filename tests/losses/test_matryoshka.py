"""MatryoshkaLoss against a loop over prefixes in plain torch and the wrapped losses."""

import open_clip
import plain
import pytest
import torch
import torch.nn.functional as F
from rank_rowwise import focal
from torch import nn

from simplclip.losses import ClipLoss, ClipPMLoss, CoCaLoss, MatryoshkaLoss, RowwiseLoss, SigLipLoss, WIKDLoss

N, D, WIDTHS, WEIGHTS = 12, 16, (3, 8, 16), (0.5, 1.0, 2.0)


def batch(width=D, n=N, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (image, text + image)]


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def unit(features, width):
    return F.normalize(features[:, :width], dim=1)


def same(ours, theirs, leaves, rtol=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-12)
    gradients = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (ours, theirs))
    for got, wanted in zip(*gradients):
        torch.testing.assert_close(got, wanted, rtol=max(rtol, 1e-7), atol=1e-10)


def dense(loss, image, text, *args, **kwargs):
    """Computes the definition: memeff 0.3.1's MatryoshkaLoss over a loss that normalises its features."""
    return sum(w * loss(unit(image, m), unit(text, m), *args, **kwargs) for m, w in zip(WIDTHS, WEIGHTS))


def clip(image, text, scale):
    return plain.similarity_loss(image, text, scale, terms=("contrastive",))["contrastive"]


def sigmoid(image, text, scale, bias):
    return plain.similarity_loss(image, text, scale, logit_bias=bias, terms=("sigmoid",))["sigmoid"]


def rows(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(N)
    return (focal(logits, labels).mean() + focal(logits.T, labels).mean()) / 2


@pytest.mark.parametrize(
    ("loss", "theirs", "numbers"),
    [
        (ClipLoss(), clip, (14.0,)),
        (ClipPMLoss(pm_weight=0), clip, (14.0,)),
        (SigLipLoss(), sigmoid, (10.0, -3.0)),
        (RowwiseLoss(focal), rows, (14.0,)),
        (open_clip.ClipLoss(), clip, (14.0,)),
        (open_clip.loss.SigLipLoss(), sigmoid, (10.0, -3.0)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_equals_the_loop_over_prefixes(loss, theirs, numbers):
    leaves = [*batch(), *map(number, numbers)]
    ours = MatryoshkaLoss(loss, WIDTHS, WEIGHTS)
    value = ours(*leaves)
    same(value, dense(theirs, *leaves), leaves)
    named = ours(*leaves, output_dict=True)
    key = "rowwise_loss" if isinstance(loss, RowwiseLoss) else "contrastive_loss"
    assert list(named) == [key]
    torch.testing.assert_close(named[key], value)
    same(MatryoshkaLoss(loss, (D,))(*leaves), theirs(unit(leaves[0], D), unit(leaves[1], D), *leaves[2:]), leaves)


@pytest.mark.parametrize("plane", ["scalar", "hadamard"])
def test_a_plane_has_the_whole_width_and_a_prefix_its_first_weights(plane):
    loss = ClipPMLoss(pm_weight=0.5, plane=plane, embed_dim=D).double()
    leaves = [*batch(), number(14.0)]
    if plane == "hadamard":
        loss.plane_weight.data = torch.linspace(3, 9, D, dtype=torch.float64)
    parameters = [loss.plane_weight, loss.plane_bias]

    def theirs(image, text, scale):
        weight = loss.plane_weight[: image.shape[1]] if plane == "hadamard" else loss.plane_weight
        terms = ("contrastive", "pair_matching")
        found = plain.similarity_loss(image, text, scale, terms=terms, plane=(weight, loss.plane_bias))
        return found["contrastive"] + 0.5 * found["pair_matching"]

    ours = MatryoshkaLoss(loss, WIDTHS, WEIGHTS)
    assert [name for name, _ in ours.named_parameters()] == ["loss.plane_weight", "loss.plane_bias"]
    same(ours(*leaves), dense(theirs, *leaves), leaves + parameters)
    terms = ours(*leaves, output_dict=True)
    assert list(terms) == ["contrastive_loss", "pair_matching_loss"]
    torch.testing.assert_close(sum(terms.values()), ours(*leaves))


def test_distillation_from_one_teacher_of_its_own_width():
    loss = WIKDLoss(interactive_weight=0.6, feature_weight=0.4, pm_weight=0.5, embed_dim=D, teacher_dim=20).double()
    leaves = [*batch(), number(14.0)]
    teacher = [unit(t.detach(), 20) for t in batch(20, seed=1)] + [torch.tensor(9.0, dtype=torch.float64)]
    ours = MatryoshkaLoss(loss, WIDTHS, WEIGHTS)
    terms = ours(*leaves, *teacher, output_dict=True)
    assert list(terms) == list(loss(*(t.detach() for t in leaves), *teacher, output_dict=True))

    def theirs(image, text, scale):
        projections = [p[:, : image.shape[1]] for p in (loss.image_projection, loss.text_projection)]
        projected = [F.linear(t, p) for t, p in zip((image, text), projections)]
        found = plain.similarity_loss(
            image, text, scale, terms=("contrastive", "relational", "pair_matching"),
            plane=(loss.plane_weight, loss.plane_bias), teacher_image=teacher[0], teacher_text=teacher[1],
            teacher_scale=teacher[2], divergence="cross_entropy",
        )  # fmt: skip
        interactive = plain.interactive(*(unit(t, 20) for t in projected), scale, *teacher[:2])
        feature = (plain.feature_loss(projected[0], teacher[0]) + plain.feature_loss(projected[1], teacher[1])) / 2
        weighed = 0.6 * interactive + 0.5 * found["pair_matching"] + 0.4 * feature
        return found["contrastive"] + found["relational"] + weighed

    same(sum(terms.values()), dense(theirs, *leaves), leaves + list(loss.parameters()))
    values = ours(*leaves, *teacher)
    assert isinstance(values, tuple)
    torch.testing.assert_close(values, tuple(terms.values()))


def test_the_terms_of_coca_are_all_summed():
    g = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(N, 6, 11, generator=g, dtype=torch.float64), torch.randint(0, 11, (N, 6), generator=g)
    leaves = [*batch(), number(14.0)]
    contrastive, caption = MatryoshkaLoss(CoCaLoss(2.0, 0.7), WIDTHS, WEIGHTS)(*leaves[:2], logits, labels, leaves[2])
    same(contrastive, dense(lambda *a: 0.7 * clip(*a), *leaves), leaves)
    expected = 2 * F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=0)
    torch.testing.assert_close(caption, sum(WEIGHTS) * expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    leaves = batch(dtype=dtype)
    loss = MatryoshkaLoss(ClipLoss(), WIDTHS, WEIGHTS)
    value = loss(*leaves, torch.tensor(14.0))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = dense(clip, *wide, number(14.0))
    torch.testing.assert_close(value.double(), expected, rtol=2e-2, atol=0)
    for got, exact in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, wide)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=3e-2 * exact.abs().max().item())
    single = [t.detach().float() for t in leaves]
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(loss(*single, torch.tensor(14.0)), value)


def test_rows_of_zeros():
    image, text = batch()
    image.data[0], text.data[1, :3] = 0, 0
    loss = MatryoshkaLoss(ClipLoss(), WIDTHS, WEIGHTS)
    same(loss(image, text, 3.0), dense(clip, image, text, 3.0), [image, text])


def test_a_width_of_weight_0_costs_nothing_and_features_after_the_last_get_no_gradient():
    image, text = batch()
    calls = []

    class Seen(ClipLoss):
        def forward(self, image, *rest):
            calls.append(image.shape[1])
            return super().forward(image, *rest)

    loss = Seen()
    MatryoshkaLoss(loss, (3, 5, 8), (1, 0, 1))(image, text, 14.0).backward()
    assert calls == [3, 8]
    assert not image.grad[:, 8:].any()
    assert image.grad[:, :8].any(0).all()


@pytest.mark.slow
def test_traces_in_one_graph():
    leaves = [*batch(dtype=torch.float32), torch.tensor(14.0)]
    loss = MatryoshkaLoss(ClipPMLoss(plane="hadamard", embed_dim=D), WIDTHS, WEIGHTS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    same(compiled(*leaves), loss(*leaves), leaves[:2], rtol=1e-5)


def test_errors():
    loss = ClipLoss()
    for args, error, message in (
        ((loss, ()), ValueError, r"widths: expected ascending integers above 0, got \(\)"),
        ((loss, (8, 4)), ValueError, r"widths: expected ascending integers above 0, got \(8, 4\)"),
        ((loss, (0, 4)), ValueError, r"widths: expected ascending integers above 0, got \(0, 4\)"),
        ((loss, (4, 8), (1.0,)), ValueError, r"weights: expected 2, one above 0, got \(1.0,\)"),
        ((loss, (4, 8), (1.0, -1.0)), ValueError, "weights: expected a weight of 0 or more, got -1.0"),
        ((loss, (4, 8), (0, 0)), ValueError, r"weights: expected 2, one above 0, got \(0, 0\)"),
    ):
        with pytest.raises(error, match=message):
            MatryoshkaLoss(*args)
    image, text = batch()
    with pytest.raises(ValueError, match="dist_image_features: expected the width teacher_dim = 4"):
        MatryoshkaLoss(WIKDLoss(feature_weight=1), (4, 8))(image, text, 14.0, image.detach(), text.detach(), 14.0)
    with pytest.raises(ValueError, match=r"widths: expected at most the features' width, 16, got \(8, 17\)"):
        MatryoshkaLoss(loss, (8, 17))(image, text, 14.0)
