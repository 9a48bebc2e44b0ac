"""Gradient caching against one graph over the whole batch: one loss, one backward pass."""

import contextlib
import gc
from functools import partial
from unittest import mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import nn

from simplclip import gradient_cache
from simplclip.losses import ClipPMLoss, SigLipLoss, WIKDLoss
from simplclip.losses.base import TEACHER
from simplclip.nn import SimplifiedBlock, share_weights
from support.devices import cpu_peak_bytes
from support.ops.compare import assert_within

SIZES = (5, 5, 5, 2)


def pairs(sizes=SIZES, captions=1, dtype=torch.float64, length=16):
    """Returns micro-batches: (image [m, 3, 16, 16], text [m captions, length])."""
    generator = torch.Generator().manual_seed(1)
    images = (torch.randn(m, 3, 16, 16, generator=generator, dtype=dtype) for m in sizes)
    texts = (torch.randint(1, 64, (m * captions, length), generator=generator) for m in sizes)
    return list(zip(images, texts))


def one_graph(encode, micro_batches, loss, scaler=None, **_):
    outputs = {}
    if isinstance(encode, dict):
        for tower, function in encode.items():
            parts = [function(batch) for batch in micro_batches[tower]]
            outputs |= joined([named(part, tower) for part in parts])
    else:
        outputs = joined([named(encode(batch), 0) for batch in micro_batches])
    terms = loss(*outputs.values()) if 0 in outputs else loss(**outputs)
    if not isinstance(terms, dict):
        terms = {"loss": terms}
    total = sum(terms.values())
    if scaler is not None:
        total = scaler.scale(total)
    # as torch recommends for backward, since it would cast float32 products
    with torch.autocast("cpu", enabled=False):
        total.backward()
    return terms


def named(outputs, name):
    """Returns outputs of an encoder as a dict. name: that of a single tensor."""
    if isinstance(outputs, torch.Tensor):
        return {name: outputs}
    return outputs if isinstance(outputs, dict) else dict(enumerate(outputs))


def joined(parts):
    """Returns the outputs of all micro-batches."""
    outputs = dict(parts[0])
    for name, first in outputs.items():
        if first.dim():
            outputs[name] = torch.cat([part[name] for part in parts])
    return outputs


def step(run, encode, micro_batches, loss, parts, context=contextlib.nullcontext, **options):
    """Returns terms and gradients of all parameters, their names, and the next random number."""
    for part in parts:
        part.zero_grad()
    torch.manual_seed(3)
    with context():
        terms = run(encode, micro_batches, loss, **options)
    assert not any(t.requires_grad for t in terms.values()) or run is one_graph
    drawn = torch.rand(()).item()
    gradients = {}
    for i, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            if parameter.grad is not None and parameter.requires_grad:
                gradients[f"{i}.{name}"] = parameter.grad.clone()
    values = {name: term.detach() for name, term in terms.items()}
    return values | gradients, set(gradients), drawn


def assert_same(encode, micro_batches, loss, parts, dtype=torch.float64, **options):
    """Compares with one graph in this dtype; returns the names of parameters with a gradient."""
    arguments = encode, micro_batches, loss, parts
    expected, names, number = step(one_graph, *arguments, **options)
    truth = {name: value.double() for name, value in expected.items()}
    cached, cached_names, cached_number = step(gradient_cache.backward, *arguments, **options)
    assert cached_names == names
    assert cached_number == number, "the generator ends elsewhere"
    assert_within(cached, expected, truth, dtype)
    return names


def names_of(*parts):
    return {f"{i}.{name}" for i, part in enumerate(parts) for name, _ in part.named_parameters()}


def wikd(dtype, captions=1):
    """Returns WIKDLoss with every term over all captions, and it as a function of features."""
    torch.manual_seed(4)
    n = sum(SIZES) * captions
    teacher = [F.normalize(torch.randn(n, 24, dtype=dtype), dim=1) for _ in range(2)]
    module = WIKDLoss(
        relational_weight=0.8, interactive_weight=0.6, pm_weight=0.5, feature_weight=0.4,
        embed_dim=32, teacher_dim=24,
    ).to(dtype)  # fmt: skip
    ids = torch.arange(n) // captions

    def loss(image, text, scale):
        image = image.repeat_interleave(captions, 0)
        return module(
            image, text, scale, *teacher, torch.tensor(50.0, dtype=dtype), output_dict=True, ids=ids
        )

    return module, loss


