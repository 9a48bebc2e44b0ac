"""The name that a user probably meant by one that does not exist."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher

LEAST = 0.75  # score of a name that is near
SAME_WORD = 0.8  # similarity of two words that are taken for one
IN_MEANING = 0.9  # score of a word that only the help has
IN_ASKED = 0.8  # score of a name that is a part of what was asked
TIE = 0.05  # largest addition for a similar section, and for a name that is asked as a whole


def nearest(asked: str, meanings: Mapping[str, str]) -> str | None:
    """Returns the name that is most like `asked`, by spelling or by meaning; None if none is near.

    meanings: name -> its help. A section before a dot counts little; initials stand for words.
    """
    scores = {name: _score(asked, name, meaning) for name, meaning in meanings.items()}
    best = max(scores, key=lambda name: scores[name], default=None)
    return best if best is not None and scores[best] >= LEAST else None


def _score(asked: str, name: str, meaning: str) -> float:
    """Returns how near a name is: from 0 to 1, and at most twice TIE more."""
    asked_section, _, asked = asked.rpartition(".")
    section, _, name = name.rpartition(".")
    words, own, explained = _words(asked), _words(name), _words(meaning)
    if not words or not own:
        return 0.0
    asked_for = [word for word in own if _is_among(word, words)]
    tie = TIE if len(asked_for) == len(own) else 0.0
    if asked_section and section:
        tie += TIE * _likeness(asked_section, section)
    if _initials(words) == own or _initials(own) == words:
        return 1.0 + tie
    found = 0.0
    for word in words:
        if _is_among(word, own):
            found += 1
        elif any(word == other or _begins(word, other, 4) for other in explained):
            found += IN_MEANING
    letters = _likeness("_".join(words), "_".join(own))
    return max(letters, found / len(words), IN_ASKED * len(asked_for) / len(own)) + tie


def _words(text: str) -> list[str]:
    """Returns the words and numbers of a text, in small letters."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _initials(words: list[str]) -> list[str]:
    """Returns the word of the initials of several words, [] of a single one."""
    return ["".join(word[0] for word in words)] if len(words) > 1 else []


def _likeness(a: str, b: str) -> float:
    """Returns the share of equal letters of two texts."""
    return SequenceMatcher(None, a, b).ratio()


def _is_among(word: str, names: list[str]) -> bool:
    """Whether a word is nearly one of `names`, or a shorter or longer form of one."""
    return any(_likeness(word, name) >= SAME_WORD or _begins(word, name, 3) for name in names)


def _begins(a: str, b: str, letters: int) -> bool:
    """Whether one of two words, of at least so many letters, begins the other one."""
    short, long = sorted((a, b), key=len)
    return len(short) >= letters and long.startswith(short)
