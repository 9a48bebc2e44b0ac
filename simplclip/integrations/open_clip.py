"""Puts this library's losses in the place of open_clip's, for this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, TracebackType

from simplclip import losses

LOSSES = {
    "ClipLoss": losses.ClipLoss,
    "SigLipLoss": losses.SigLipLoss,
    "CoCaLoss": losses.CoCaLoss,
    "DistillClipLoss": losses.WIKDLoss,
}
_in_force: list[use_losses] = []
_pairs: list[tuple[type, type]] = []  # open_clip's class and ours, while a use is in force
_replaced: list[tuple[ModuleType, str, type]] = []  # names of modules that stood for open_clip's class, and that class


class use_losses(contextlib.AbstractContextManager):
    """Replaces ClipLoss, SigLipLoss, CoCaLoss and DistillClipLoss of open_clip in all loaded modules.

        use_losses()                        # from here on, in this process
        loss = open_clip.create_loss(args)  # makes ours

        with use_losses():                  # or within a block
            ...

    `from open_clip import ClipLoss`, before or after it and under any name, gives ours: each global name of a module that
    stands for one of the classes is replaced, and modules that are imported later take ours from open_clip.loss. It does not
    reach a class that is held otherwise (a local variable, a default value, an item of a container, an attribute of a class),
    losses and subclasses that exist already, and other processes. A subclass made before must call `super().__init__()`;
    with `ClipLoss.__init__(self)` it fails meanwhile.

    Uses may overlap: open_clip's classes return when the last one is undone, in whatever order, to each name that still
    stands for ours. A module outside of open_clip that was first imported meanwhile keeps ours.

    Signatures, values, gradients and distributed modes are open_clip's; see `simplclip.losses`. DistillClipLoss becomes
    WIKDLoss, which lacks the `dist_loss` and `get_logits` that a subclass might call.
    """

    def __init__(self) -> None:
        import open_clip.loss

        if not _in_force:
            _pairs[:] = [(getattr(open_clip.loss, name), ours) for name, ours in LOSSES.items()]
        _in_force.append(self)
        for theirs, ours in _pairs:
            for module, name in list(_names_of(theirs)):
                _replaced.append((module, name, theirs))
                setattr(module, name, ours)

    def undo(self) -> None:
        """Puts open_clip's losses back, unless another use is in force."""
        if self not in _in_force:
            return
        _in_force.remove(self)
        if _in_force:
            return
        for theirs, ours in _pairs:
            meanwhile = [(module, name, theirs) for module, name in _names_of(ours) if _is_open_clips(module)]
            for module, name, loss in _replaced + meanwhile:
                if loss is theirs and vars(module).get(name) is ours:
                    setattr(module, name, theirs)
        _replaced.clear()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def _names_of(loss: type) -> Iterator[tuple[ModuleType, str]]:
    """The global names of loaded modules that stand for this class."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            yield from ((module, name) for name, value in list(vars(module).items()) if value is loss)


def _is_open_clips(module: ModuleType) -> bool:
    return module.__name__.partition(".")[0] in ("open_clip", "open_clip_train")
