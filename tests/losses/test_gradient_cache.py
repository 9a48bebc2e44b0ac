"""Gradient caching against one graph over the whole batch: the same micro-batches concatenated, one loss, one backward."""

import contextlib
import gc
from functools import partial

import open_clip
import pytest
import recorded
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from timm.layers.evo_norm import EvoNorm2dB0
from tolerance import assert_within
from torch import nn

from simplclip import gradient_cache, losses, models
from simplclip.losses import ClipPMLoss, WIKDLoss
from simplclip.memory.measure import cpu_peak_bytes
from simplclip.nn import SimplifiedBlock, share_weights

SIZES = (5, 5, 5, 2)
TEACHER = 24
LOSSES = ClipLoss(), SigLipLoss(), losses.SigLipLoss(), losses.SigLipLoss(pm_weight=0.5)


def bf16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def siclip(dtype=torch.float32):
    """Returns siclip-tiny with all its blocks active."""
    torch.manual_seed(0)
    model = models.create("siclip-tiny", text_cfg={"layers": 2}).to(dtype).train()
    for module in model.modules():
        if isinstance(module, SimplifiedBlock):
            nn.init.normal_(module.qk.weight, std=module.width**-0.5)
    return model


def pairs(sizes=SIZES, captions=1, dtype=torch.float32, size=16, length=16, vocabulary=8192):
    """Returns micro-batches: (image [m, 3, size, size], text [m captions, length])."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda m: torch.randint(1, vocabulary, (m * captions, length), generator=generator)  # noqa: E731
    return [(torch.randn(m, 3, size, size, generator=generator, dtype=dtype), draw(m)) for m in sizes]


def normalised(model):
    return lambda batch: (model.encode_image(batch[0], normalize=True), model.encode_text(batch[1], normalize=True))


def one_graph(encode, micro_batches, loss, scaler=None, **_):
    join = lambda of_one: torch.cat(of_one) if of_one[0].dim() else of_one[0]  # noqa: E731
    if isinstance(encode, dict):
        every = [{name: torch.cat([one(batch) for batch in micro_batches[name]]) for name, one in encode.items()}]
    else:
        every = [encode(batch) for batch in micro_batches]
    if isinstance(every[0], dict):
        terms = loss(**{k: join([o[k] for o in every]) for k in every[0]})
    else:
        terms = loss(*map(join, zip(*every)))
    terms = terms if isinstance(terms, dict) else {"loss": terms}
    total = sum(terms.values())
    with torch.autocast("cpu", enabled=False):  # as torch recommends for backward, since it would cast float32 products
        (total if scaler is None else scaler.scale(total)).backward()
    return terms


def step(run, encode, micro_batches, loss, parts, context=contextlib.nullcontext, **options):
    """Runs a step; returns terms and gradients of all parameters, and the generator's next number."""
    for part in parts:
        part.zero_grad()
    torch.manual_seed(3)
    with context():
        terms = run(encode, micro_batches, loss, **options)
    assert not any(t.requires_grad for t in terms.values()) or run is one_graph
    drawn = torch.rand(()).item()
    gradients = {f"{i}.{n}": p.grad for i, part in enumerate(parts) for n, p in part.named_parameters() if p.requires_grad}
    found = {name for name, gradient in gradients.items() if gradient is not None}
    return {k: v.detach() for k, v in terms.items()} | {k: gradients[k].clone() for k in found}, found, drawn


def assert_same(encode, micro_batches, loss, parts, dtype=torch.float32, **options):
    """Compares values and gradients by the rule of tests/support/tolerance.py; its plain torch is one graph in this dtype."""
    expected, wanted, drawn = step(one_graph, encode, micro_batches, loss, parts, **options)
    truth = {name: value.double() for name, value in expected.items()}
    got, found, then = step(gradient_cache.backward, encode, micro_batches, loss, parts, **options)
    assert found == wanted
    assert then == drawn, "the generator ends elsewhere"
    assert_within(got, expected, truth, dtype)
    return wanted


