"""WIKDLoss: weights of 0, half types, rows of zeros, widths that do not fit.

Values: test_losses.py and test_drop_in.py.
"""

import pytest
import torch

from simplclip.common.terms import TERMS
from simplclip.losses import MatryoshkaLoss, WIKDLoss
from support.losses import loss_inputs

OF_WIKD = [term for term in TERMS if term.name != "sigmoid"]
EVERYTHING = {term.weight: 0.5 + 0.1 * i for i, term in enumerate(OF_WIKD)}


def batch(teacher_width=None, dtype=torch.float32):
    student, teacher = loss_inputs(teacher_width=teacher_width, dtype=dtype)
    return student[:3], teacher


@pytest.mark.parametrize("term", OF_WIKD, ids=lambda term: term.name)
def test_a_term_of_weight_0_is_not_computed(term):
    student, teacher = batch()
    left = WIKDLoss(**EVERYTHING | {term.weight: 0.0})(*student, *teacher, output_dict=True)
    assert list(left) == [other.key for other in OF_WIKD if other is not term]
    everything = WIKDLoss(**EVERYTHING)(*student, *teacher, output_dict=True)
    torch.testing.assert_close(left, {key: everything[key] for key in left})


def test_teachers_and_widths_that_do_not_fit():
    student, (image, text, scale) = batch()
    wide = batch(teacher_width=20)[1]
    image_20, text_20, scale_20 = wide
    narrow = (student[0], student[1][:, 1:], student[2])
    interactive = {"contrastive_weight": 0, "relational_weight": 0, "interactive_weight": 1}
    projecting = {"embed_dim": 16, "teacher_dim": 20, "interactive_weight": 1}
    unprojected = "expected the width 16 of image_features, without a projection"
    no_projection = rf"{unprojected} .*, got shape \[24, 20\]"
    rows = r"dist_image_features: expected the 24 rows of image_features, got shape \[23, 16\]"
    for options, features, teacher, message in (
        ({}, student, (image[1:], text, scale), rows),
        (interactive, student, (image[1:], text, scale), rows),
        ({}, student, (image, None, scale), "dist_text_features: .* 'relational' needs it, got"),
        ({"interactive_weight": 1.0}, student, wide, no_projection),
        ({"feature_weight": 1.0}, student, wide, no_projection),
        (interactive, student, (None, text, scale), "dist_image_features: .* term 'interactive'"),
        (interactive, student, (image.numpy(), text, scale), "a tensor .* got ndarray"),
        (interactive, student, (image.int(), text, scale), "expected float32, .* got torch.int32"),
        ({"embed_dim": 12}, student, wide, r"^image_features: .* = 12, got shape \[24, 16\]"),
        ({"embed_dim": 16}, narrow, wide, r"^text_features: .* of image_features, 16, got 15"),
        (projecting | {"teacher_dim": 24}, student, wide, r"teacher_dim = 24, got .*24, 20\]"),
        (projecting, student, (image_20, text_20[:, 1:], scale_20), "dist_text.* 20, got 19"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            WIKDLoss(**options)(*features, *teacher)
    for teacher in ({}, {"teacher": (image, text)}):
        with pytest.raises(
            ValueError, match="teacher: expected .*, since the term 'interactive' needs it, got"
        ):
            WIKDLoss().terms(*student, weights={"interactive": 1.0}, **teacher)
    with pytest.raises(ValueError, match=f"{unprojected} .* above 0"):
        WIKDLoss(embed_dim=16, teacher_dim=20).terms(
            *student, weights={"feature": 1.0}, teacher=wide
        )
    # the relational term compares similarities, so that widths may differ
    WIKDLoss()(*student, *wide)
    WIKDLoss(**interactive)(*student, image, text, None)  # of a scale that no term needs


def test_prefixes_need_a_projection():
    student, teacher = batch()
    for options in (
        {"interactive_weight": 1, "embed_dim": 16, "teacher_dim": 16},
        {"feature_weight": 1},
    ):
        with pytest.raises(
            ValueError,
            match="expected the width 8 of a prefix of image_features, without a projection",
        ):
            MatryoshkaLoss(WIKDLoss(**options), (8, 16))(*student, *teacher)


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
    """Values and gradients are float32's; those beyond float16's largest number become that."""
    torch.manual_seed(0)
    options = dict(EVERYTHING, interactive=interactive, embed_dim=16, teacher_dim=teacher_width)
    loss, expected = WIKDLoss(**options), WIKDLoss(**options)
    loss = loss if autocast else loss.half()
    expected.load_state_dict(loss.state_dict())
    student, teacher = batch(teacher_width=teacher_width, dtype=dtype)
    with torch.no_grad():
        student[0][3] = 0
    wide = [t.detach().float().requires_grad_() for t in student]
    in_float32 = expected(*wide, *(t.float() for t in teacher), output_dict=True)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        named = loss(*student, *teacher, output_dict=True)
    torch.testing.assert_close(named, in_float32, rtol=1e-2, atol=2e-3)
    sum(named.values()).backward()
    sum(in_float32.values()).backward()
    most = torch.finfo(dtype).max
    for half, exact in zip((*student, *loss.parameters()), (*wide, *expected.parameters())):
        assert half.grad.isfinite().all()
        torch.testing.assert_close(
            half.grad.float(), exact.grad.clamp(-most, most), rtol=2e-2, atol=4e-3
        )
    assert autocast or wide[0].grad[3].abs().max() > most
