"""Models by name: registry.py builds them, simplify.py replaces blocks of open_clip models, inherit.py copies weights."""

from simplclip.models.registry import (
    PLAIN,
    ShortVocabTokenizer,
    Spec,
    check_shape,
    create,
    names,
    original,
    spec_of,
    tokenizer,
    transforms,
)

__all__ = [
    "PLAIN", "ShortVocabTokenizer", "Spec", "check_shape", "create", "names", "original", "spec_of", "tokenizer",
    "transforms",
]  # fmt: skip
