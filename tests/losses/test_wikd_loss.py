import plain
import pytest
import torch
import torch.nn.functional as F
from calls import make_inputs

from simplclip.losses import WIKDLoss

EVERYTHING = {"relational_weight": 0.8, "interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
KEYS = ["contrastive_loss", "distill_loss", "interactive_loss", "feature_loss", "pair_matching_loss"]


def batch(n=24, width=16, teacher_width=None, dtype=torch.float32, seed=0):
    """Returns the student's features as leaves, and the teacher's."""
    terms = ("relational", "interactive")
    leaves, _ = make_inputs(n, n, terms=terms, width=width, teacher_width=teacher_width, seed=seed)
    student = [leaves[k].to(dtype if k != "logit_scale" else torch.float32) for k in ("image", "text", "logit_scale")]
    teacher = [leaves[k].to(dtype if "scale" not in k else torch.float32) for k in leaves if k.startswith("teacher")]
    return [t.clone().requires_grad_() for t in student], teacher


def feature_distance(student, teacher):
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(1).mean()


@pytest.mark.parametrize("name", ["contrastive", "relational", "interactive", "feature", "pm"])
def test_a_term_of_weight_0_is_not_computed(name):
    off = {"contrastive_weight": 1.0, **EVERYTHING, f"{name}_weight": 0.0}
    student, teacher = batch()
    left = WIKDLoss(**off)(*student, *teacher, output_dict=True)
    key = {"relational": "distill_loss", "pm": "pair_matching_loss"}.get(name, f"{name}_loss")
    assert list(left) == [k for k in KEYS if k != key]
    everything = WIKDLoss(**{**off, f"{name}_weight": 1.0})(*student, *teacher, output_dict=True)
    torch.testing.assert_close(left, {k: everything[k] for k in left})


def test_several_teachers_are_averaged_after_the_softmax():
    student, first = batch()
    _, second = batch(teacher_width=20, seed=1)
    image, text, scale = student
    softmaxes = [s * (a @ b.T) for a, b, s in (first, second)]
    logits = scale * (image @ text.T)
    by_row = sum(t.softmax(1) for t in softmaxes) / 2
    by_column = sum(t.T.softmax(1) for t in softmaxes) / 2
    expected = (F.cross_entropy(logits, by_row) + F.cross_entropy(logits.T, by_column)) / 2
    wanted = torch.autograd.grad(expected, student)

    loss = WIKDLoss(contrastive_weight=0.5, feature_weight=1.0, interactive_weight=1.0, embed_dim=16, teacher_dim=(16, 20))
    named = loss(*student, *zip(first, second), output_dict=True)
    torch.testing.assert_close(named["distill_loss"], expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(named["distill_loss"], student, retain_graph=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        named["contrastive_loss"], 0.5 * plain.similarity_loss(*student, terms=("contrastive",))["contrastive"]
    )
    projected = [p @ w.T for p, w in zip((image, text), (loss.image_projections[1], loss.text_projections[1]))]
    feature = [feature_distance(s, t) for s, t in zip((image, text, *projected), (*first[:2], *second[:2]))]
    torch.testing.assert_close(named["feature_loss"], sum(feature) / 4, rtol=1e-4, atol=1e-6)
    sum(named.values()).backward()
    assert all(p.grad is not None for p in loss.parameters() if p.numel())


def test_autocast():
    loss = WIKDLoss(**EVERYTHING, embed_dim=16, teacher_dim=20)
    student, teacher = batch(teacher_width=20)
    expected = loss(*student, *teacher, output_dict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(*student, *(t.half() if t.dim() else t for t in teacher), output_dict=True)
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)  # compares dtypes as well: float32
    sum(got.values()).backward()
    assert all(p.grad.dtype == p.dtype for p in (*student, *loss.parameters()))


def test_teachers_and_widths_that_do_not_fit():
    student, teacher = batch()
    (image, text, scale), (wide_image, wide_text, wide_scale) = teacher, batch(teacher_width=20)[1]
    wide, two = (wide_image, wide_text, wide_scale), [(t, t) for t in (wide_image, wide_text, wide_scale)]
    narrow = (student[0], student[1][:, 1:], student[2])
    of_16, of_20 = {"embed_dim": 16}, {"embed_dim": 16, "teacher_dim": 20}
    for options, given, message in (
        ({}, (*student, (image,) * 2, text, scale), "dist_text_features: expected one for each of 2 teachers, got Tensor"),
        ({}, (*student, image[1:], text, scale), r"teacher_image: expected the 24 rows of image, got shape \[23, 16\]"),
        ({}, (*student, image, None, scale), "teacher_text: expected a value, since .* 'relational' needs it, got None"),
        ({"interactive_weight": 1.0}, (*student, *wide), "teacher_dim: expected 20, the width of dist_image_features, since"),
        ({"feature_weight": 1.0}, (*student, *wide), "teacher_dim: expected 20, the width of dist_image_features, since"),
        ({"embed_dim": 12}, (*student, *wide), r"image_features: expected the width embed_dim = 12, got shape \[24, 16\]"),
        (of_16, (*narrow, *wide), r"text_features: expected the width embed_dim = 16, got shape \[24, 15\]"),
        (
            {**of_20, "teacher_dim": 24, "feature_weight": 1.0}, (*student, *wide),
            r"dist_image_features: expected the width teacher_dim = 24, got shape \[24, 20\]",
        ),
        (
            of_20, (*student, wide_image, wide_text[:, 1:], wide_scale),
            r"dist_text_features: expected the width teacher_dim = 20, got shape \[24, 19\]",
        ),
        (of_20, (*student, *two), r"teacher_dim: expected one width for each of 2 teachers, got \(20,\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            WIKDLoss(**options)(*given)
    WIKDLoss()(*student, *wide)  # the relational term compares similarities, so that widths may differ


@pytest.mark.parametrize("term", ["interactive_weight", "feature_weight"])
def test_projections_of_another_dtype_need_autocast(term):
    loss = WIKDLoss(**{term: 1.0}, embed_dim=16, teacher_dim=20)
    student, teacher = batch(teacher_width=20, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="image_features: expected the dtype of image_projections, torch.float32"):
        loss(*student, *teacher)
    loss.text_projections.double()
    with pytest.raises(TypeError, match="text_features: expected the dtype of text_projections, torch.float64"):
        loss(*batch(teacher_width=20)[0], *teacher)
    loss.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(sum(loss(*student, *teacher)))


@pytest.mark.parametrize("teacher_width", [16, 20])
@pytest.mark.parametrize(
    ("interactive", "dtype", "autocast"),
    [
        ("infonce", torch.float16, False),
        ("kl", torch.float16, False),
        ("infonce", torch.float16, True),
        ("infonce", torch.float32, True),
    ],
)
def test_a_row_of_zeros_in_float16(interactive, dtype, autocast, teacher_width):
    """Values and gradients are those of float32; a gradient beyond float16's largest number becomes that number."""
    torch.manual_seed(0)
    options = dict(EVERYTHING, interactive=interactive, embed_dim=16, teacher_dim=teacher_width)
    loss, expected = WIKDLoss(**options), WIKDLoss(**options)
    loss = loss if autocast else loss.half()
    expected.load_state_dict(loss.state_dict())
    student, teacher = batch(teacher_width=teacher_width, dtype=dtype)
    with torch.no_grad():
        student[0][3] = 0
    wide = [t.detach().float().requires_grad_() for t in student]
    wanted = expected(*wide, *(t.float() for t in teacher), output_dict=True)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        named = loss(*student, *teacher, output_dict=True)
    torch.testing.assert_close(named, wanted, rtol=1e-2, atol=2e-3)
    sum(named.values()).backward()
    sum(wanted.values()).backward()
    most = torch.finfo(dtype).max
    for ours, theirs in zip((*student, *loss.parameters()), (*wide, *expected.parameters())):
        assert ours.grad.isfinite().all()
        torch.testing.assert_close(ours.grad.float(), theirs.grad.clamp(-most, most), rtol=2e-2, atol=4e-3)
    assert autocast or wide[0].grad[3].abs().max() > most
