import pytest
import torch

from simplclip.ops import similarity_loss

GOOD = torch.randn(4, 8)
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
    "ids dtype": (dict(ids=torch.arange(4.0)), TypeError, r"ids: expected an int64 tensor \[N\], got torch.float32"),
    "text ids alone": (dict(text_ids=torch.arange(4)), ValueError, "ids: expected ids for the rows beside text_ids"),
    "scale": (dict(logit_scale=torch.ones(2)), ValueError, r"logit_scale: expected one element, got shape \[2\]"),
    "scale dtype": (
        dict(logit_scale=torch.tensor(3)),
        TypeError,
        "logit_scale: expected a floating dtype, got torch.int64",
    ),
    "terms": (dict(terms=("contrastiv",)), ValueError, "terms: expected one of 'contrastive', .* got 'contrastiv'"),
    "no terms": (dict(terms=()), ValueError, "terms: expected a tuple of at least one of"),
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
    "budget": (dict(scratch_bytes=-1), ValueError, "scratch_bytes: expected a number of bytes, 0 or more, got -1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    changes, error, message = BAD_CALLS[case]
    call = {"image": GOOD, "text": GOOD, "logit_scale": 10.0, **changes}
    with pytest.raises(error, match=message):
        similarity_loss(**call)
