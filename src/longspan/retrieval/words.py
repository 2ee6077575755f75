"""Where words begin and end, so that a passage cut at a token's edge is not cut inside a word.

Tokens end where a tokenizer likes, pages of 64 tokens end at a token. A word here is what a reader sees as one: letters
and digits, with an apostrophe or hyphen inside, digits with a point, comma or colon inside. In scripts that put no
spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) a passage may end after every character, but never
between a character and its accent or vowel sign. No dictionary is known, and no language.
"""

from __future__ import annotations

import re
import unicodedata

REACH = 64
"""Characters that a passage grows on either side at most: what is longer (a hash, a line of base64) is no word."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without spaces between words, for a regular expression: Thai to Khmer, kana, Han. Korean has spaces."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_JOINS_LETTERS, _JOINS_DIGITS = "'’-\u2010\u2011\u00ad", ".,:"
_ZERO_WIDTH_JOINER = "\u200d"


def whole_words(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the least stretch around `text[start:end]` that cuts no word; a side with none within reach stays."""
    return _edge(text, start, -1), _edge(text, end, 1)


def _edge(text: str, at: int, step: int) -> int:
    for moved in range(REACH + 1):
        place = at + step * moved
        if not cuts(text, place):
            return place
    return at


def cuts(text: str, at: int) -> bool:
    """Return whether the place before the character `at` lies inside a word."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after)[0] == "M" or _ZERO_WIDTH_JOINER in (before, after):
        return True
    if _in_word(before) and _in_word(after):
        return True
    if _in_word(before):
        return at + 1 < len(text) and _joined(before, after, text[at + 1])
    return at > 1 and _in_word(after) and _joined(text[at - 2], before, after)


def _in_word(character: str) -> bool:
    """Return whether a character is a part of words that stand between spaces."""
    known = character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
    return known and not _UNSPACED.match(character)


def _joined(left: str, mark: str, right: str) -> bool:
    if mark in _JOINS_DIGITS:
        return left.isdigit() and right.isdigit()
    return mark in _JOINS_LETTERS and _in_word(left) and _in_word(right)
