"""Errors that a user can fix.

The command line prints only their message; all other errors keep their traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Base class; the message says what was expected and what it got."""


class InputError(UserError, ValueError):
    """An argument, file or setting is not valid; the message names it."""


def check_count(name: str, value: int, least: int) -> None:
    """Raises InputError unless `value` is an int (no bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected an integer of at least {least}, got {value!r}")


def visible(text: str, keep: str = "") -> str:
    """Returns `text` with `repr`'s escapes in place of unprintable characters, for a terminal.

    keep: characters that stay as they are, such as line ends.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