@pytest.mark.parametrize(("dtype", "captions"), [(torch.float32, 1), (torch.float64, 2)])
def test_wikd_loss_with_gradient_caching(dtype, captions):
    model, (module, loss) = Dropping().to(dtype), wikd(dtype, captions)
    parts = model, module
    batches = pairs(captions=captions, dtype=dtype)
    names = assert_same(model.of, batches, loss, parts, dtype, model=model)
    assert names == names_of(*parts)


def test_autocast_in_the_callers_context():
    """The caller has run the model without autograd, which caches casts of weights."""
    model, (module, loss) = Dropping(), wikd(torch.float32)
    batches = pairs(dtype=torch.float32)

    @contextlib.contextmanager
    def context():
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                model(*batches[0])
            torch.manual_seed(3)
            yield

    parts = model, module
    names = assert_same(model.of, batches, loss, parts, torch.bfloat16, context=context)
    assert names == names_of(*parts)


def test_backward_runs_without_autocast():
    """Neither of the loss nor of the encoder: it would cast a float32 product."""
    model, states = Dropping(), []

    def watched(*outputs):
        for t in outputs if torch.is_grad_enabled() else ():
            t.register_hook(lambda gradient: states.append(torch.is_autocast_enabled("cpu")))
        return outputs

    def loss(*outputs):
        return ClipPMLoss(pm_weight=0)(*watched(*outputs))

    with torch.autocast("cpu", torch.bfloat16):
        batches = pairs(dtype=torch.float32)
        gradient_cache.backward(lambda b: watched(*model(*b)), batches, loss)
    assert len(states) == 3 + 2 * len(SIZES) + 1  # the scale's gradient is propagated once
    assert not any(states)


