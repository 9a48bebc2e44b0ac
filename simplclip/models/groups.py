"""Blocks by their indices in a tower, and groups of them that share weights, as users write them."""

from collections.abc import Mapping, Sequence
from numbers import Integral

from simplclip.common.errors import InputError
from simplclip.nn import SHARED_PARTS

Groups = Sequence[Sequence[int]]


def indices(name: str, wanted: Sequence[int], count: int) -> list[int]:
    """The indices from 0 of `wanted`, of which negative ones count from the end of `count` blocks."""
    if not wanted:
        raise InputError(f"{name}: expected at least one index, got none")
    for index in wanted:
        if not -count <= index < count:
            raise InputError(f"{name}: expected an index of {count} blocks, got {index}")
    return [index % count for index in wanted]


def shares(wanted: Groups | Mapping[str, Groups], replaced: list[int], count: int) -> dict[str, list[list[int]]]:
    """The groups of a tower by what they share, see `simplify`, with indices from 0. `replaced`: the tower's new blocks."""
    parts: Mapping[str, Groups] = wanted if isinstance(wanted, Mapping) else {"all": wanted}
    if unknown := [what for what in parts if what not in SHARED_PARTS]:
        raise InputError(f"share: expected groups, or groups by names out of {SHARED_PARTS}, got {unknown[0]!r}")
    found = {}
    for what, groups in parts.items():
        lists = isinstance(groups, Sequence) and all(isinstance(group, Sequence) for group in groups)
        if not lists or not all(isinstance(i, Integral) for group in groups for i in group):
            raise InputError(f"share: expected a list of groups of indices such as [[0, 1]], got {groups!r}")
        found[what] = [indices("share", group, count) for group in groups]
        if missing := [i for group in found[what] for i in group if i not in replaced]:
            raise InputError(f"share: expected indices of replaced blocks, {replaced}, got {missing}")
    for part in ("attention", "mlp"):
        every = [i for what in (part, "all") for group in found.get(what, ()) for i in group]
        if twice := sorted({i for i in every if every.count(i) > 1}):
            raise InputError(f"share: expected disjoint groups, got block {twice[0]} twice for {part}")
    return {what: groups for what, groups in found.items() if groups}
