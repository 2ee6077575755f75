"""RULER as it is published, held against what is asked here: counts, lengths and forms of answers, read off prompts.

The figures are those of NVIDIA/RULER (`scripts/synthetic.yaml`, `scripts/data/synthetic/constants.py`) and of the paper
(arXiv 2404.06654, section 3 and appendix B), written down by hand: nothing of `ruler/` is asked for them.
"""

import re
from collections import Counter

import pytest

from longspan.evals.questions.making import examples
from longspan.evals.questions.passages import shipped
from longspan.evals.questions.scoring import score
from longspan.evals.questions.sources import Sources
from longspan.evals.ruler.tasks import RULER

SOURCES = Sources(essay=" ".join(shipped()[0].documents))
WORDS, NUMBERS, UUIDS = r"[a-z]+-[a-z]+(?:-[a-z]+)?", r"\d{7}", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")

# Haystack, form of keys, form of values, keys hidden, values a key, keys asked for.
NEEDLES = {
    "niah_single_1": ("noise", WORDS, NUMBERS, 1, 1, 1),
    "niah_single_2": ("essay", WORDS, NUMBERS, 1, 1, 1),
    "niah_single_3": ("essay", WORDS, UUIDS, 1, 1, 1),
    "niah_multikey_1": ("essay", WORDS, NUMBERS, 4, 1, 1),
    "niah_multikey_2": ("needle", WORDS, NUMBERS, 1, 1, 1),
    "niah_multikey_3": ("needle", UUIDS, UUIDS, 1, 1, 1),
    "niah_multivalue": ("essay", WORDS, NUMBERS, 1, 4, 1),
    "niah_multiquery": ("essay", WORDS, NUMBERS, 4, 1, 4),
}
ANSWERS = {**dict.fromkeys(NEEDLES, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
"""Tokens of an answer."""


def asked(task, length=4096, count=6):
    return examples(RULER, task, str.split, length, count, 11, sources=SOURCES)


def test_the_tasks_are_the_published_thirteen():
    assert list(RULER.tasks) == [*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert {made.task: made.max_tokens for task in RULER.tasks for made in asked(task, count=1)} == ANSWERS


@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("task", ANSWERS)
def test_the_published_lengths_are_filled_and_not_passed(task, length):
    """RULER counts prompt and answer together, and adds haystack as long as it fits."""
    for made in asked(task, length, 2):
        total = sum(len(text.split()) for text in (made.context, made.closing)) + ANSWERS[task]
        assert total == made.tokens <= length
        assert total > length - 130, "a unit of haystack is at most a document"


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_have_the_published_counts_and_forms(task):
    hay, key_form, value_form, keys, values, queries = NEEDLES[task]
    for made in asked(task):
        found = NEEDLE.findall(made.context)
        assert len(found) == keys * values if hay != "needle" else len(found) > 100
        assert all(re.fullmatch(key_form, key) and re.fullmatch(value_form, value) for _, key, value in found)
        of = Counter(key for _, key, _ in found)
        assert set(of.values()) == {values} and (hay == "needle" or len(of) == keys)
        assert len(made.outputs) == queries * values
        named = [key for key in of if key in made.question]
        assert len(named) == queries and named and all(key in made.answer_prefix for key in named)
        assert sorted(made.outputs) == sorted(value for _, key, value in found if key in named)


def test_needles_in_prose_stand_at_the_published_depths():
    """Some of 40 depths, evenly from 0 to 100 %."""
    depths = [depth for made in asked("niah_multikey_1", 8192, 30) for depth in made.depths]
    steps = [min(abs(depth - round(100 * i / 39) / 100) for i in range(40)) for depth in depths]
    assert len(depths) == 120 and max(steps) < 0.02
    assert all(25 <= sum(low <= depth < low + 0.5 for depth in depths) <= 95 for low in (0.0, 0.5))


def test_tracking_has_one_chain_of_four_hops():
    for made in asked("vt"):
        value = re.search(r"the value (\d{5})", made.question)[1]
        body = made.context[made.context.rindex("Follow the chain") :]
        steps = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)$", body, re.MULTILINE)
        assert len(steps) == 5 and steps[0][1] == value
        assert [source for _, source in steps[1:]] == [name for name, _ in steps[:-1]], "in order, one from another"
        assert tuple(name for name, _ in steps) == made.outputs


@pytest.mark.parametrize("length, often, seldom", [(2048, 6, 1), (4096, 30, 3), (8192, 30, 3)])
def test_common_words_have_the_published_counts(length, often, seldom):
    for made in asked("cwe", length):
        body = made.context[made.context.rindex("Below is a numbered list") :]
        counts = Counter(re.findall(r"\d+\. (\S+)", body))
        assert Counter(counts.values())[often] == 10 == len(made.outputs) and set(counts.values()) == {often, seldom}
        assert {word for word, count in counts.items() if count == often} == set(made.outputs)


def test_frequent_words_follow_zetas_law_with_alpha_2():
    for made in asked("fwe", 8192):
        counts = Counter(re.findall(r"\b[a-z]{6}\b(?= )|\.\.\.", made.context[made.context.index("ones. ") + 6 :]))
        noise = counts.pop("...")
        ranked = counts.most_common()
        assert [word for word, _ in ranked[:3]] == list(made.outputs)
        for rank, (_, count) in enumerate(ranked[:3], 2):
            assert count == pytest.approx(noise / rank**2, rel=0.05)


@pytest.mark.parametrize("task, needed", [("qa_1", 1), ("qa_2", 2)])
def test_questions_stand_under_numbered_documents_and_any_answer_counts(task, needed):
    for made in asked(task):
        numbers = [int(number) for number in re.findall(r"^Document (\d+):$", made.context, re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20 and len(made.depths) == needed
        assert any(output in made.context for output in made.outputs)
        assert score(f"It is {made.outputs[0].upper()}.", made.outputs, made.scoring) == 1


@pytest.mark.parametrize("task", [task for task in ANSWERS if not task.startswith("qa")])
def test_answers_count_by_the_share_of_what_they_hold(task):
    """RULER's string_match_all: case aside, anywhere in the answer."""
    for made in asked(task, count=2):
        half = made.outputs[: (len(made.outputs) + 1) // 2]
        assert score(" and ".join(half).upper(), made.outputs, made.scoring) == len(half) / len(made.outputs)
        assert score("I do not know.", made.outputs, made.scoring) == 0
