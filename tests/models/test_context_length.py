"""Captions that a tokenizer cuts are found, whatever the tokenizer."""

import open_clip
import pytest
from open_clip.tokenizer import HFTokenizer

from simplclip import models
from simplclip.models.registry import cut_in_words

WORDS = {"cat": 3, "a": 4, "!": 5}


def fast_tokenizer(folder, end, pad):
    """Writes a tokenizer of transformers whose texts end in `end`; returns its path."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"<unk>": 0, end: 1, pad: 2} | WORDS, unk_token="<unk>")
    backend = tokenizers.Tokenizer(words)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=end, unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return str(folder)


# each with the tokens beside those of words
KINDS = {
    "siclip-tiny": (lambda folder: models.tokenizer("siclip-tiny"), 2),
    "siclip-lite0": (lambda folder: models.tokenizer("siclip-lite0"), 2),
    "open_clip": (lambda folder: open_clip.SimpleTokenizer(context_length=9), 2),
    # SigLIP's end is its padding
    "siglip": (lambda folder: HFTokenizer(fast_tokenizer(folder, "</s>", "</s>"), 16), 1),
    "t5": (lambda folder: HFTokenizer(fast_tokenizer(folder, "</s>", "<pad>"), 16), 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_texts_above_the_context_length_are_cut(tmp_path, kind):
    make, more = KINDS[kind]
    tokenize = make(tmp_path)
    length = tokenize(["a"]).shape[1]
    numbers = [1, 2, length - more - 1, length - more, length - more + 1, length, 10 * length]
    before = tokenize(["a cat"])
    for word in ("cat", "a"):
        for number in numbers:
            cut = cut_in_words(tokenize, [" ".join(number * [word])])
            assert (cut is not None) == (number + more > length)
    assert cut_in_words(tokenize, [""]) is None
    assert (tokenize(["a cat"]) == before).all(), "the length is as before"


def test_the_share_in_words():
    tokenize = models.tokenizer("siclip-tiny")
    texts = [*1900 * ["a cat"], *100 * [20 * "a "]]
    assert cut_in_words(tokenize, texts) == (
        "5.0% of 1,000 captions looked at are cut, since they have more than 16 tokens with start "
        "and end; write shorter ones, or train with a larger model.context_length"
    )
    assert cut_in_words(tokenize, texts[:1900]) is None
    assert cut_in_words(tokenize, []) is None
