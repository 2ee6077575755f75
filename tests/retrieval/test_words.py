"""A passage is grown to whole words, and no further."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.retrieval.words import REACH, cuts, whole_words

PLACES = [
    # `|` stands where a passage may begin or end, everything else between two characters lies inside a word.
    "|The| |ferry| |to| |Riga|.|",
    "|don't| |half-open| |COVID-19| |d’accord|",
    "|7,315.50| |at| |12:30|,| |2024-05-01|",
    "|foo|(|bar|.|baz|)| |snake_case|;|",
    "|end|.|Next| |-|5| |'|quoted|'|",
    "|naïve| |cafe\u0301| |Ελλάδα| |шлюз|",
    "|日|本|語|。|東|京|abc|と|",
    "|ภ|า|ษ|า|ไ|ท|ย|",
    "|ที่|นี่|",
    "|서울역에서| |만나요|",
    "|हिन्दी| |भाषा|",
    "|👩\u200d👩\u200d👧| |❤\ufe0f|",
]


@pytest.mark.parametrize("marked", PLACES)
def test_where_words_end(marked):
    text = marked.replace("|", "")
    allowed, at = set(), 0
    for character in marked:
        if character == "|":
            allowed.add(at)
        else:
            at += 1
    assert {at for at in range(len(text) + 1) if not cuts(text, at)} == allowed
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            expected = max(at for at in allowed if at <= start), min(at for at in allowed if at >= end)
            assert whole_words(text, start, end) == expected


@given(st.text(max_size=300), st.data())
def test_a_passage_only_grows_within_its_text_and_reach(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    first, last = whole_words(text, start, end)
    assert max(0, start - REACH) <= first <= start <= end <= last <= min(len(text), end + REACH)
    assert whole_words(text, first, last) == (first, last)


def test_what_no_word_can_be_is_left_cut():
    text = "x " + "a" * 500 + " y"
    assert whole_words(text, 200, 300) == (200, 300)
    assert whole_words(text, 2 + REACH, 502 - REACH) == (2, 502)
    assert whole_words(text, 3 + REACH, 501 - REACH) == (3 + REACH, 501 - REACH)
