import pytest
import torch

from simplclip.losses import WIKDLoss
from simplclip.selftest.calls import make_inputs

EVERYTHING = {"relational_weight": 0.8, "interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
KEYS = ["contrastive_loss", "distill_loss", "interactive_loss", "feature_loss", "pair_matching_loss"]


def batch(n=24, width=16, teacher_width=None, dtype=torch.float32, seed=0):
    """Student (leaves), teacher."""
    terms = ("relational", "interactive")
    leaves, _ = make_inputs(n, n, terms=terms, width=width, teacher_width=teacher_width, seed=seed)
    student = [leaves[k].to(dtype if k != "logit_scale" else torch.float32) for k in ("image", "text", "logit_scale")]
    teacher = [leaves[k].to(dtype if "scale" not in k else torch.float32) for k in leaves if k.startswith("teacher")]
    return [t.clone().requires_grad_() for t in student], teacher


@pytest.mark.parametrize("name", ["contrastive", "relational", "interactive", "feature", "pm"])
def test_a_term_of_weight_0_is_not_computed(name):
    off = {"contrastive_weight": 1.0, **EVERYTHING, f"{name}_weight": 0.0}
    student, teacher = batch()
    left = WIKDLoss(**off)(*student, *teacher, output_dict=True)
    key = {"relational": "distill_loss", "pm": "pair_matching_loss"}.get(name, f"{name}_loss")
    assert list(left) == [k for k in KEYS if k != key]
    everything = WIKDLoss(**{**off, f"{name}_weight": 1.0})(*student, *teacher, output_dict=True)
    torch.testing.assert_close(left, {k: everything[k] for k in left})


def test_a_state_of_several_teachers_names_is_loaded():
    options = {"feature_weight": 1.0, "embed_dim": 16, "teacher_dim": 20}
    loss, other = WIKDLoss(**options), WIKDLoss(**options)
    assert loss.state_dict().keys() == {"image_projection", "text_projection"}
    other.load_state_dict({name.replace("projection", "projections.0"): t for name, t in loss.state_dict().items()})
    torch.testing.assert_close(other.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_autocast():
    loss = WIKDLoss(**EVERYTHING, embed_dim=16, teacher_dim=20)
    student, teacher = batch(teacher_width=20)
    expected = loss(*student, *teacher, output_dict=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(*student, *(t.half() if t.dim() else t for t in teacher), output_dict=True)
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)  # dtypes too: float32
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
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            WIKDLoss(**options)(*given)
    WIKDLoss()(*student, *wide)  # the relational term compares similarities


@pytest.mark.parametrize("term", ["interactive_weight", "feature_weight"])
def test_projections_of_another_dtype_need_autocast(term):
    loss = WIKDLoss(**{term: 1.0}, embed_dim=16, teacher_dim=20)
    student, teacher = batch(teacher_width=20, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="image_features: expected the dtype of image_projection, torch.float32"):
        loss(*student, *teacher)
    loss.text_projection.data = loss.text_projection.double()
    with pytest.raises(TypeError, match="text_features: expected the dtype of text_projection, torch.float64"):
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
    """Values and gradients of float32, from the same numbers; a gradient past the largest that float16 has is that."""
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
