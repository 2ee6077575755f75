"""Whether an answer's own words stand in what was read."""

import pytest

from longspan.retrieval.grounding import answers_alone, support

SENTENCE = "The mascot of the Haifa rowing club is an otter."
QUESTION = "What is the mascot of the Haifa rowing club?"


@pytest.mark.parametrize(
    "answer,expected",
    [
        ("The mascot of the Haifa rowing club is an otter.", 1.0),
        ("An otter!", 1.0),
        ("Otters.", 1.0),  # the stem is the same
        ("The Haifa rowing club is a team of hairdressers.", 0.0),
        ("An otter, or a hairdresser.", 0.5),
        ("The mascot of the Haifa rowing club.", 0.0),  # the question again: nothing is answered
        ("", 0.0),
    ],
)
def test_share_of_new_words_that_were_read(answer, expected):
    assert support(answer, QUESTION, [SENTENCE]) == expected


def test_numbers_are_words():
    read = ["The vault opens with 55172."]
    assert support("It is 55172.", "Which code opens the vault?", read) == 1.0
    assert support("It is 55173.", "Which code opens the vault?", read) == 0.0


@pytest.mark.parametrize("answer", ["Yes.", "No.", "Yes, the mascot is an otter.", "The mascot is an otter.", "Ja!"])
def test_a_yes_or_no_question_without_new_words_is_not_judged(answer):
    assert support(answer, "Is the mascot an otter?", [SENTENCE]) is None


def test_yes_answers_no_question_for_something():
    assert support("Yes.", QUESTION, [SENTENCE]) == 0.0


def test_several_texts_count_together():
    assert support("Otter and goulash.", "What are they?", [SENTENCE, "They cook goulash."]) == 1.0


def test_a_text_answers_alone_if_it_has_every_word_of_a_question_for_one_thing():
    text = 'When a name is not found at all, a "NameError" exception is raised.'
    assert answers_alone(text, "Which exception is raised when a name is not found at all?")
    assert not answers_alone(text, "Which exception is raised when an index is not found?")
    assert not answers_alone(text, "Which exception is raised, and when is the name found?")
    assert not answers_alone(text, "Who or what?") and not answers_alone(text, "?")
