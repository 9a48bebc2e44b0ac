"""What an export raises."""

from simplclip.common.errors import InputError


class ExportError(InputError):
    """A model that cannot be exported, or whose export computes something else."""
