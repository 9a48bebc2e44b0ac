"""The losses against their definitions in float64, and the errors of all losses."""

import itertools
import math

import pytest
import torch

from simplclip import losses
from simplclip.losses import ClipLoss, ClipPMLoss, CoCaLoss, MatryoshkaLoss, SigLipLoss, WIKDLoss
from support.losses import loss_inputs
from support.ops import plain

TERMS = {
    ClipPMLoss: ("contrastive", "pair_matching"),
    SigLipLoss: ("sigmoid", "pair_matching"),
    WIKDLoss: ("contrastive", "relational", "interactive", "feature", "pair_matching"),
}
KEYS = {"sigmoid": "contrastive_loss", "relational": "distill_loss"}
WEIGHTS = {"relational": 0.8, "interactive": 0.6, "feature": 0.4, "pair_matching": 0.5}
EVERY_TERM = {f"{term}_weight": WEIGHTS[term] for term in ("relational", "interactive", "feature")}
EVERY_TERM |= {"pm_weight": 0.5, "embed_dim": 16}
CASES = [
    (ClipPMLoss, {"pm_weight": 0.5}),
    (SigLipLoss, {"pm_weight": 0.5}),
]
for values in itertools.product(("infonce", "kl"), ("kl", "cross_entropy"), (16, 20)):
    options = dict(zip(("interactive", "divergence", "teacher_dim"), values))
    CASES.append((WIKDLoss, EVERY_TERM | options))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_terms_equal_the_definition(kind, options):
    """Values and gradients, with ids: of the dict, of the tuple or sum, and of `terms`."""
    loss, ids = kind(**options).double(), torch.arange(24) // 2
    (image, text, scale, bias), teacher = loss_inputs(teacher_width=options.get("teacher_dim"))
    distils = kind is WIKDLoss
    arguments = [image, text, scale, *(teacher if distils else [bias])]
    leaves = [image, text, scale, *([] if distils else [bias]), *loss.parameters()]
    given = {"teacher": teacher} if distils else {"bias": bias}
    exact = plain.loss_terms(loss, TERMS[kind], image, text, scale, ids=ids, **given)

    def same(value, expected):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
        pair = (
            torch.autograd.grad(v, leaves, retain_graph=True, materialize_grads=True)
            for v in (value, expected)
        )
        torch.testing.assert_close(*pair, rtol=1e-7, atol=1e-10)

    weighted = {
        KEYS.get(term, f"{term}_loss"): WEIGHTS.get(term, 1) * exact[term] for term in TERMS[kind]
    }
    named = loss(*arguments, output_dict=True, ids=ids)
    assert list(named) == list(weighted)
    for key, expected in weighted.items():
        same(named[key], expected)
    values = loss(*arguments, ids=ids)
    if distils:
        for value, expected in zip(values, weighted.values(), strict=True):
            same(value, expected)
    else:
        same(values, sum(weighted.values()))

    weights = {term: 0.3 * place for place, term in enumerate(TERMS[kind])}
    extra = {"teacher": tuple(teacher)} if distils else {"logit_bias": bias}
    total, terms = loss.terms(image, text, scale, weights=weights, ids=ids, **extra)
    same(total, sum(weight * exact[term] for term, weight in weights.items()))
    assert not any(value.requires_grad for value in terms.values())
    torch.testing.assert_close(
        terms, {term: (weight * exact[term]).detach() for term, weight in weights.items()}
    )


COCA = {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0}


# a loss, its arguments, and what is expected of the last one, or, where it contains a colon, the
# whole message
@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (ClipPMLoss, {"pm_weight": -1}, "a weight of 0 or more, got -1"),
        (ClipPMLoss, {"pm_weight": math.inf}, "a finite number, got inf"),
        (WIKDLoss, {"embed_dim": -2}, "an integer of at least 1, got -2"),
        (WIKDLoss, {"embed_dim": 16.0}, "an integer of at least 1, got 16.0"),
        (ClipPMLoss, {"plane": "scalar"}, "ClipPMLoss: expected arguments .*, got plane; "),
        (ClipPMLoss, {"world_size": 2, "use_horovod": True}, "False"),
        (SigLipLoss, {"dist_impl": "ring"}, "one of 'bidir', 'shift', .*, got 'ring'"),
        (SigLipLoss, {"chunk_size": -1}, "an integer of at least 0, got -1"),
        (CoCaLoss, {"clip_loss_weight": 1.0, "caption_loss_weight": "2"}, "a number, got str"),
        (ClipLoss, {"label_smoothing": 0.1}, "ClipLoss: .*, got label_smoothing; docs/recipes.md"),
        (SigLipLoss, {"positives": 2, "margin": 1}, "SigLipLoss: .*, got positives, margin; "),
        (ClipPMLoss, {"local_loss": 0.5}, "a bool, got float"),
        (ClipLoss, {"gather_with_grad": "yes"}, "a bool, got str"),
        (ClipLoss, {"cache_labels": 1}, "a bool, got int"),
        (ClipLoss, {"use_horovod": "no"}, "a bool, got str"),
        (SigLipLoss, {"local_loss": True}, "SigLipLoss: expected arguments .*, got local_loss; "),
        (SigLipLoss, {"use_horovod": True}, "SigLipLoss: expected arguments .*, got use_horovod; "),
        (ClipLoss, {"world_size": 2, "rank": 3}, "less than world_size = 2, got 3"),
        (ClipLoss, {"rank": 1}, "less than world_size = 1, got 1"),
        (SigLipLoss, {"rank": -1}, "an integer of at least 0, got -1"),
        (WIKDLoss, {"world_size": "2"}, "an integer of at least 0, got '2'"),
        (CoCaLoss, COCA | {"pad_id": "a"}, "an integer, got str"),
        (MatryoshkaLoss, {"widths": (4,), "loss": math.exp}, "an nn.Module, got builtin_function"),
        (WIKDLoss, {"contrastive_weight": math.nan}, "a finite number, got nan"),
        (
            WIKDLoss,
            {"contrastive_weight": 0, "relational_weight": 0},
            "contrastive_weight and the other weights: expected",
        ),
        (WIKDLoss, {"embed_dim": 16, "teacher_dim": -1}, "an integer of at least 1, got -1"),
        (WIKDLoss, {"interactive": "mse"}, "one of 'infonce', 'kl', got 'mse'"),
        (WIKDLoss, {"divergence": "js"}, "one of 'kl', 'cross_entropy', got 'js'"),
        (WIKDLoss, {"teacher_dim": 20, "feature_weight": 1}, "embed_dim: expected the width D"),
        (WIKDLoss, {"pm_weight": torch.tensor(1.0)}, "a number, got Tensor"),
        *(
            (WIKDLoss, {"pm_weight": v}, f"a number, got {type(v).__name__}")
            for v in (None, "1", True)
        ),
    ],
)
def test_bad_arguments(cls, arguments, message):
    if ": " not in message:
        message = f"{list(arguments)[-1]}: expected {message}"
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**arguments)


