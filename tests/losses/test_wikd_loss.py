import plain
import pytest
import torch
import torch.nn.functional as F

from simplclip.losses import WIKDLoss

EVERYTHING = {"relational_weight": 0.8, "interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
KEYS = ["contrastive_loss", "distill_loss", "interactive_loss", "feature_loss", "pair_matching_loss"]


def batch(n=24, width=16, teacher_width=None, dtype=torch.float32, seed=0):
    """Returns the student's features as leaves, and the teacher's."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda width: F.normalize(torch.randn(n, width, generator=g), dim=1)  # noqa: E731
    image, text, teacher_image = draw(width), draw(width), draw(teacher_width or width)
    text, teacher_text = F.normalize(text + image, dim=1), F.normalize(draw(teacher_width or width) + teacher_image, dim=1)
    student = [image.to(dtype), text.to(dtype), torch.tensor(14.0)]
    return [t.requires_grad_() for t in student], [teacher_image.to(dtype), teacher_text.to(dtype), torch.tensor(20.0)]


@pytest.mark.parametrize("name", ["contrastive", "relational", "interactive", "feature", "pm"])
def test_a_term_of_weight_0_is_not_computed(name):
    off = {"contrastive_weight": 1.0, **EVERYTHING, f"{name}_weight": 0.0}
    student, teacher = batch()
    left = WIKDLoss(**off)(*student, *teacher, output_dict=True)
    key = {"relational": "distill_loss", "pm": "pair_matching_loss"}.get(name, f"{name}_loss")
    assert list(left) == [k for k in KEYS if k != key]
    everything = WIKDLoss(**{**off, f"{name}_weight": 1.0})(*student, *teacher, output_dict=True)
    torch.testing.assert_close(left, {k: everything[k] for k in left})


@pytest.mark.parametrize("teacher_width", [16, 20])
@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
@pytest.mark.parametrize("interactive", ["infonce", "kl"])
def test_the_interactive_term_is_its_definition(interactive, divergence, teacher_width):
    """With ids, and of projected features where the teacher has another width. Also by `terms`, beside every other term."""
    options = {"interactive": interactive, "divergence": divergence, "embed_dim": 16, "teacher_dim": teacher_width}
    loss = WIKDLoss(**EVERYTHING, **options).double()
    student, teacher = batch(teacher_width=teacher_width)
    leaves = [t.detach().double().requires_grad_() for t in student]
    image, text, scale = leaves
    teacher, ids = [t.double() for t in teacher], torch.arange(len(image)) // 2
    projected = image, text
    if teacher_width != 16:
        leaves += loss.image_projection, loss.text_projection
        projected = [F.normalize(t @ p.T, dim=1) for t, p in zip(projected, leaves[3:])]
    expected = plain.interactive(*projected, scale, *teacher, form=interactive, divergence=divergence, ids=ids)
    weights = dict.fromkeys(("sigmoid", "interactive", "relational", "contrastive", "pair_matching", "feature"), 0.0)
    total, terms = loss.terms(image, text, scale, weights=weights | {"interactive": 0.6}, ids=ids, teacher=tuple(teacher))
    assert terms.keys() == weights.keys()
    for got in (loss(image, text, scale, *teacher, output_dict=True, ids=ids)["interactive_loss"], total):
        torch.testing.assert_close(got, 0.6 * expected)
        pair = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (got, 0.6 * expected))
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-10)


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
    wide = wide_image, wide_text, wide_scale
    narrow = (student[0], student[1][:, 1:], student[2])
    of_16, of_20 = {"embed_dim": 16}, {"embed_dim": 16, "teacher_dim": 20}
    for options, given, message in (
        ({}, (*student, image[1:], text, scale), r"teacher_image: expected the 24 rows of image, got shape \[23, 16\]"),
        ({}, (*student, image, None, scale), "teacher_text: expected a value, since .* 'relational' needs it, got None"),
        ({"interactive_weight": 1.0}, (*student, *wide), r"dist_image_features: .* teacher_dim = 16, got shape \[24, 20\]"),
        ({"feature_weight": 1.0}, (*student, *wide), r"dist_image_features: .* teacher_dim = 16, got shape \[24, 20\]"),
        ({"embed_dim": 12}, (*student, *wide), r"image_features: expected the width embed_dim = 12, got shape \[24, 16\]"),
        (of_16, (*narrow, *wide), r"text_features: expected the width embed_dim = 16, got shape \[24, 15\]"),
        (
            {**of_20, "teacher_dim": 24, "feature_weight": 1.0}, (*student, *wide),
            r"dist_image_features: expected the width teacher_dim = 24, got shape \[24, 20\]",
        ),
        (
            {**of_20, "interactive_weight": 1, "relational_weight": 0}, (*student, wide_image, wide_text[:, 1:], wide_scale),
            r"dist_text_features: expected the width teacher_dim = 20, got shape \[24, 19\]",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            WIKDLoss(**options)(*given)
    with pytest.raises(ValueError, match="teacher: expected features and scale for the terms 'interactive' and 'feature'"):
        WIKDLoss().terms(*student, weights={"interactive": 1.0})
    WIKDLoss()(*student, *wide)  # the relational term compares similarities, so that widths may differ


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
