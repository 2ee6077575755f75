"""Sentences cover the text that was asked for, and get the attention that fell on their tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.retrieval.sentences import Sentence, rank, split

LETTERS = st.text(alphabet="ab c.!?…。\n\"')é", max_size=1500)
WORDS = st.lists(
    st.sampled_from(["word", "Dr.", "End.", "Why?", "\n\n", "\n", " ", "x" * 700, "“Oh!”", "文。", "a"]), max_size=80
).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.one_of(LETTERS, WORDS), st.data())
def test_sentences_cover_what_was_asked_for(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    found = split(text, start, end)
    for a, b in found:
        assert 0 <= a < b <= len(text)
        assert b - a <= 600
        assert text[a:b] == text[a:b].strip()
        assert a < end and b > start, "a sentence that was not touched"
        assert a >= start - 300 and b <= end + 300
    assert all(b <= c for (_, b), (c, _) in itertools.pairwise(found)), "in order, and none twice"
    held = {at for a, b in found for at in range(a, b)}
    missed = [text[at] for at in range(start, end) if at not in held]
    assert not "".join(missed).strip(), "characters in no sentence"


def test_sentences_are_whole_though_a_page_is_cut():
    first = "The harbour board met in the second week of May."
    second = "The code of the gate is 7315, and Lise keeps it."
    third = "Nobody has asked for it since the flood of last year!"
    text = f"{first} {second} {third}"
    at = text.index("7315")
    assert [text[a:b] for a, b in split(text, at, at + 4)] == [second]
    assert [text[a:b] for a, b in split(text, at, len(text))] == [second, third]
    assert [text[a:b] for a, b in split(text, 0, len(text))] == [first, second, third]
    assert [text[a:b] for a, b in split(text, len(first) - 1, len(first) + 2)] == [first, second]


@pytest.mark.parametrize(
    "text,count",
    [
        ("One sentence that is long enough. Another sentence that is long enough.", 2),
        ("One sentence “that is long enough.” Another sentence that is long enough.", 2),
        ("A heading of a chapter of a book\n\nAnother sentence that is long enough", 2),
        ("A line of a paragraph of a book\nand the next line that goes on with it", 1),
        (
            "门的密码是七三一五七三一五七三一五七三一五七三一五七三一五。钥匙在丽丝那里在丽丝那里在丽丝那里在丽丝那里在丽丝那里。",
            2,
        ),
        ("See Fig. 3. The rest of it is a sentence.", 1),
        ("Version 3.14159 of the programme is the newest of all.", 1),
    ],
)
def test_where_a_sentence_ends(text, count):
    assert len(split(text, 0, len(text))) == count


def test_text_without_an_end_is_followed_so_far_and_cut():
    text = "word " * 1000
    assert split(text, 2000, 2100) == [(1700, 2299)]
    assert split(text, 2000, 3000) == [(1700, 2299), (2300, 2899), (2900, 3299)]


def test_nothing_is_found_in_nothing():
    assert split("", 0, 0) == []
    assert split(" \n\n ", 0, 4) == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sentences_share_out_the_attention(data):
    # Tokens of 1 to 9 characters, one after the other, in two documents; what is asked for is the second.
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    own = list(itertools.pairwise(edges))
    first = data.draw(st.integers(0, 5))
    offsets = [(100 * i, 100 * i + 100) for i in range(first)] + own + [(-1, -1), (0, 5), (5, 9)]
    mass = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=len(own), max_size=len(own))), dtype=torch.float64)
    # Spans that begin and end with tokens and leave none out: every token is some sentence's, and one's alone.
    cuts = sorted({0, len(own), *data.draw(st.lists(st.integers(0, len(own)), max_size=5))})
    spans = [(edges[a], edges[b]) for a, b in itertools.pairwise(cuts)]
    found = rank(mass, offsets, first, 7, spans)
    assert [(s.document, s.start, s.end) for s in found] == [(7, *span) for span in spans]
    for sentence, (a, b) in zip(found, itertools.pairwise(cuts), strict=True):
        assert sentence.mass == pytest.approx(float(mass[a:b].sum()), abs=1e-9)
    assert sum(sentence.mass for sentence in found) == pytest.approx(float(mass.sum()), abs=1e-9)


def test_attention_between_two_sentences_is_neithers():
    offsets = [(0, 3), (3, 4), (4, 5), (5, 8)]
    found = rank(torch.tensor([1.0, 10.0, 100.0, 1000.0]), offsets, 0, 0, [(0, 3), (5, 8)])
    assert found == [Sentence(0, 0, 3, 1.0), Sentence(0, 5, 8, 1000.0)]


def test_a_token_that_carries_the_space_before_it_is_the_sentences():
    # "One two. Six ten." as byte-level tokenizers cut it, that of the default model too.
    offsets = [(0, 3), (3, 7), (7, 8), (8, 12), (12, 16), (16, 17)]
    found = rank(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), offsets, 0, 0, [(0, 8), (9, 17)])
    assert [sentence.mass for sentence in found] == [7.0, 56.0]
