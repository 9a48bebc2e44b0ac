"""Errors that a user can fix. The command line prints only their message; all other errors keep their traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base class of errors that a user can fix; the message says what was expected and what it got."""


class InputError(UserError, ValueError):
    """An argument, file or setting is not valid; the message names it."""


def visible(text: str, keep: str = "") -> str:
    """Text for a terminal: what cannot be printed, such as escape sequences and bytes that are not UTF-8, as in `repr`.

    keep: characters that stay as they are, e.g. line ends.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)
