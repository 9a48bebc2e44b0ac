"""Errors that a user can fix.

The command line prints only their message; all other errors keep their traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Base class of errors that a user can fix; the message says what was expected and what it
    got.
    """


class InputError(UserError, ValueError):
    """An argument, file or setting is not valid; the message names it."""


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


def visible(text: str, keep: str = "") -> str:
    """Returns `text` for a terminal: `repr`'s escapes replace unprintable characters, such as
    escape sequences.

    keep: characters that stay as they are, e.g. line ends.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
