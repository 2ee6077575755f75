"""Every eval of generated questions: exact lengths, one seed one set; who knows scores 100, who guesses as chance."""

import os
import random
import re
import subprocess
import sys
from difflib import SequenceMatcher

import pytest

from longspan.errors import UsageError
from longspan.evals import facts, grid, nolima, rot
from longspan.evals.asking import tables
from longspan.evals.asking.asker import Identity, Reply
from longspan.evals.asking.rows import row_of
from longspan.evals.asking.run import Given, plan, run
from longspan.evals.journal import Journal
from longspan.evals.questions import pieces, registry
from longspan.evals.questions.example import Template
from longspan.evals.questions.making import example, examples
from longspan.evals.questions.scoring import score
from longspan.evals.questions.setup import Setup
from longspan.evals.questions.sources import Sources

SOURCES = Sources()
TASKS = [(name, task) for name in registry.names() for task in registry.evaluation(name).tasks]
FEW = [(name, task) for name, task in TASKS if name != "needle" or task.endswith(("_000", "_050", "_100"))]
ASKED = [(name, task) for name, task in FEW if name != "perplexity"]
IDS = [f"{name}-{task}" for name, task in FEW]


def by_spaces(text):
    return text.split()


def by_characters(text):
    return text.encode()


def made(name, task, length=2000, index=0, seed=0, tokens_of=by_spaces, **options):
    return example(
        registry.evaluation(name), task, tokens_of, length, index, seed, sources=SOURCES,
        template=Template("<|user|>", "<|end|><|assistant|>"), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name, task", FEW, ids=IDS)
def test_prompt_and_answer_fill_the_length_and_never_pass_it(name, task):
    for tokens_of, length in ((by_spaces, 1500), (by_characters, 9000)):
        found = made(name, task, length, 1, 7, tokens_of)
        parts = [found.template.before, found.context, found.follows or found.closing]
        total = sum(len(tokens_of(part)) for part in parts) + found.max_tokens
        assert total == found.tokens <= length
        # One more line, word, turn or document does not fit.
        longest = max(map(len, map(tokens_of, pieces.split(found.context).texts)))
        assert length - total <= max(longest, 700 if tokens_of is by_characters else 90)


@pytest.mark.parametrize("name, task", FEW, ids=IDS)
def test_one_seed_gives_one_set_of_questions(name, task):
    first = [made(name, task, index=i, seed=1) for i in range(3)]
    assert first == [made(name, task, index=i, seed=1) for i in range(3)]
    others = [made(name, task, index=i, seed=2) for i in range(3)]
    assert len({(found.context, found.follows) for found in [*first, *others]}) == 6


def test_questions_do_not_depend_on_the_process_and_load_no_model_code():
    code = (
        "import sys, hashlib; from longspan.evals.questions import registry; "
        "from longspan.evals.questions.making import example; from longspan.evals.questions.sources import Sources; "
        "given = Sources('Once upon a time. ' * 99); evals = [registry.evaluation(n) for n in registry.names()]; "
        "made = [example(e, list(e.tasks)[-1], str.split, 1500, 0, 3, sources=given) for e in evals]; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; "
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


class Oracle:
    """Answers what is right, or guesses; measures texts as a model that is sure of them."""

    template, counted_by, parallel, together, measures, chooses = Template(), "words", 1, 1, True, False

    def __init__(self, guessing=None):
        self.guessing = None if guessing is None else random.Random(guessing)
        self.identity = Identity("oracle", "none", "", "all", "", "all")

    def tokens(self, text):
        return text.split()

    def ask(self, found, tick):
        if found.follows:
            return Reply("", nll=0.0)
        return Reply(found.guess(self.guessing) if self.guessing else " ".join(found.outputs))


def scores(name, asker, questions):
    evaluation = registry.evaluation(name)
    tasks = [task for other, task in FEW if other == name]
    given = Given(evaluation, tasks, [2000], questions, 3, SOURCES)
    with Journal(None) as journal:
        run(given, plan(given, lambda _: [asker]), journal, {}, lambda _: None)
        return [row_of(entry) for entry in journal.entries]


@pytest.mark.parametrize("name", registry.names())
def test_who_always_answers_rightly_scores_100_in_every_task(name):
    found = scores(name, Oracle(), 2)
    assert {row.task for row in found} == {task for other, task in FEW if other == name}
    assert all(row.score == 1 for row in found)
    best = {line.get("score", 100 / line.get("perplexity", 1)) for line in tables.table(found)}
    assert best == {100.0}


@pytest.mark.parametrize("name, task", ASKED, ids=[f"{name}-{task}" for name, task in ASKED])
def test_who_guesses_scores_what_chance_gives(name, task):
    rng, count = random.Random(f"{name}-{task}"), 400
    for index in range(2):
        found = made(name, task, index=index)
        points = [score(found.guess(rng), found.outputs, found.scoring) for _ in range(count)]
        mean = sum(points) / count
        spread = sum((point - mean) ** 2 for point in points) / count
        assert 0 < found.chance < 0.75 and abs(mean - found.chance) < 4.5 * (spread / count) ** 0.5 + 3 / count


def test_a_run_of_guesses_is_told_beside_its_chance():
    found = scores("nolima", Oracle(guessing=1), 100)
    average = tables.table(found)[-1]
    assert average["task"] == "average" and average["chance"] == 4.2 and average["low"] < 4.2 < average["high"]


@pytest.mark.parametrize("name, task", [each for each in ASKED if each[0] not in ("ruler", "mrcr")])
def test_what_is_asked_for_stands_in_the_context_once_and_where_it_should(name, task):
    for index in range(3):
        found = made(name, task, index=index)
        assert found.context.startswith(found.head) and len(found.depths) >= 1
        for output in found.outputs:
            times = found.context.casefold().count(output.casefold())
            assert times >= 1
            if name in ("nolima", "rot"):
                assert times == 1, output
        wanted = getattr(registry.evaluation(name).tasks[task], "depth", None)
        if wanted is not None:
            assert min(abs(depth - wanted) for depth in found.depths) < 0.04


@pytest.mark.parametrize("name", ["needle", "nolima", "rot", "perplexity"])
def test_a_number_is_one_question_at_every_length_and_in_every_task(name):
    tasks = [task for other, task in FEW if other == name]
    if name == "needle":
        tasks = [task for task in tasks if task.startswith("multikey")]
    for index in range(3):
        same = [made(name, task, length, index, 5) for task in tasks for length in (800, 3000)]
        assert len({(found.outputs, found.follows) for found in same}) == 1


# --- single evals ---------------------------------------------------------------------------------------------------


def test_perplexity_reads_the_text_right_before_the_words_that_it_measures():
    short, long = (made("perplexity", "text", length) for length in (400, 4000))
    assert long.context.endswith(short.context[1:]) and short.follows == long.follows
    assert (long.context + long.follows) in " ".join(SOURCES.words * 2)
    assert short.template == Template("", "") and short.tokens == 400


def turns(found):
    return re.findall(r"User: Write an? (\S+) about (\S+)\.\nAssistant: (.*?)(?=\n\n|$)", found.context, re.DOTALL)


@pytest.mark.parametrize("asks", [2, 4, 8])
def test_mrcr_asks_for_one_of_identical_asks(asks):
    for index in range(4):
        found = made("mrcr", f"mrcr_{asks}", 4000, index)
        form, topic, ordinal = re.search(r"asked for an? (\S+) about (\S+) for the (\w+) time", found.question).groups()
        alike = [text for other, about, text in turns(found) if (other, about) == (form, topic)]
        number = "first second third fourth fifth sixth seventh eighth".split().index(ordinal)
        mark, wanted = found.outputs
        assert len(alike) == len(set(alike)) == asks and alike[number] == wanted
        assert re.fullmatch("[A-Za-z0-9]{10}", mark) and mark in found.question and mark not in found.context
        assert len(wanted.split()) + 17 == found.max_tokens
        near = sum((other == form) != (about == topic) for other, about, _ in turns(found))
        assert near > len(turns(found)) / 4
        mean = sum(SequenceMatcher(None, text, wanted).ratio() for text in alike) / asks
        assert found.chance == pytest.approx(mean)


def test_mrcr_scores_by_difflib_and_wants_its_mark():
    outputs = ("aB3", "a poem of words")
    assert score("aB3 a poem of words", outputs, "sequence") == score("aB3a poem of words\n", outputs, "sequence") == 1
    assert score("a poem of words", outputs, "sequence") == score("so: aB3 a poem of words", outputs, "sequence") == 0
    expected = SequenceMatcher(None, "a poem", "a poem of words").ratio()
    assert score("aB3 a poem", outputs, "sequence") == expected


def stems(text):
    import Stemmer

    plain = set(
        "a an the of in on at to by for and or is are was has have had been be with from which who what whom text "
        "above person answer name alone any out away must would could should can"
        .split()
    )  # fmt: skip
    words = [word for word in re.findall(r"[a-z]+", text.casefold()) if word not in plain]
    return set(Stemmer.Stemmer("english").stemWords(words))


def test_nolimas_questions_share_no_content_word_with_their_needles():
    asked = "Which person in the text above {}? Answer with the name alone."
    for needle, literal, one, two in nolima._PAIRS:
        for hop in (one, two):
            assert not stems(asked.format(hop)) & stems(needle), (needle, hop)
        assert len(stems(asked.format(literal)) & stems(needle)) >= 2
        assert "{n}" in needle and not re.search(r"person|text", needle)
    every = [question for pair in nolima._PAIRS for question in pair[1:]]
    assert len(set(every)) == len(every) == 72


def test_nolimas_people_are_not_in_the_haystack():
    for index in range(24):
        found = made("nolima", "onehop", index=index)
        (name,) = found.outputs
        assert found.context.count(name) == 1
    assert not any(name.casefold() in SOURCES.vocabulary for name in nolima._NAMES)
    held = Sources(" ".join(["Ambrose said: 'Brigitta, go.'", *nolima._NAMES[:8]] * 30))
    names = {
        example(registry.evaluation("nolima"), "onehop", by_spaces, 300, i, 0, sources=held).outputs[0]
        for i in range(40)
    }
    assert names and not names & set(nolima._NAMES[:8])
    with pytest.raises(UsageError, match="holds most names"):
        example(
            registry.evaluation("nolima"), "onehop", by_spaces, 300, 0, 0, sources=Sources(" ".join(nolima._NAMES * 20))
        )


def test_every_pair_and_item_comes_before_any_comes_again():
    for name, count in (("nolima", len(nolima._PAIRS)), ("rot", len(rot._ITEMS))):
        task = next(iter(registry.evaluation(name).tasks))
        asked = [
            found.question
            for found in examples(registry.evaluation(name), task, by_spaces, 300, 2 * count, 4, sources=SOURCES)
        ]
        assert len(set(asked[:count])) == count and asked[count:] == asked[:count]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_rots_distractors_look_alike_and_are_no_answer(count):
    for index in range(len(rot._ITEMS)):
        plain, shuffled = (made("rot", f"{kind}_{count}", 900, index) for kind in ("coherent", "shuffled"))
        (item,) = (item for item in rot._ITEMS if plain.question.startswith(item[0]))
        _, needle, others, pool = item
        forms = [re.escape(form).replace(r"\{\}", "([^.]+?)") for form in others]
        for found in (plain, shuffled):
            assert found.context.count(needle.format(found.outputs[0])) == 1
            there = [value for form in forms for value in re.findall(form, found.context)]
            assert len(there) == len(set(there)) == count and not set(there) & set(found.outputs)
            assert set(there) <= set(pool)
        assert len(set(pool)) == len(pool) >= 8
        assert pieces.sentences(plain.context) != pieces.sentences(shuffled.context)


def test_shuffled_prose_has_the_same_sentences():
    plain, shuffled = (made("rot", f"{kind}_0", 900, 3) for kind in ("coherent", "shuffled"))
    both = [set(pieces.sentences(found.context.removeprefix(found.head))) for found in (plain, shuffled)]
    assert len(both[0] & both[1]) > 0.8 * len(both[0])


def test_the_grid_has_a_cell_for_every_kind_and_depth():
    found = grid.grid(["single", "twofact"], 3)
    assert list(found.tasks) == [
        "single_000", "single_050", "single_100", "twofact_000", "twofact_050", "twofact_100",
    ]  # fmt: skip
    for wrong in ((["double"], 3), (["single"], 1)):
        with pytest.raises(UsageError):
            grid.grid(*wrong)
    two = made("needle", "twofact_030", index=1)
    assert len(two.depths) == 2 and two.max_tokens == 56 and abs(two.depths[1] - two.depths[0] - 0.5) < 0.05
    many = made("needle", "multikey_030")
    form = re.search(r"special magic number|combination of the locker", many.question)[0]
    sentence = {"special magic number": "special magic numbers for", "combination of the locker": "The locker of"}[form]
    assert many.context.count(sentence) == 4


def test_what_could_stand_in_an_answers_place():
    assert "Bergen" in facts.pool("Bergen") and len(facts.pool("Bergen")) == 24 and "otter" in facts.pool("heron")
    assert list(facts.pool("12345"))[:1] == [10000] and len(facts.pool("1234567")) == 9 * 10**6


# --- setups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "both"])
@pytest.mark.parametrize("name, task", ASKED, ids=[f"{name}-{task}" for name, task in ASKED])
def test_a_question_may_stand_before_the_context(name, task, place):
    found = made(name, task, setup=Setup(place))
    plain = made(name, task)
    assert found.context.startswith(f"{plain.question}\n\n{plain.head}") and found.head.startswith(plain.question)
    assert found.asked == ("" if place == "before" else plain.question) and plain.asked == plain.question
    parts = [found.template.before, found.context, found.closing]
    assert sum(len(part.split()) for part in parts) + found.max_tokens == found.tokens <= 2000


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2", "qa_1"])
def test_passages_that_matter_may_stand_first_or_last(task, where):
    depths = []
    for index in range(4):
        found, plain = (made("ruler", task, index=index, **given) for given in ({"setup": Setup(order=where)}, {}))
        assert found.context.startswith(plain.head) and found.tokens <= 2000
        both = [sorted(pieces.split(each.context[len(each.head) :]).texts) for each in (found, plain)]
        assert len(set(both[0]) & set(both[1])) > 0.8 * len(set(both[0]))
        depths += found.depths
    # Words find the needle among the first eight passages.
    assert sum((depth < 0.35) if where == "first" else (depth > 0.65) for depth in depths) >= 0.75 * len(depths)


def test_pieces_are_the_text():
    for text in ("a\n\nb\n\nc\n\nd\n", "a\nb\nc\nd. E f.", "One is. Two is! 'Three' is? (Four) is.  ", "one"):
        found = pieces.split(text)
        assert found.joined(range(len(found.texts))) == text
    assert pieces.split("a\n\nb\n\nc\n\nd\n").texts == ("a", "b", "c", "d")
    assert pieces.best(["the cat", "a dog barks", "dogs"], "Which dog?", 2)[0] in (1, 2)
    assert pieces.best(["the cat"], "Which dog?", 2) == []