def wikd(dtype, captions=1, width=256, **options):
    """Returns WIKDLoss with every term over all captions of the images: (loss module, function of the features)."""
    torch.manual_seed(4)
    n = sum(SIZES) * captions
    teacher = [F.normalize(torch.randn(n, TEACHER, dtype=dtype), dim=1) for _ in range(2)]
    weights = {"relational_weight": 0.8, "interactive_weight": 0.6, "pm_weight": 0.5, "feature_weight": 0.4}
    module = WIKDLoss(**weights, embed_dim=width, teacher_dim=TEACHER, **options).to(dtype)
    ids = torch.arange(n) // captions

    def loss(image, text, scale):
        image = image.repeat_interleave(captions, 0)
        return module(image, text, scale, *teacher, torch.tensor(50.0, dtype=dtype), output_dict=True, ids=ids)

    return module, loss


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "captions"), [(torch.float32, 1), (torch.float64, 2)])
def test_wikd_on_siclip_tiny(dtype, captions):
    model, (module, loss) = siclip(dtype), wikd(dtype, captions)
    share_weights(model.text.transformer.resblocks, [[0, 1]])
    encode = normalised(model)
    found = assert_same(
        encode, pairs(captions=captions, dtype=dtype, size=48), lambda x, y: loss(x, y, model.logit_scale.exp()),
        (model, module), dtype, model=model,
    )  # fmt: skip
    everything = {f"{i}.{name}" for i, part in enumerate((model, module)) for name, _ in part.named_parameters()}
    assert found == everything


def test_autocast_in_the_callers_context():
    """The caller has also run the model without autograd in the same context, which caches casts of weights."""
    model, (module, loss) = siclip(), wikd(torch.float32)
    encode, batches = normalised(model), pairs(size=48)

    @contextlib.contextmanager
    def context():
        with bf16():
            with torch.no_grad():
                encode(batches[0])
            yield

    found = assert_same(
        encode, batches, lambda x, y: loss(x, y, model.logit_scale.exp()), (model, module), torch.bfloat16, context=context,
    )  # fmt: skip
    assert len(found) == len([*model.parameters(), *module.parameters()])


def test_backward_runs_without_autocast():
    """A backward pass has a float32 product, which autocast would cast; gradients are those outside of autocast."""
    torch.manual_seed(0)
    tower, other = nn.Linear(12, 16), nn.Linear(12, 16)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            with torch.autocast("cpu", enabled=False):
                return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.T @ x

    batches = [(torch.randn(m, 12), torch.randn(m, 12)) for m in SIZES]
    encode = lambda b: tuple(Product.apply(t, m.weight) for t, m in zip(b, (tower, other)))  # noqa: E731
    weight = nn.Parameter(torch.randn(16, 16))
    loss = lambda x, y: Product.apply(x, weight).mul(y).sum().square()  # noqa: E731
    results = []
    for context in (contextlib.nullcontext, bf16):
        tower.zero_grad()
        with context():
            gradient_cache.backward(encode, batches, loss)
        results.append(tower.weight.grad)
    torch.testing.assert_close(*results)