TOKENS = torch.randn(4, 3, 5), torch.ones(4, 3, dtype=torch.int64)
coca = CoCaLoss(**COCA)


@pytest.mark.parametrize(
    "call",
    [
        ClipLoss(),
        SigLipLoss(),
        ClipPMLoss(),
        lambda image, text, scale: coca(image, text, *TOKENS, scale),
        lambda *features: WIKDLoss(interactive_weight=1, relational_weight=0)(*features, *features),
        lambda *features: ClipLoss().terms(*features, weights={"contrastive": 1.0}),
    ],
    ids=("ClipLoss", "SigLipLoss", "ClipPMLoss", "CoCaLoss", "WIKDLoss", "terms"),
)
def test_features_that_do_not_fit_each_other(call):
    """With several texts an image, image 1 would get image 0's text."""
    image, text = torch.randn(4, 8), torch.randn(8, 8)
    several = (
        r"got shape \[8, 8\]; with k captions an image, "
        r"pass image_features.repeat_interleave\(k, 0\), and ids equal"
    )
    for features, message in (
        ((image, text), f"the 4 rows of image_features, {several}"),
        ((text, image), r"the 8 rows of image_features, got shape \[4, 8\]$"),
        ((image, image.double()), "the dtype of image_features, torch.float32, got torch.float64"),
        ((image, image[:, :7]), "the width of image_features, 8, got 7"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"text_features: expected {message}"):
            call(*features, 10.0)


LOGITS, LABELS = TOKENS
OF_LABELS = r"labels: expected an int64 tensor \[N, L\], got NoneType"
SHORT = r"labels: .* of logits \[4, 3, 5\], got shape \[4, 2\]"
MATRIX = r"logits: expected a tensor \[N, L, V\], got shape \[3, 5\]"
NO_MAPPING = "weights: expected a mapping of terms to numbers, got list"
NO_TENSOR = r"image_features: expected a tensor \[N, D\], got NoneType"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: coca(x, x, None, LABELS, s), "logits: expected a tensor"),
        (lambda x, s: coca(x, x, LOGITS[0], LABELS, s), MATRIX),
        (lambda x, s: coca(x, x, LOGITS, None, s), OF_LABELS),
        (lambda x, s: coca(x, x, LOGITS, LABELS.float(), s), "labels: .* int64, got torch.float32"),
        (lambda x, s: coca(x, x, LOGITS, LABELS[:, :2], s), SHORT),
        (lambda x, s: ClipLoss().terms(x, x, s, weights=[1.0]), NO_MAPPING),
        (lambda x, s: MatryoshkaLoss(ClipLoss(), (4,))(None, x, s), NO_TENSOR),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(4, 8), 10.0)


def test_a_loss_without_a_plane_or_a_process_group():
    (image, text, scale, _), _ = loss_inputs(4)
    with pytest.raises(ValueError, match="plane: expected "):
        ClipLoss().terms(image, text, scale, weights={"pair_matching": 1.0})
    with pytest.raises(
        RuntimeError, match="world_size: expected a process group of 2 ranks, got no process group"
    ):
        ClipPMLoss(world_size=2)(image, text, scale)


@pytest.mark.parametrize("kind", [ClipLoss, WIKDLoss])
def test_terms_need_a_weight(kind):
    (image, text, scale, _), _ = loss_inputs(4)
    with pytest.raises(ValueError, match="weights: expected a weight of at least one .* got none"):
        kind().terms(image, text, scale, weights={})


@pytest.mark.parametrize("term", ["contrastive", "interactive", "feature"])
@pytest.mark.parametrize(
    ("weight", "error", "got"),
    [(float("nan"), ValueError, "a finite number, got nan"), ("1", TypeError, "a number, got str")],
)
def test_weights_of_terms_are_finite_numbers(term, weight, error, got):
    (image, text, scale, _), teacher = loss_inputs(4)
    with pytest.raises(error, match=rf"weights\['{term}'\]: expected {got}"):
        WIKDLoss().terms(image, text, scale, weights={term: weight}, teacher=teacher)


def test_the_module_lists_its_losses():
    assert set(losses.__all__) <= set(dir(losses))
    assert all(hasattr(losses, name) for name in losses.__all__)
