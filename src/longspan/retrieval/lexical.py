"""Passages ranked by the words they share with a question: BM25.

S. Robertson and H. Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", Foundations and Trends
in Information Retrieval 3(4), 2009, doi:10.1561/1500000019. For a word that occurs `f` times in a passage of
`l` words the passage scores `idf * f / (f + k1 (1 - b + b l / mean l))`, and for a query the sum over its words.
`idf = ln(1 + (P - p + 0.5) / (p + 0.5))`, where `p` of the `P` passages hold the word; that is Lucene's idf,
positive for every word, so that a match never costs.

What this does not know: synonyms, word order, negation, meaning. A question in other words than the text's
finds nothing.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from longspan.errors import UnknownNameError, UsageError
from longspan.retrieval.words import UNSPACED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_K1 = 1.5  # how slowly further occurrences of a word stop counting
_B = 0.75  # how much a long passage is discounted

# Scripts without spaces between words, and Hangul, whose particles cling to the word: their runs are cut into
# characters and pairs of characters, the usual stand-in for a dictionary.
_UNSPACED = f"{UNSPACED}\uac00-\ud7af"
# Vowel signs and accents inside a word, which Python's \w leaves out (Hebrew, Arabic, the scripts of India).
_SIGNS = "\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0981-\u0dff"
# An underscore parts words: max_tokens is found by "max tokens".
_ASCII_TOKEN = re.compile("[0-9a-z]+")
_TOKEN = re.compile(f"([{_UNSPACED}]+)|((?:[^\\W_{_UNSPACED}]|[{_SIGNS}])+)")


class LexicalIndex:
    """BM25 over passages held in memory; the module tells the formula, its source and what it does not know.

    `language` names the stemmer (English takes "walked" for "walks", but not "found" for "find") and the stop
    words that go with it. "none" takes every word as it is, which suits code, Chinese and mixed languages.
    """

    def __init__(self, passages: Sequence[str], language: str = "english") -> None:
        """Index the passages.

        Raises:
            UnknownNameError: there is no stemmer for `language`; the message lists those there are.
        """
        self.language = language
        self._size = len(passages)
        self._columns: dict[str, int] = {}  # stem -> its column in the score matrix
        stems = Stems(language)
        columns = self._columns
        rows = [[columns.setdefault(stem, len(columns)) for stem in stems(passage)] for passage in passages]
        self._bm25: Any = None
        if columns:  # bm25s can't divide by a mean length of nothing
            bm25s = _bm25s()
            self._bm25 = bm25s.BM25(k1=_K1, b=_B, method="lucene")
            self._bm25.index((rows, columns), create_empty_token=False, show_progress=False)

    def __len__(self) -> int:
        return self._size

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """Return every passage's score, float32 `[passages]`: 0 where no word matches, and for an empty query."""
        import numpy as np

        # A stemmer of its own for each call: they hold buffers, so that two threads can't share one.
        stems = Stems(self.language)(query)
        found = [self._columns[stem] for stem in stems if stem in self._columns]
        if not found:
            return np.zeros(self._size, dtype=np.float32)
        scores: npt.NDArray[np.float32] = self._bm25.get_scores_from_ids(found)
        return scores

    def search(self, query: str, k: int) -> list[tuple[int, float]]:
        """Return up to `k` passages as (index, score), best first, ties in order of the text; matches only.

        Raises:
            UsageError: `k` is negative.
        """
        if k < 0:
            raise UsageError(f"k must be 0 or more, not {k}")
        scores = self.scores(query)
        order = (-scores).argsort(kind="stable")[:k]
        return [(int(i), float(scores[i])) for i in order if scores[i] > 0]


class Stems:
    """Text to the list of its words' stems, stop words left out; each distinct word is stemmed once."""

    def __init__(self, language: str) -> None:
        """Take a language as `LexicalIndex` does (UnknownNameError: no stemmer for it)."""
        self._known = dict.fromkeys(_stop_words(language), "")
        self._stem: Callable[[str], str] = str
        if language != "none":
            import Stemmer

            self._stem = Stemmer.Stemmer(language, 0).stemWord  # 0: its own cache is small, and slow once full

    def __call__(self, text: str) -> list[str]:
        """Return the stems of a text's words, in order."""
        stems = []
        for word in _words(text):
            stem = self._known.get(word)
            if stem is None:
                stem = self._known[word] = self._stem(word)
            if stem:
                stems.append(stem)
        return stems


def _words(text: str) -> Iterator[str]:
    # NFKC: a PDF's ligatures, full-width letters and split accents are spelt as everyone types them.
    text = unicodedata.normalize("NFKC", text).casefold()
    if text.isascii():  # a third of the time
        yield from _ASCII_TOKEN.findall(text)
        return
    for unspaced, word in _TOKEN.findall(text):
        if word:
            yield word
        else:
            yield from unspaced
            yield from (unspaced[i : i + 2] for i in range(len(unspaced) - 1))


@functools.cache
def _bm25s() -> Any:
    """Import bm25s without JAX, which it would start where it is installed: that takes most of a GPU's memory."""
    unwanted = "jax" not in sys.modules
    if unwanted:
        sys.modules["jax"] = None  # type: ignore[assignment]
    try:
        import bm25s
        import bm25s.stopwords
    finally:
        if unwanted:
            del sys.modules["jax"]
    return bm25s


@functools.cache
def _stop_words(language: str) -> frozenset[str]:
    if language == "none":
        return frozenset()
    import Stemmer

    stop_words = _bm25s().stopwords

    if language not in Stemmer.algorithms():
        raise UnknownNameError(f"no stemmer for {language!r}; choose none, {', '.join(Stemmer.algorithms())}")
    # The longer English list has the question words, which would favour passages that ask something.
    name = "STOPWORDS_EN_PLUS" if language in {"english", "porter"} else f"STOPWORDS_{language.upper()}"
    return frozenset(word for entry in getattr(stop_words, name, ()) for word in _words(entry))
