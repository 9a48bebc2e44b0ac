"""The table of the terms of a loss: what the ops, losses, config and log say of a term.

Imports nothing, so that a config is checked without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A term of a loss."""

    name: str  # in `terms` and `weights` of the op and the losses
    weight: str  # the argument of WIKDLoss, and the key in the config's section loss
    open_clip_key: str = ""  # in the result of a loss, if open_clip has a name for it
    # The sweeps of similarity_loss that can compute it, the preferred one first. Without one it is
    # the method of WIKDLoss named after it, on features in the teacher's width.
    sweeps: tuple[str, ...] = ()
    is_base: bool = False  # whether it is a choice of loss.base in the config
    needs_teacher: bool = False
    needs_plane: bool = False
    compares_pairs: bool = True  # whether it says nothing about a batch of one pair
    # of the argument and key that is named after the term; the default first
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The term's key in the result of a loss."""
        return self.open_clip_key or self.column

    @property
    def column(self) -> str:
        """The term's column in metrics.csv."""
        return f"{self.name}_loss"


# In the order of the results of WIKDLoss and of the columns of metrics.csv.
TERMS = (
    Term("contrastive", weight="contrastive_weight", sweeps=("softmax",), is_base=True),
    Term(
        "sigmoid",
        weight="contrastive_weight",
        open_clip_key="contrastive_loss",
        sweeps=("sigmoid",),
        is_base=True,
    ),
    Term(
        "relational",
        weight="relational_weight",
        open_clip_key="distill_loss",
        sweeps=("softmax",),
        needs_teacher=True,
    ),
    Term("interactive", weight="interactive_weight", needs_teacher=True, choices=("infonce", "kl")),
    Term("feature", weight="feature_weight", needs_teacher=True, compares_pairs=False),
    Term("pair_matching", weight="pm_weight", sweeps=("softmax", "sigmoid"), needs_plane=True),
)
BY_NAME = {term.name: term for term in TERMS}
BASES = tuple(term.name for term in TERMS if term.is_base)
TEACHER_TERMS = frozenset(term.name for term in TERMS if term.needs_teacher)
PLANE_TERMS = frozenset(term.name for term in TERMS if term.needs_plane)
SWEPT = tuple(sorted(term.name for term in TERMS if term.sweeps))  # those of similarity_loss
