"""The calls of ops that a test makes."""

from simplclip.ops import registry


def calls(monkeypatch) -> list:
    """Returns a list to which each call of an op from here on is added, as (name, call)."""
    recorded, call = [], registry.call

    def recording(op, of_call, *spec):
        recorded.append((op.name, of_call))
        return call(op, of_call, *spec)

    monkeypatch.setattr(registry, "call", recording)
    return recorded
