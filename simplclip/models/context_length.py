"""Which captions a model's tokenizer cuts at the context length."""

from collections.abc import Sequence

from torch import Tensor

from simplclip.data.captions import spread
from simplclip.models.registry import Tokenizer

LOOKED_AT = 1000  # captions that are tokenised to count those that are cut


def is_cut(tokenize: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Returns whether each text has more tokens than the context length takes, boolean [N].

    tokenize: as `models.tokenizer` returns it. The texts are tokenised at twice the length too: a
    text that is not cut gets no more tokens there that differ from those of an empty text. This
    holds whatever a tokenizer puts at the start, at the end and in place of missing tokens.
    """
    length = tokenize([""]).shape[1]
    return _tokens_of(tokenize, texts, 2 * length) > _tokens_of(tokenize, texts, length)


def _tokens_of(tokenize: Tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Returns how many tokens of each text differ from those of an empty text, int64 [N]."""
    rows = tokenize([*texts, ""], context_length=length)  # type: ignore[call-arg]
    return (rows[:-1] != rows[-1]).sum(1)


def cut_in_words(tokenize: Tokenizer, captions: Sequence[str]) -> str | None:
    """Returns a sentence on how many captions are cut; None if none is, of up to LOOKED_AT."""
    looked_at = [captions[index] for index in spread(len(captions), LOOKED_AT)]
    if not looked_at:
        return None
    cut = int(is_cut(tokenize, looked_at).sum())
    if not cut:
        return None
    length = tokenize([""]).shape[1]
    return (
        f"{cut / len(looked_at):.1%} of {len(looked_at):,} captions looked at are cut, since they "
        f"have more than {length} tokens with start and end; write shorter ones, or train with a "
        "larger model.context_length"
    )
