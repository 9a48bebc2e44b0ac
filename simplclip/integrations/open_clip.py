"""Puts this library's losses in the place of open_clip's, for this process."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType

from simplclip import losses

LOSSES = {
    "ClipLoss": losses.ClipLoss,
    "SigLipLoss": losses.SigLipLoss,
    "CoCaLoss": losses.CoCaLoss,
    "DistillClipLoss": losses.WIKDLoss,
}


class use_losses(contextlib.AbstractContextManager):
    """Replaces ClipLoss, SigLipLoss, CoCaLoss and DistillClipLoss in the loaded modules of open_clip.

        use_losses()                        # from here on, in this process
        loss = open_clip.create_loss(args)  # makes ours

        with use_losses():                  # or within a block
            ...

    Modules of open_clip that are imported later take theirs from open_clip.loss, so that they have ours too. Losses that
    exist already, and names that other code imported before, stay. Signatures, values, gradients and distributed modes are
    open_clip's; see `simplclip.losses`.
    """

    def __init__(self) -> None:
        import open_clip.loss

        self._replaced: list[tuple[object, str, object]] = []
        theirs = {name: getattr(open_clip.loss, name) for name in LOSSES}
        for module in [
            m for name, m in list(sys.modules.items()) if name.partition(".")[0] in ("open_clip", "open_clip_train")
        ]:
            for name, loss in theirs.items():
                if getattr(module, name, None) is loss:
                    self._replaced.append((module, name, loss))
                    setattr(module, name, LOSSES[name])

    def undo(self) -> None:
        """Puts open_clip's losses back."""
        for module, name, loss in self._replaced:
            setattr(module, name, loss)
        self._replaced = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()
