import warnings

import pytest
import torch

from simplclip.ops import checks, similarity_loss

GOOD = torch.randn(4, 8)
TEACHER = {"terms": ("relational",), "teacher_image": GOOD, "teacher_text": GOOD, "teacher_scale": 10.0}
WIDER = TEACHER | {"teacher_image": torch.randn(4, 12), "teacher_text": torch.randn(4, 12)}
BAD_CALLS = {
    "rank": (dict(image=torch.randn(4)), ValueError, r"image: expected a tensor \[N, D\], got shape \[4\]"),
    "not a tensor": (dict(text=[1.0]), TypeError, r"text: expected a tensor \[M, D\], got list"),
    "width": (dict(text=torch.randn(4, 9)), ValueError, "text: expected the width of image, 8, got 9"),
    "device": (
        dict(text=torch.randn(4, 8, device="meta")),
        ValueError,
        "text: expected the device of image, cpu, got meta",
    ),
    "dtypes": (
        dict(text=GOOD.bfloat16()),
        TypeError,
        "text: expected the dtype of image, torch.float32, got torch.bfloat16",
    ),
    "empty": (dict(image=GOOD[:0]), ValueError, r"image: expected at least one row .* got shape \[0, 8\]"),
    "integers": (dict(image=GOOD.long()), TypeError, "image: expected float32, .* got torch.int64"),
    "fewer columns": (
        dict(text=torch.randn(3, 8)),
        ValueError,
        "label_offset: expected 0 <= label_offset <= M - N = -1",
    ),
    "offset": (dict(label_offset=1), ValueError, "label_offset: expected 0 <= label_offset <= M - N = 0 .* got 1"),
    "offset type": (dict(label_offset=0.5), TypeError, "label_offset: expected an int, got float"),
    "ids length": (dict(ids=torch.arange(3)), ValueError, r"ids: expected shape \[N\] = \[4\], got \[3\]"),
    "ids dtype": (dict(ids=torch.arange(4.0)), TypeError, r"ids: expected an int64 or int32 tensor \[N\], got torch.float32"),
    "ids bool": (dict(ids=torch.ones(4, dtype=torch.bool)), TypeError, "ids: expected an int64 or int32 .* got torch.bool"),
    "text ids alone": (dict(text_ids=torch.arange(4)), ValueError, "ids: expected ids for the rows beside text_ids"),
    "scale": (dict(logit_scale=torch.ones(2)), ValueError, r"logit_scale: expected one element, got shape \[2\]"),
    "scale dtype": (
        dict(logit_scale=torch.tensor(3)),
        TypeError,
        "logit_scale: expected float32, .* got torch.int64",
    ),
    "scale float8": (
        dict(logit_scale=torch.ones((), dtype=torch.float8_e4m3fn)),
        TypeError,
        "logit_scale: expected float32, .* got torch.float8_e4m3fn",
    ),
    "terms": (dict(terms=("contrastiv",)), ValueError, "terms: expected one of 'contrastive', .* got 'contrastiv'"),
    "no terms": (dict(terms=()), ValueError, "terms: expected a tuple of at least one of"),
    "terms a number": (dict(terms=5), ValueError, "terms: expected a tuple of at least one of .* got 5"),
    "terms of numbers": (dict(terms=(5,)), ValueError, "terms: expected one of 'contrastive', .* got 5"),
    "no plane": (dict(terms=("pair_matching",)), ValueError, "plane: expected .* got NoneType"),
    "plane width": (
        dict(terms=("pair_matching",), plane=(torch.ones(5), 0.0)),
        ValueError,
        r"plane: expected w \[D\] = \[8\], got shape \[5\]",
    ),
    "negatives": (dict(negatives="some"), ValueError, "negatives: expected one of 'all', 'shift', 'hard', got 'some'"),
    "shift": (
        dict(terms=("pair_matching",), plane=(1.0, 0.0), negatives="shift", shift=4),
        ValueError,
        "shift: expected 1 <= shift < M = 4, got 4",
    ),
    **{
        f"shift {shift}": (
            dict(terms=("pair_matching",), plane=(1.0, 0.0), negatives="shift", shift=shift),
            TypeError,
            f"shift: expected an int or an int64 tensor with one element, got {shift}",
        )
        for shift in (1.5, None, True)
    },
    "plane dtype": (
        dict(terms=("pair_matching",), plane=(torch.ones(8).long(), 0.0)),
        TypeError,
        "plane's w: expected float32, .* got torch.int64",
    ),
    "teacher missing": (
        dict(terms=("relational",)),
        ValueError,
        "teacher_image: expected .* term 'relational' needs it",
    ),
    "teacher's half missing": (dict(TEACHER, teacher_text=None), ValueError, "teacher_text: expected .* got None"),
    "teacher's scale missing": (dict(TEACHER, teacher_scale=None), ValueError, "teacher_scale: expected .* got None"),
    "teacher's batch": (
        dict(TEACHER, teacher_image=torch.randn(5, 8)),
        ValueError,
        r"teacher_image: expected the 4 rows of image, got shape \[5, 8\]",
    ),
    "teacher's widths": (
        dict(TEACHER, teacher_text=torch.randn(4, 9)),
        ValueError,
        "teacher_text: expected the width of teacher_image, 8, got 9",
    ),
    "teacher's dtype": (
        dict(TEACHER, teacher_text=GOOD.int()),
        TypeError,
        "teacher_text: expected float32, .* got torch.int32",
    ),
    "teacher's device": (
        dict(TEACHER, teacher_text=torch.randn(4, 8, device="meta")),
        ValueError,
        "teacher_text: expected the device of text, cpu, got meta",
    ),
    "no projection": (
        dict(WIDER, terms=("interactive",)),
        ValueError,
        "projected_image: expected image features projected to the teacher's width, 12, since image has 8, got None",
    ),
    "projection's shape": (
        dict(WIDER, terms=("interactive",), projected_image=GOOD),
        ValueError,
        r"projected_image: expected the shape of teacher_image, \[4, 12\], got \[4, 8\]",
    ),
    "interactive": (dict(interactive="mse"), ValueError, "interactive: expected one of 'infonce', 'kl', got 'mse'"),
    "divergence": (dict(divergence="js"), ValueError, "divergence: expected one of 'kl', 'cross_entropy', got 'js'"),
    "budget": (dict(scratch_bytes=-1), ValueError, "scratch_bytes: expected a number of bytes, 0 or more, got -1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    changes, error, message = BAD_CALLS[case]
    call = {"image": GOOD, "text": GOOD, "logit_scale": 10.0, **changes}
    with pytest.raises(error, match=message):
        similarity_loss(**call)


def test_a_teacher_that_requires_a_gradient_is_warned_about_once_and_gets_none(monkeypatch):
    monkeypatch.setattr(checks, "_warned", set())
    teacher = GOOD.clone().requires_grad_()
    image = GOOD.clone().requires_grad_()
    with pytest.warns(UserWarning, match="teacher_image requires a gradient, but is a constant here and gets none"):
        loss = similarity_loss(image, GOOD, 10.0, **{**TEACHER, "teacher_image": teacher})["relational"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*requires a gradient")  # compiling warns of other things
        similarity_loss(image, GOOD, 10.0, **{**TEACHER, "teacher_image": teacher})
        torch.compiler.reset()  # other tests' compilations count towards the limit of recompilations
        compiled = torch.compile(similarity_loss, fullgraph=True)
        torch.testing.assert_close(compiled(image, GOOD, 10.0, **{**TEACHER, "teacher_image": teacher})["relational"], loss)
    loss.backward()
    assert teacher.grad is None
    assert image.grad is not None


@pytest.mark.parametrize("terms", [("contrastive",), ("pair_matching",), ("relational",), ("pair_matching", "contrastive")])
@pytest.mark.parametrize("negatives", ["all", "shift"])
def test_a_bias_that_changes_nothing_has_a_gradient_of_zero(terms, negatives):
    bias = torch.tensor(-10.0, requires_grad=True)
    options = {**TEACHER, "terms": terms, "plane": (1.0, 0.0), "negatives": negatives}
    out = similarity_loss(GOOD, GOOD, 10.0, logit_bias=bias, **options)
    sum(out.values()).backward()
    assert bias.grad is not None
    assert bias.grad == 0
    assert out == similarity_loss(GOOD, GOOD, 10.0, **options)


def test_int32_ids_are_ids():
    ids = torch.tensor([0, 0, 1, 2])
    options = {**TEACHER, "terms": ("contrastive", "relational", "interactive"), "interactive": "kl"}
    wide = similarity_loss(GOOD, GOOD.flip(0), 1.0, **options, ids=ids, text_ids=ids)
    assert wide == similarity_loss(GOOD, GOOD.flip(0), 1.0, **options, ids=ids.int(), text_ids=ids.int())
    assert wide != similarity_loss(GOOD, GOOD.flip(0), 1.0, **options)
