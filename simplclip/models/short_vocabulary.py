"""open_clip's tokenizer with a short vocabulary, for small models."""

from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from simplclip.common.errors import InputError


class ShortVocabTokenizer(SimpleTokenizer):
    """open_clip's tokenizer with only the first (most frequent) merges of its vocabulary.

    Rare words are split into more pieces, and a small model needs no embedding of 49,408 tokens. Start and end of text
    remain the two highest ids, as CLIP's pooling needs.
    """

    bpe_ranks: dict[tuple[str, str], int]
    vocab_size: int
    encoder: dict[str, int]
    decoder: dict[int, str]
    all_special_ids: list[int]

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(**options)
        merges = vocab_size - 2 * len(self.byte_encoder) - 2
        if not 0 <= merges <= len(self.bpe_ranks):
            raise InputError(f"vocab_size: expected 514 to {self.vocab_size}, got {vocab_size}")
        self.bpe_ranks = {pair: rank for pair, rank in self.bpe_ranks.items() if rank < merges}
        specials = [self.decoder[i] for i in self.all_special_ids]
        pieces = [*list(self.encoder)[: vocab_size - 2], *specials]
        self.encoder = {piece: i for i, piece in enumerate(pieces)}
        self.decoder = dict(enumerate(pieces))
        self.cache = {special: special for special in specials}
        self.vocab_size = len(pieces)
        self.all_special_ids = [self.encoder[special] for special in specials]
        self.sot_token_id, self.eot_token_id = self.all_special_ids
