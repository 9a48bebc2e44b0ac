"""The losses in the place of open_clip's losses, also of subclasses of those."""

import inspect

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from simplclip import losses
from simplclip.selftest.calls import TEACHER
from support.losses import loss_inputs
from support.ops import plain
from support.ops.calls import recorded_calls

N, VOCABULARY = 12, 9


def features():
    return loss_inputs(N, dtype=torch.float32)[0]


def tokens():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(N, 5, VOCABULARY, generator=g)
    return logits, torch.randint(0, VOCABULARY, (N, 5), generator=g)


def of_images(loss, image, text, scale, bias, **options):
    return loss(image, text, scale, **options)


def with_bias(loss, *leaves, **options):
    return loss(*leaves, **options)


def without_bias(loss, image, text, scale, bias, **options):
    return loss(image, text, scale, None, **options)


def of_captions(loss, image, text, scale, bias, **options):
    return loss(image, text, *tokens(), scale, **options)


def with_teacher(loss, image, text, scale, bias, **options):
    teacher = text.detach(), image.detach().roll(1, 0), torch.tensor(20.0)
    return loss(image, text, scale, *teacher, **options)


COCA = {"caption_loss_weight": 2.0, "clip_loss_weight": 0.7}
# open_clip's class, this library's class, options of both, options of the latter, and the call.
CASES = [
    ("ClipLoss", "ClipLoss", {}, {}, of_images),
    ("ClipLoss", "ClipLoss", {}, {}, with_bias),
    ("ClipLoss", "ClipPMLoss", {}, {"pm_weight": 0}, of_images),
    ("ClipLoss", "ClipPMLoss", {}, {"pm_weight": 0}, with_bias),
    ("DistillClipLoss", "WIKDLoss", {}, {}, with_teacher),
    ("SigLipLoss", "SigLipLoss", {}, {}, with_bias),
    ("SigLipLoss", "SigLipLoss", {}, {}, without_bias),
    ("CoCaLoss", "CoCaLoss", COCA, {}, of_captions),
    ("CoCaLoss", "CoCaLoss", COCA | {"clip_loss_weight": 0.0, "pad_id": 3}, {}, of_captions),
]


@pytest.mark.parametrize(("original", "replacement", "options", "more", "call"), CASES)
def test_signature_values_and_gradients_are_open_clips(original, replacement, options, more, call):
    classes = getattr(open_clip.loss, original), getattr(losses, replacement)
    assert issubclass(classes[1], classes[0]) == (replacement == original)
    for method in ("__init__", "forward"):
        expected, parameters = (
            inspect.signature(getattr(cls, method)).parameters for cls in classes
        )
        assert list(parameters)[: len(expected)] == list(expected)
        if method == "__init__":
            assert [p.default for p in parameters.values()][: len(expected)] == [
                p.default for p in expected.values()
            ]
    results, names = [], []
    for cls, given in zip(classes, (options, options | more)):
        leaves, loss = features(), cls(**given)
        named, value = call(loss, *leaves, output_dict=True), call(loss, *leaves)
        values = value if isinstance(value, tuple) else (value,)
        assert list(loss.parameters()) == []
        total = sum(weight * v for weight, v in zip((1, 2), values))
        if total.requires_grad:
            total.backward()
        names.append(list(named))
        results.append((*named.values(), *values, *(t.grad for t in leaves)))
    assert names[0] == names[1]
    for expected, result in zip(*results, strict=True):
        if expected is None:
            # a bias gets a gradient of 0, as DistributedDataParallel needs
            assert result is None or not result.any()
        else:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


class DRClipLoss(losses.ClipLoss):
    """A loss of the form of MobileCLIP's, by the base class's logits and ground truth."""

    def forward(self, image, text, scale, teacher_image, teacher_text, teacher_scale):
        student = self.get_logits(image, text, scale)
        teacher = self.get_logits(teacher_image, teacher_text, teacher_scale)
        labels = self.get_ground_truth(image.device, student[0].shape[0])
        contrastive = sum(F.cross_entropy(logits, labels) for logits in student) / 2
        pairs = zip(student, teacher)
        kl = [F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean") for s, t in pairs]
        return contrastive, sum(kl) / 2


def test_a_loss_that_needs_the_logits():
    image, text, scale, _ = features()
    result = DRClipLoss()(image, text, scale, text.detach(), image.detach(), torch.tensor(20.0))
    teacher = dict(zip(TEACHER, (text.detach(), image.detach(), torch.tensor(20.0))))
    terms = ("contrastive", "relational")
    expected = plain.similarity_loss(image, text, scale, terms=terms, **teacher)
    torch.testing.assert_close(result, tuple(expected.values()))


@pytest.mark.parametrize("loss", [losses.ClipLoss, losses.CoCaLoss, losses.SigLipLoss])
@pytest.mark.parametrize("name", ["get_logits", "get_ground_truth"])
def test_a_method_that_forward_does_not_call_is_not_left_out_silently(loss, name):
    method = {name: lambda self, *args: None}
    with pytest.raises(TypeError, match=f"Own: expected a forward beside {name}, .* got none"):
        type("Own", (loss,), method)
    with_forward = type("Own", (loss,), method | {"forward": lambda self: None})
    type("Child", (with_forward,), method)


def test_arguments_of_open_clip_4_are_taken():
    """chunk_size, by which open_clip saves memory, changes nothing; world_size=0 is one process."""
    leaves = features()
    loss = losses.SigLipLoss(False, 0, 1, None, 32)
    assert loss.chunk_size == 32
    torch.testing.assert_close(loss(*leaves), losses.SigLipLoss()(*leaves), rtol=0, atol=0)
    # the method that open_clip's tests call
    torch.testing.assert_close(loss._loss(*leaves), losses.SigLipLoss()(*leaves))
    for make in (losses.ClipLoss, losses.ClipPMLoss, losses.SigLipLoss):
        torch.testing.assert_close(make(world_size=0)(*leaves), make()(*leaves), rtol=0, atol=0)


@pytest.mark.parametrize(
    "frozen", [(), ("image",), ("text",), ("image", "text"), ("image", "text", "scale", "bias")]
)
def test_frozen_features_cost_no_product(frozen, monkeypatch):
    leaves, swept = features(), recorded_calls(monkeypatch)
    for name, t in zip(("image", "text", "scale", "bias"), leaves):
        t.requires_grad_(name not in frozen)
    loss = losses.SigLipLoss()(*leaves)
    ((_, call),) = swept
    assert [call.need_image, call.need_text] == [name not in frozen for name in ("image", "text")]
    assert loss.requires_grad == (len(frozen) < 4)
