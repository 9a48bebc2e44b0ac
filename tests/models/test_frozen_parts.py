"""Frozen parts that run folded: equal gradients, and no trace of the copies in the model."""

import copy
import functools
import io
import pickle

import pytest
import torch
from timm.layers import to_2tuple
from timm.models import fastvit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import simplclip
from simplclip import models
from simplclip.losses import ClipPMLoss
from simplclip.models import mobileclip
from simplclip.models.fold import fold_frozen
from simplclip.models.inherit import freeze, inherit
from support.models.open_clip_models import clip
from support.models.weights import with_statistics

LITE0 = "visual.trunk.patch_embed.backbone"
STEM = ("stem", "stages.0", "stages.1", "stages.2", "stages.3.downsample", "stages.3.pos_emb")
S0 = [*(f"visual.trunk.{name}" for name in STEM), "visual.trunk.final_conv"]


@functools.cache
def frozen_lite0():
    model = with_statistics(models.create("siclip-lite0"))
    freeze(model, [LITE0, "text.token_embedding"])
    return model.train()


def lite0():
    return copy.deepcopy(frozen_lite0())


def s0():
    source = with_statistics(models.create("siclip2-s0", simplified=False))
    model = models.create(
        "siclip2-s0", vision_cfg={"image_size": 128}, text_cfg={"context_length": 77}
    )
    inherit(model, source, train=["visual.trunk.head", "text.ln_final", "text.text_projection"])
    return model.train()


def images_of(model, count=2):
    torch.manual_seed(1)
    return torch.rand(count, 3, *to_2tuple(model.visual.image_size))


def gradients(model, image, text, dtype=None):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        images = model.encode_image(image, normalize=True)
        texts = model.encode_text(text, normalize=True)
        terms = ClipPMLoss()(images, texts, model.logit_scale.exp(), output_dict=True)
        sum(terms.values()).backward()
    return flat_gradients(model)


def flat_gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def remove(model, copies):
    """Lets the modules run unfolded again."""
    for name in copies:
        del model.get_submodule(name).forward


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name", "parts"),
    [(lite0, "siclip-lite0", [LITE0]), pytest.param(s0, "siclip2-s0", S0, marks=pytest.mark.prove)],
)
def test_gradients(make, name, parts):
    model = make()
    texts = [f"a photo of {what}" for what in ("a cat", "two dogs", "the sea", "a red bus")]
    count = 2 if make is s0 else 4
    batch = images_of(model, count), models.tokenizer(name)(texts[:count])
    exact, before = gradients(model, *batch), gradients(model, *batch, torch.bfloat16)
    copies = fold_frozen(model)
    assert list(copies) == parts
    # an error above 0 shows that folded copies ran
    assert 0 < error(gradients(model, *batch), exact) <= 1e-5
    remove(model, copies)
    assert torch.equal(gradients(model, *batch), exact)
    fold_frozen(model, torch.bfloat16)
    assert error(gradients(model, *batch, torch.bfloat16), exact) <= 1.2 * error(before, exact)
    assert torch.equal(gradients(model, *batch), exact)  # without autocast the modules run unfolded


@pytest.mark.slow
def test_the_copies_belong_to_no_model():
    model = lite0()
    before, count = model.state_dict(), sum(1 for _ in model.modules())
    image = images_of(model)
    with torch.no_grad():
        plain = model.encode_image(image)
        copies = fold_frozen(model)
        folded = model.encode_image(image)
        assert not torch.equal(plain, folded)
        assert model.state_dict().keys() == before.keys()
        assert sum(1 for _ in model.modules()) == count
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (*others, torch.load(saved, weights_only=False)):
            assert torch.equal(other.encode_image(image), folded)
            assert other.get_submodule(LITE0).forward.args[1] is not copies[LITE0]
        whole = simplclip.fold(model.eval()).encode_image(image)
        assert torch.allclose(whole, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: fastvit.RepMixerBlock(16), lambda: mobileclip.RepMixerBlock(16)]
)
def test_layer_scales_are_folded_in_bfloat16(make):
    """The copy computes no fp32 tensors, and differs by bfloat16's rounding."""
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(make()))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_scale" in name:
                weight.uniform_(0.1, 0.5)
    freeze(model, ["0"])
    shape = (2, 16, 8, 8) if isinstance(model[0], fastvit.RepMixerBlock) else (2, 8, 16)
    x = torch.randn(shape)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        copies = fold_frozen(model, torch.bfloat16)
        dtypes = []
        for inner in copies["0"].modules():
            inner.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        folded = model(x)
    assert set(dtypes) == {torch.bfloat16}
    assert error(folded.float(), exact) <= torch.finfo(torch.bfloat16).eps / 2
    remove(model, copies)
    single = fold_frozen(model)["0"]
    assert getattr(single, "layer_scale", None) is not None  # in fp32 nothing is rounded otherwise


def test_pointwise_convolutions_are_products_on_a_gpu(monkeypatch):
    """A CPU is taken for a GPU. Other convolutions stay convolutions."""
    layers = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 1, stride=2)
    model = with_statistics(nn.Sequential(*layers))
    freeze(model, [""])
    copies = fold_frozen(model, torch.bfloat16)
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    products = []
    linear = nn.functional.linear

    def counted(*args):
        products.append(1)
        return linear(*args)

    monkeypatch.setattr("simplclip.models.fold.F.linear", counted)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        assert not products
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        result = model(x)
        assert products == [1]
        model(x.contiguous())  # its convolution keeps channels_last, as its weights have it
    monkeypatch.undo()
    assert error(result.float(), expected.float()) < 0.01
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert list(copies) == [""]


def test_what_has_no_copy():
    model = lite0()
    model.get_submodule(f"{LITE0}.blocks.0").register_forward_hook(lambda *_: None)
    assert not fold_frozen(model)  # a copy would not call the hook
    vit = clip()
    freeze(vit, ["visual"])  # its one convolution has no norm
    assert not fold_frozen(vit.train())


@pytest.mark.slow
def test_under_other_wrappers(tmp_path):
    model = lite0()
    image = images_of(model)
    assert list(fold_frozen(model)) == [LITE0]

    def step(encode):
        model.zero_grad(set_to_none=True)
        encode(image).square().sum().backward()
        return flat_gradients(model.visual)

    expected = step(model.visual)
    assert torch.equal(step(lambda x: checkpoint(model.visual, x, use_reentrant=False)), expected)
    assert error(step(torch.compile(model.visual, backend="eager")), expected) <= 1e-5
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        assert torch.equal(step(DistributedDataParallel(model.visual)), expected)
    finally:
        torch.distributed.destroy_process_group()
