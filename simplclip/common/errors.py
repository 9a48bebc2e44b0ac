"""Errors that a user can fix. The command line prints only their message; all other errors keep their traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base class of errors that a user can fix; the message says what was expected and what it got."""


class InputError(UserError, ValueError):
    """An argument, file or setting is not valid; the message names it."""