class Dropping(nn.Module):
    """Two towers of simplified blocks that drop, share weights and recompute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Embedding(64, 32)
        self.image = nn.ModuleList(SimplifiedBlock(32, 4, drop_path=0.5) for _ in range(2))
        self.text = nn.ModuleList(
            SimplifiedBlock(32, 4, causal=True, recompute=True) for _ in range(3)
        )
        share_weights(self.image, [[0, 1]])
        share_weights(self.text, [[0, 2]])
        self.dropout = nn.Dropout(0.3)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image):
        return self.encode(self.image, self.patch(image).flatten(2).mT)

    def encode_text(self, text):
        return self.encode(self.text, self.token(text))

    def encode(self, blocks, x):
        for block in blocks:
            x = block(self.dropout(x))
        return F.normalize(x.mean(1), dim=1)

    def forward(self, image, text):
        return self.encode_image(image), self.encode_text(text), self.logit_scale.exp()

    def of(self, batch):
        return self(*batch)


def towers(model, *sizes):
    """Returns two towers, one with two outputs, and the batch in micro-batches of these sizes."""

    def text_and_scale(text):
        return {"text": model.encode_text(text), "scale": model.logit_scale.exp()}

    images, texts = map(torch.cat, zip(*pairs()))
    batches = {"image": images.split(sizes[0]), "text": texts.split(sizes[1])}
    return {"image": model.encode_image, "text": text_and_scale}, batches


@pytest.mark.parametrize(
    "sizes", [((5, 5, 5, 2), (9, 8)), ((17,), (3, 3, 3, 3, 3, 2)), ((4, 13), (17,))]
)
def test_micro_batches_of_each_tower(sizes):
    """Gradients equal those of one graph whose dropout draws the same numbers."""
    parts = model, module = Dropping().double(), ClipPMLoss().double()

    def loss(image, text, scale):
        return module(image, text, scale, output_dict=True)

    names = assert_same(*towers(model, *map(list, sizes)), loss, parts, model=model)
    assert names == names_of(*parts)


@pytest.mark.parametrize("sizes", [(5, 5), (1, 20)])
def test_each_micro_batch_but_the_last_is_encoded_twice_for_one_loss(sizes, monkeypatch):
    model = Dropping().double()
    encode, batches = towers(model, *sizes)
    watched = mock.Mock(side_effect=model.encode)
    loss = mock.Mock(side_effect=lambda image, text, scale: ClipLoss()(image, text, scale))
    monkeypatch.setattr(model, "encode", watched)
    gradient_cache.backward(encode, batches, loss)
    loss.assert_called_once()
    seen = [(blocks, len(x)) for (blocks, x), _ in watched.call_args_list]
    for name, micro_batches in batches.items():
        rows = [len(t) for t in micro_batches]
        # the last one keeps its graph
        expected = sorted(rows + rows[:-1])
        assert sorted(n for tower, n in seen if tower is getattr(model, name)) == expected


def test_a_loss_that_returns_its_sum_and_its_terms():
    model = Dropping().double()
    loss = ClipPMLoss(pm_weight=0.5).double()
    weights = {"contrastive": 1.0, "pair_matching": 0.5}
    forms = partial(loss.terms, weights=weights), partial(loss, output_dict=True)
    results, expected = (
        step(gradient_cache.backward, model.of, pairs(), form, (model, loss))[0] for form in forms
    )
    for name in weights:
        torch.testing.assert_close(results.pop(name), expected.pop(f"{name}_loss"))
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "loss", [ClipLoss(), SigLipLoss(pm_weight=0.5)], ids=["ClipLoss", "SigLipLoss"]
)
def test_open_clips_model_and_losses_by_name(loss):
    torch.manual_seed(0)
    tower = {"layers": 1, "width": 16}
    model = open_clip.CLIP(
        16, {**tower, "image_size": 16, "patch_size": 8, "head_width": 8},
        {**tower, "context_length": 8, "vocab_size": 64, "heads": 2}, output_dict=True,
        init_logit_bias=-1.0 if isinstance(loss, SigLipLoss) else None,
    ).double()  # fmt: skip
    parts = model, loss.double()
    names = assert_same(lambda b: model(*b), pairs(length=8), loss, parts, model=model)
    assert names == names_of(*parts)


def test_frozen_and_unused_parameters_get_nothing():
    model = Dropping().double()
    model.patch.requires_grad_(False)
    model.image.requires_grad_(False)
    for loss, unused in (
        (lambda x, y, s: (s * x @ y.T).square().mean(), ("0.patch", "0.image")),
        (lambda x, y, s: (y @ y.T).square().mean(), ("0.patch", "0.image", "0.logit_scale")),
    ):
        names = assert_same(model.of, pairs(), loss, (model,))
        assert names == {name for name in names_of(model) if not name.startswith(unused)}


@pytest.mark.filterwarnings("error")
def test_no_gradients_are_computed_for_frozen_towers_and_teachers():
    model = Dropping().double()
    for name in ("patch", "image"):
        getattr(model, name).requires_grad_(False)
    needed = {}

    def encode(batch):
        image, text, scale = model(*batch)
        with torch.inference_mode():
            rows = torch.ones(len(image), 3)
            teacher = dict(zip(TEACHER, (rows, rows, torch.tensor(5.0))))
        return {"image_features": image, "text_features": text, "logit_scale": scale} | teacher

    def loss(**outputs):
        needed.update({name: t.requires_grad for name, t in outputs.items()})
        return WIKDLoss()(**outputs, output_dict=True)

    gradient_cache.backward(encode, pairs(), loss)
    assert {name for name, need in needed.items() if need} == {"text_features", "logit_scale"}


def test_gradients_are_added_and_scaled():
    model = Dropping().double()
    batches = pairs()
    arguments = gradient_cache.backward, model.of, batches, ClipLoss(), (model,)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, scaled = step(*arguments)[0], step(*arguments, scaler=scaler)[0]
    torch.manual_seed(3)
    gradient_cache.backward(model.of, batches, ClipLoss(), scaler=scaler)
    assert torch.equal(scaled["loss"], plain["loss"])
    for name, p in model.named_parameters():
        torch.testing.assert_close(scaled[f"0.{name}"], 2**10 * plain[f"0.{name}"])
        torch.testing.assert_close(p.grad, 2 * scaled[f"0.{name}"])


@pytest.mark.slow
def test_memory_is_that_of_one_micro_batch():
    model = Dropping()
    loss = ClipPMLoss(pm_weight=0)

    def peak(run, count):
        batches = pairs([16] * count, dtype=torch.float32)
        step(run, model.of, batches, loss, (model,))  # makes gradients exist
        gc.collect()
        return cpu_peak_bytes(lambda: run(model.of, batches, loss))

    few, many = (peak(gradient_cache.backward, count) for count in (4, 16))
    features = 2 * 2 * 16 * 16 * 32 * 4
    assert many < few + 3 * features
    assert peak(one_graph, 16) > 5 * many
