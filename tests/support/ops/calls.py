"""Calls of ops, beside selftest's, and a record of the calls that others make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from simplclip.common.terms import SWEPT as TERMS
from simplclip.ops import registry
from simplclip.selftest.calls import (
    CALLS,
    Call,
    attention_call,
    feature_call,
    mlp_call,
    of_lengths,
    similarity_call,
)


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Returns a list to which each call of an op from here on is added, as (name, call)."""
    recorded, original = [], registry.call

    def recording(op: Any, call: Any, *spec: Any) -> Any:
        recorded.append((op.name, call))
        return original(op, call, *spec)

    monkeypatch.setattr(registry, "call", recording)
    return recorded


# Calls of selftest as "OP NUMBER", and calls of more tiles and chunks, the last one partial.
LARGE: dict[str, Callable[[], Call]] = {
    **{f"{op} {i}": make for op, several in CALLS.items() for i, make in enumerate(several)},
    "similarity_loss every term": partial(similarity_call, 257, 257, terms=TERMS, ids=True),
    "similarity_loss 1000": partial(similarity_call, 1000, 1000, terms=TERMS[:2]),
    "shaped_attention 288": lambda: of_lengths(
        attention_call(2, 288, 1, 80, causal=True), [288, 285]
    ),
    "shaped_attention 250": lambda: of_lengths(attention_call(4, 250, 2, 8), [250, 0, 125, 1]),
    # more hidden rows than 8 MiB hold
    "parallel_mlp chunks": partial(mlp_call, 1300, 8, 4096, 8),
    "feature_loss 3001": partial(feature_call, 3001, 65),
}
