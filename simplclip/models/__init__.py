"""Models by name: registry.py builds them, simplify.py replaces blocks of open_clip models, inherit.py copies weights."""

from simplclip.common.lazy import attribute

__all__ = ["PLAIN", "Spec", "create", "names", "spec_of", "tokenizer", "transforms"]  # noqa: PLE0605


def __getattr__(name: str):  # imported late, so that sources.py checks names before torch is imported
    return attribute(__name__, {"registry": tuple(__all__)}, name)
