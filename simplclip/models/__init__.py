"""Models by name: registry.py builds, simplify.py replaces blocks, inherit.py copies weights."""

import typing as _typing

from simplclip.common.lazy import attribute as _attribute

if _typing.TYPE_CHECKING:
    from simplclip.models.registry import PLAIN, Spec, create, names, spec_of, tokenizer, transforms

__all__ = ["PLAIN", "Spec", "create", "names", "spec_of", "tokenizer", "transforms"]

if not _typing.TYPE_CHECKING:  # a type checker would take any name for known
    # imported late, so that source.py checks names before torch is imported
    def __getattr__(name: str) -> _typing.Any:
        """Returns a public name of registry.py, imported then; AttributeError for others."""
        return _attribute(__name__, {"registry": tuple(__all__)}, name)
