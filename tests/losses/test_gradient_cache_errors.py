"""Gradient caching: models, arguments and losses that it refuses."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.evo_norm import EvoNorm2dB0
from torch import nn

from simplclip import gradient_cache


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm1d(4, track_running_stats=False).eval(),
        nn.SyncBatchNorm(4),
        EvoNorm2dB0(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        BatchNormAct2d(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_statistics_of_batches_are_refused(norm):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(norm))
    message = (
        f"model: expected no batch statistics, got {type(norm).__name__} '1.0' in training mode"
    )
    with pytest.raises(ValueError, match=message):
        gradient_cache.backward(model, [torch.ones(2, 2)], torch.sum, model=model)


def test_frozen_norms_and_those_without_statistics_pass():
    frozen = nn.BatchNorm2d(4).eval(), EvoNorm2dB0(4).eval()
    without = nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)
    gradient_cache.check(nn.Sequential(*frozen, *without))


TWO = dict.fromkeys("ab", nn.Identity())
NAMED = dict.fromkeys("ab", lambda batch: {"x": batch})
ONES = [torch.ones(2, 2)]
IDS = torch.ones(2, 2).long()


@pytest.mark.parametrize(
    ("encode", "batches", "error", "message"),
    [
        (nn.Identity(), [], ValueError, "micro_batches: expected at least one, got none"),
        (nn.Identity(), iter([1]), TypeError, "micro_batches: .* sequence, since .*list_iterator"),
        (lambda b: None, [1], TypeError, "encode: .* sequence or mapping of them, got NoneType"),
        (lambda b: {"ids": IDS}, [1], TypeError, "output 'ids' of encode: expected float32"),
        (lambda b: (torch.ones(3, 1),) * b, [2, 1], ValueError, r"{0: \['m', 1\], 1: .*}, got"),
        (lambda b: b, [torch.ones(2, 3), *ONES], ValueError, r"{0: \['m', 3\]}, got .*'m', 2\]}"),
        (lambda b: b, [torch.ones(2, 3), torch.ones(1)], ValueError, r"first .*, got {0: \[\]}"),
        (TWO, [[1]], ValueError, r"one for each tower in a mapping, \['a', 'b'\], got list"),
        ({"a": lambda b: [b]}, {"a": [1]}, TypeError, r"encode\['a'\]: .* or a mapping of them"),
        (NAMED, dict.fromkeys("ab", ONES), ValueError, "encode.'b'.: .* outputs that no other"),
        ([nn.Identity()], [1], TypeError, "encode: expected a function, or a mapping .* got list"),
    ],
)
def test_bad_arguments(encode, batches, error, message):
    with pytest.raises(error, match=message):
        gradient_cache.backward(encode, batches, torch.sum)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        # as WIKDLoss and CoCaLoss return without output_dict
        (lambda x: (x.sum(), x.mean()), "tuple"),
        (lambda x: (x.sum(),), "tuple"),
        (lambda x: (x.sum(), None), "tuple"),
        (lambda x: 1.0, "float"),
        (lambda x: None, "NoneType"),
        (lambda x: {}, "dict"),
        (lambda x: {"a": x.sum(), "b": 0.5}, "dict"),
        (lambda x: (x.sum(), {"a": 0.5}), "tuple"),
        (lambda x: x.sum(1), r"\[4\]"),
    ],
)
def test_what_loss_returns_is_checked_before_a_gradient_changes(loss, got):
    linear = nn.Linear(3, 3)
    expected = (
        r"a tensor \[\], a mapping of them \(as losses return with output_dict=True\) "
        r"or \(loss, mapping\)"
    )
    with pytest.raises(TypeError, match=f"loss: expected {expected}, got {got}$"):
        gradient_cache.backward(linear, torch.ones(4, 3).split(2), loss)
    assert linear.weight.grad is None


@pytest.mark.parametrize("loss", [lambda x: x.sum().detach(), lambda x: {"a": torch.ones(())}])
def test_a_loss_without_a_gradient(loss):
    message = "loss: expected a value with a gradient, got a constant"
    with pytest.raises(ValueError, match=message):
        gradient_cache.backward(nn.Linear(3, 3), torch.ones(4, 3).split(2), loss)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_autograd_must_be_on(off):
    message = "backward: expected autograd, got a call under no_grad or inference_mode"
    with off(), pytest.raises(ValueError, match=message):
        gradient_cache.backward(nn.Linear(3, 3), torch.ones(4, 3).split(2), torch.sum)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ([(1, 1), (1, 1), (1, 1)], None),
        ([(0, 1), (1, 1), (1, 1)], None),
        ([(1, 1), (0, 1), (1, 1)], None),
        ([(0, 1), (0, 1), (0, 1)], None),
        ([(1, 0), (1, 0), (1, 0)], None),
        ([(1, 1), (0, 1), (0, 1)], "output 0 of encode: .*, got a constant in micro-batch 2"),
        ([(0, 1), (1, 1), (0, 1)], "output 0 of encode: .*, got a constant in micro-batch 2"),
        ([(1, 1), (1, 1), (1, 0)], "output 1 of encode: .*, got a constant in micro-batch 2"),
        ([(1, 1), (1, 0), (1, 1)], "output 1 of encode: .*, got a constant in micro-batch 1"),
        ([(1, 0), (1, 1), (1, 1)], "output 1 of encode: .*, got a constant in micro-batch 0"),
    ],
)
def test_constants_in_some_micro_batches(trained, message):
    """trained: for each micro-batch whether features and scale require a gradient."""
    torch.manual_seed(0)
    linear, log_scale = nn.Linear(3, 4), nn.Parameter(torch.ones(()))
    parameters = [*linear.parameters(), log_scale]

    def encode(batch):
        rows, of_features, of_scale = batch
        outputs = linear(rows), log_scale.exp()
        flags = of_features, of_scale
        return [t if flag else t.detach() for t, flag in zip(outputs, flags)]

    def loss(features, scale):
        return (scale * features).square().mean()

    batches = [(torch.randn(2, 3), *flags) for flags in trained]
    if message:
        with pytest.raises(ValueError, match=message):
            gradient_cache.backward(encode, batches, loss)
        return
    features = torch.cat([encode(batch)[0] for batch in batches])
    loss(features, encode(batches[-1])[1]).backward()
    plain = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    gradient_cache.backward(encode, batches, loss)
    for p, expected in zip(parameters, plain):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize(
    ("name", "kind"), [("model", "nn.Module"), ("scaler", "torch.amp.GradScaler or None")]
)
def test_models_and_scalers_of_another_type(name, kind):
    with pytest.raises(TypeError, match=f"{name}: expected an? {kind}, got float"):
        gradient_cache.backward(nn.Identity(), [torch.ones(2, 2)], torch.sum, **{name: 2.0})
