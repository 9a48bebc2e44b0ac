"""Cropped texts: features, gradients and order are those of padded texts, or it is refused."""

import copy
import itertools

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from transformers import BertConfig

import simplclip
from simplclip.common.errors import InputError
from simplclip.models import crop
from simplclip.models.mobileclip import TextTower
from support.models.open_clip_models import TEXT, VIT, clip, restless

LENGTHS = (3, 40, 4, 9, 17, 5, 8, 3, 33, 16, 6, 11)  # of 40 tokens
KINDS = {"CLIP": {}, "a tower of its own": {}, "eos": {"pool_type": "eos", "eos_id": 98}}
HUGGING_FACE, PADDING_MASK = "Hugging Face's", "padding mask"


def model_of(kind, **text):
    text = KINDS.get(kind, {}) | {"context_length": 40} | text
    model = clip(cls=CLIP if kind == "CLIP" else CustomTextCLIP, text=text).eval()
    if kind == HUGGING_FACE:
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=100, **size, num_attention_heads=2, pad_token_id=0)
        model.text = HFTextEncoder("bert", 16, config, "cls_pooler", "linear").eval()
    if kind == PADDING_MASK:
        size = {"width": 24, "heads": 2, "layers": 2, "output_dim": 16}
        model.text = TextTransformer(40, 100, **size, no_causal_mask=True, use_pad_mask=True).eval()
    return model


def masked(kind):
    """Returns a model of simplified blocks that do not see padding, causal or not."""
    model = model_of(kind, no_causal_mask=kind != "CLIP")
    simplclip.simplify(model, mask_padding=True)
    return restless(model)


def texts(lengths=LENGTHS, end=99, length=40):
    numbers = torch.Generator().manual_seed(2)
    text = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, count in zip(text, lengths):
        row[:count] = torch.randint(1, 98, (count,), generator=numbers)
        row[count - 1] = end
    return text


def gradients(model, text):
    model.zero_grad(set_to_none=True)
    features = model.encode_text(text, normalize=True)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    (features * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return features.detach(), found


@pytest.fixture
def tokens(monkeypatch):
    """The shapes of the texts in each call of a tower; groups are small, since texts are few."""
    monkeypatch.setattr(crop, "GROUP_TOKENS", 8)
    shapes, real = [], crop.TextCrop.encode

    def encode(self, text, *rest):
        shapes.append(text.shape)
        return real(self, text, *rest)

    monkeypatch.setattr(crop.TextCrop, "encode", encode)
    return shapes


ALL = [*itertools.product((*KINDS, HUGGING_FACE, PADDING_MASK), [model_of])]
ALL += itertools.product(KINDS, [masked])


@pytest.mark.parametrize(("kind", "make"), ALL)
def test_features_and_gradients_are_those_of_padded_texts(kind, make, tokens):
    model = make(kind)
    text = texts(end=98 if kind == "eos" else 99)
    features, expected = gradients(model, text)
    cropped = simplclip.crop_texts(model)
    found, got = gradients(model, text)
    assert len(tokens) > 1
    assert sum(rows * length for rows, length in tokens) < 0.6 * text.numel()
    torch.testing.assert_close(found, features, rtol=0, atol=2e-6)
    assert got.keys() == expected.keys()
    # the bias of keys has no gradient, but rounding
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        atol = (2e-6 * gradient.abs().max() + 1e-7 * largest).item()
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=atol, msg=name)
    _, forward, *_ = model(torch.zeros(len(text), 3, 16, 16), text)
    assert torch.equal(forward, found)
    alone = model.encode_text(text[3:4], normalize=True)
    torch.testing.assert_close(alone, features[3:4], rtol=0, atol=2e-6)
    cropped.undo()
    assert torch.equal(gradients(model, text)[0], features)


def test_a_copy_crops_with_its_own_weights(tokens):
    model = model_of("CLIP")
    simplclip.crop_texts(model)
    other = copy.deepcopy(model)
    torch.nn.init.normal_(model.text_projection)
    assert not torch.equal(other.encode_text(texts()), model.encode_text(texts()))
    assert len(tokens) > 2
    other.encode_text.undo()
    tokens.clear()
    other.encode_text(texts())
    assert not tokens


def coca():
    text = TEXT | {"width": 16, "layers": 1, "embed_cls": True}
    return open_clip.CoCa(16, text | {"context_length": 13}, text, VIT | {"layers": 1})


def cropped_already():
    model = model_of("CLIP")
    simplclip.crop_texts(model)
    return model


def convolved():
    model = model_of("")
    model.text = TextTower(**TEXT | {"context_length": 40}, output_dim=16)  # MobileCLIP-S0's
    return model


def other_mask():
    model = model_of("CLIP")
    model.attn_mask[0, 5] = 0
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: model_of("", no_causal_mask=True), "every token sees every token"),
        (other_mask, "every token sees every token"),
        (lambda: model_of("", pool_type="last"), "pools by .last., not at the start"),
        (lambda: model_of("", embed_cls=True), "a class token, whose position depends on the le"),
        (convolved, "every token sees every token"),
        (coca, "CoCa, whose decoder reads the features of all tokens"),
        (cropped_already, "cropped already"),
        (lambda: torch.nn.Linear(2, 2), "Linear, which has no encode_text"),
        (lambda: torch.compile(model_of("CLIP")), "crop the texts of the model, then compile it"),
    ],
)
def test_towers_in_which_padding_counts_are_refused(make, reason):
    message = f"model: expected an open_clip model whose texts can be cropped, got .*{reason}"
    with pytest.raises(InputError, match=message):
        simplclip.crop_texts(make())


@pytest.mark.parametrize("kind", [HUGGING_FACE, PADDING_MASK])
def test_equal_tokens_at_the_end_are_no_padding_where_padding_is_masked(kind):
    model = model_of(kind)
    row = torch.tensor([[2, 10, *[7] * 38]])
    expected = model.encode_text(row)
    simplclip.crop_texts(model, multiple=1)
    assert torch.equal(model.encode_text(row), expected)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.prove)])
def test_an_exported_model_computes_whole_texts(strict):
    model = model_of("CLIP")
    simplclip.crop_texts(model)
    images = torch.zeros(len(LENGTHS), 3, 16, 16)
    exported = torch.export.export(model, (images, texts()), strict=strict).module()
    other = texts(LENGTHS[::-1])
    expected = model(images, other)[1]
    torch.testing.assert_close(exported(images, other)[1], expected, rtol=0, atol=2e-6)


def test_the_end_of_a_text_does_not_depend_on_what_pads_it():
    text = texts()
    other = torch.where(text == 0, 98, text)
    expected = [min(count + 1, 40) for count in LENGTHS]
    cropped = simplclip.crop_texts(model_of("CLIP"), multiple=1)
    assert cropped.rounded(text).tolist() == cropped.rounded(other).tolist() == expected


@pytest.mark.slow
def test_a_compiled_model_computes_few_lengths(tokens):
    model = model_of("CLIP")
    simplclip.crop_texts(model, multiple=16, groups=1)
    compiled = torch.compile(model, backend="eager")  # counts the graphs that the model is cut into
    for lengths in (LENGTHS, 4 * (3, 9, 4), 6 * (20, 17)):
        tokens.clear()
        text = texts(lengths)
        found = compiled(torch.zeros(len(text), 3, 16, 16), text)[1]
        assert [length for _, length in tokens] == [min(40, -(-(max(lengths) + 1) // 16) * 16)]
        expected = model_of("CLIP").encode_text(text, normalize=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
