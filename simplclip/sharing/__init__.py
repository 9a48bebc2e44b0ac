"""`simplclip share`: which blocks of a pretrained tower have similar attention maps, so that they may share weights."""

from simplclip.sharing.report import run

__all__ = ["run"]
