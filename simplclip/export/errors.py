"""Errors of an export."""

from simplclip.common.errors import InputError


class ExportError(InputError):
    """The model cannot be exported, or its export computes other values."""
