"""Errors that a user can mend. The command line prints their message alone; all other errors keep their traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base class of errors whose message says what was expected and what was given."""


class InputError(UserError, ValueError):
    """An argument, a file or a setting that cannot be used; the message names it."""
