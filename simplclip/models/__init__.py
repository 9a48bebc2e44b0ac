"""Models by name: registry.py builds them, simplify.py replaces blocks of open_clip models, inherit.py copies weights."""

from simplclip.models.registry import PLAIN, Spec, create, names, spec_of, tokenizer, transforms

__all__ = ["PLAIN", "Spec", "create", "names", "spec_of", "tokenizer", "transforms"]