class Dropping(nn.Module):
    """Two towers of simplified blocks with dropout, stochastic depth, shared weights and recomputed blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.token = nn.Embedding(64, 32)
        self.image = nn.ModuleList(SimplifiedBlock(32, 4, drop_path=0.5) for _ in range(2))
        self.text = nn.ModuleList(SimplifiedBlock(32, 4, causal=True, recompute=True) for _ in range(3))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_shared_weights_and_recomputed_blocks(dtype):
    model, module = Dropping().to(dtype), ClipPMLoss().to(dtype)
    batches = pairs(dtype=dtype, vocabulary=64)
    assert_same(lambda b: model(*b), batches, lambda *o: module(*o, output_dict=True), (model, module), dtype, model=model)
    first, second = (step(gradient_cache.backward, lambda b: model(*b), batches, module, (model, module)) for _ in range(2))
    for name in first[1]:
        assert torch.equal(first[0][name], second[0][name])


def whole():
    """Returns the images and texts of a whole batch, in float64."""
    return [torch.cat(of_tower) for of_tower in zip(*pairs(dtype=torch.float64, vocabulary=64))]


@pytest.mark.parametrize(("images", "texts"), [((5, 5, 5, 2), (9, 8)), ((17,), (3, 3, 3, 3, 3, 2)), ((4, 13), (17,))])
def test_micro_batches_of_each_tower(images, texts):
    """Gradients equal those of one graph whose dropout draws the same numbers; the last micro-batch has another size."""
    model, module = Dropping().double(), ClipPMLoss().double()
    encode = {"image": model.encode_image, "text": model.encode_text}
    batches = {name: t.split(list(sizes)) for name, t, sizes in zip(encode, whole(), (images, texts))}
    loss = lambda image, text: module(image, text, model.logit_scale.exp(), output_dict=True)  # noqa: E731
    found = assert_same(encode, batches, loss, (model, module), torch.float64, model=model)
    assert len(found) == len([*model.parameters(), *module.parameters()])


@pytest.mark.parametrize(("image", "text"), [(5, 5), (1, 20)])
def test_each_micro_batch_but_the_last_is_encoded_twice(image, text):
    model, seen = Dropping().double().eval(), {"image": [], "text": []}

    def encode(tower, batch):
        seen[tower].append(len(batch))
        return getattr(model, f"encode_{tower}")(batch)

    towers, inputs = {name: partial(encode, name) for name in seen}, dict(zip(seen, whole()))
    loss = lambda image, text: ClipLoss()(image, text, model.logit_scale.exp())  # noqa: E731
    batches = {"image": inputs["image"].split(image), "text": inputs["text"].split(text)}
    cached = step(gradient_cache.backward, towers, batches, loss, (model,))[0]
    for name, micro_batches in batches.items():
        sizes = [len(t) for t in micro_batches]
        assert sorted(seen[name]) == sorted(sizes + sizes[:-1]), name  # the last one keeps its graph
    expected = step(one_graph, towers, {name: [t] for name, t in inputs.items()}, loss, (model,))[0]
    torch.testing.assert_close(cached, expected, rtol=1e-9, atol=1e-12)


def test_a_loss_that_returns_its_sum_and_its_terms():
    model, loss = Dropping().double(), losses.ClipPMLoss(pm_weight=0.5).double()
    batches, weights = pairs(dtype=torch.float64, vocabulary=64), {"contrastive": 1.0, "pair_matching": 0.5}
    found, expected = (
        step(gradient_cache.backward, lambda b: model(*b), batches, of_outputs, (model, loss))[0]
        for of_outputs in (lambda *o: loss.terms(*o, weights=weights), lambda *o: loss(*o, output_dict=True))
    )
    for name in weights:
        torch.testing.assert_close(found.pop(name), expected.pop(f"{name}_loss"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pm_weight", [0, 0.5])
def test_sigmoid_terms_take_one_sweep(monkeypatch, pm_weight):
    """The sweep computes gradients with the value, from features that require gradients; no other sweep runs."""
    model, loss = Dropping(), losses.SigLipLoss(pm_weight=pm_weight)
    bias = nn.Parameter(torch.tensor(-10.0))
    names = ("text_features", "logit_scale", "logit_bias")
    encode = {"image_features": model.encode_image}
    encode["text_features"] = lambda text: dict(zip(names, (model.encode_text(text), model.logit_scale.exp(), bias)))
    inputs = dict(zip(encode, (t.float() if t.is_floating_point() else t for t in whole())))
    batches = {name: t.split(size) for (name, t), size in zip(inputs.items(), (5, 8))}
    swept = recorded.calls(monkeypatch)
    gradient_cache.backward(encode, batches, loss)
    similarities = [(name, call.gradient) for name, call in swept if name.startswith("similarity")]
    assert similarities == [("similarity_sigmoid", True)]
    assert bias.grad is not None
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("loss", LOSSES, ids=["ClipLoss", "SigLipLoss", "ours", "ours with PM"])
def test_open_clips_model_and_loss_by_name(loss):
    torch.manual_seed(0)
    tower = {"layers": 1, "width": 16}
    model = open_clip.CLIP(
        16, {**tower, "image_size": 16, "patch_size": 8, "head_width": 8},
        {**tower, "context_length": 8, "vocab_size": 64, "heads": 2}, output_dict=True,
        init_logit_bias=-1.0 if isinstance(loss, SigLipLoss) else None,
    ).double()  # fmt: skip
    batches = pairs(dtype=torch.float64, length=8, vocabulary=64)
    found = assert_same(lambda b: model(*b), batches, loss, (model, loss.double()), torch.float64, model=model)
    assert len(found) == len([*model.parameters(), *loss.parameters()])


def test_frozen_and_unused_parameters_get_nothing():
    model = Dropping().double()
    model.patch.requires_grad_(False)
    model.image.requires_grad_(False)
    batches = pairs(dtype=torch.float64, vocabulary=64)
    for loss, unused in (
        (lambda x, y, s: (s * x @ y.T).square().mean(), ("0.patch", "0.image")),
        (lambda x, y, s: (y @ y.T).square().mean(), ("0.patch", "0.image", "0.logit_scale")),
    ):
        found = assert_same(lambda b: model(*b), batches, loss, (model,), torch.float64)
        assert found
        assert not any(name.startswith(unused) for name in found)


def test_gradients_are_added_and_scaled():
    model, batches, loss = Dropping().double(), pairs(dtype=torch.float64, vocabulary=64), ClipLoss()
    run = lambda **options: step(gradient_cache.backward, lambda b: model(*b), batches, loss, (model,), **options)[0]  # noqa: E731
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plain, scaled = run(), run(scaler=scaler)
    torch.manual_seed(3)
    gradient_cache.backward(lambda b: model(*b), batches, loss, scaler=scaler)
    assert torch.equal(scaled["loss"], plain["loss"])
    for name, p in model.named_parameters():
        torch.testing.assert_close(scaled[f"0.{name}"], 2**10 * plain[f"0.{name}"])
        torch.testing.assert_close(p.grad, 2 * scaled[f"0.{name}"])


@pytest.mark.slow
def test_memory_is_that_of_one_micro_batch():
    model = Dropping()
    loss = ClipPMLoss(pm_weight=0)

    def peak(run, count):
        batches = pairs([16] * count, vocabulary=64)
        step(run, lambda b: model(*b), batches, loss, (model,))  # makes gradients exist
        gc.collect()
        return cpu_peak_bytes(lambda: run(lambda b: model(*b), batches, loss))

    few, many = (peak(gradient_cache.backward, count) for count in (4, 16))
    features = 2 * 2 * 16 * 16 * 32 * 4
    assert many < few + 3 * features
    assert peak(one_graph, 16) > 5 * many


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4), nn.BatchNorm1d(4, track_running_stats=False).eval(), nn.SyncBatchNorm(4), EvoNorm2dB0(4),
     nn.InstanceNorm2d(4, track_running_stats=True)],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_statistics_of_batches_are_refused(norm):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(norm))
    message = f"model: expected no batch statistics, got {type(norm).__name__} '1.0' in training mode"
    with pytest.raises(ValueError, match=message):
        gradient_cache.backward(model, [torch.ones(2, 2)], torch.sum, model=model)


def test_frozen_norms_and_those_without_statistics_pass():
    norms = [nn.BatchNorm2d(4).eval(), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), EvoNorm2dB0(4).eval()]
    gradient_cache.check(nn.Sequential(*norms))
    gradient_cache.check(siclip())
    with pytest.raises(ValueError, match="BatchNormAct2d"):
        gradient_cache.check(models.create("siclip-lite0").train())


TWO, NAMED = dict.fromkeys("ab", nn.Identity()), dict.fromkeys("ab", lambda b: {"x": b})


@pytest.mark.parametrize(
    ("encode", "batches", "error", "message"),
    [
        (nn.Identity(), [], ValueError, "micro_batches: expected at least one, got none"),
        (nn.Identity(), iter([1]), TypeError, "micro_batches: expected a sequence, since .*got list_iterator"),
        (lambda b: None, [1], TypeError, "encode: expected a tensor, or a sequence or mapping of them, got NoneType"),
        (lambda b: {"ids": torch.ones(2, 2).long()}, [1], TypeError, "output 'ids' of encode: expected float32"),
        (lambda b: (torch.ones(3, 1),) * b, [2, 1], ValueError, r"the outputs of the first micro-batch, \[0, 1\]"),
        (TWO, [[1]], ValueError, r"micro_batches: expected one for each tower in a mapping, \['a', 'b'\], got list"),
        ({"a": lambda b: [b]}, {"a": [1]}, TypeError, r"encode\['a'\]: expected a tensor, or a mapping of them"),
        (NAMED, dict.fromkeys("ab", [torch.ones(2, 2)]), ValueError, "encode.'b'.: expected outputs that no other tower"),
        ([nn.Identity()], [1], TypeError, "encode: expected a function, or a mapping of them, got list"),
    ],
)  # fmt: skip
def test_bad_arguments(encode, batches, error, message):
    with pytest.raises(error, match=message):
        gradient_cache.backward(encode, batches, torch.sum)
