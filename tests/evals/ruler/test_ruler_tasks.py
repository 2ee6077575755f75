"""RULER's tasks: exact lengths, the paper's counts, and answers that a few lines of code find in the context alone."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from longspan import settings
from longspan.errors import UnknownNameError, UsageError
from longspan.evals.questions import making, passages, words
from longspan.evals.questions.example import Template
from longspan.evals.questions.hiding import NOISE
from longspan.evals.questions.sources import Sources
from longspan.evals.ruler.common import Common
from longspan.evals.ruler.documents import Documents
from longspan.evals.ruler.frequent import Frequent, zeta
from longspan.evals.ruler.niah import Niah
from longspan.evals.ruler.tasks import RULER, TASKS
from longspan.evals.ruler.tracking import Tracking
from tiny_llama import save_tokenizer

example, examples, named = (partial(each, RULER) for each in (making.example, making.examples, making.named))
REAL = settings.cache_folder() / "converted"
"""Where SmolLM2 lies once it was used: looked up before tests get folders of their own."""
TEMPLATE = Template("<|user|>", "<|end|><|assistant|>")
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
SOURCES = Sources(essay=" ".join(passages.shipped()[0].documents))


def by_spaces(text):
    return text.split()


def splitting(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A byte-level BPE of 320 tokens, words, and SmolLM2's where it lies in the cache."""
    tiny = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    found = {"tiny": splitting(tiny), "words": by_spaces}
    for folder in REAL.glob("*/tokenizer.json"):
        from transformers import AutoTokenizer

        found["smollm2"] = splitting(AutoTokenizer.from_pretrained(folder.parent))
    return found


def haystack(made):
    """The context from its last instruction on: the task itself, without the example that is solved before it."""
    starts = [m.start() for m in re.finditer(r"Follow the chain|Below is a numbered|Below is a coded", made.context)]
    return made.context[starts[-1] :] if starts else made.context


def one_more(task, tokens_of, length):
    """Tokens that one more unit of haystack takes at most."""
    family = TASKS[task]
    if task in ("vt", "niah_single_1"):
        return len(tokens_of(f"\n{NOISE}"))
    if isinstance(family, Niah):
        longest = f"\n{family_line(family)}" if family.haystack == "needle" else " " + max(SOURCES.words, key=len)
        return len(tokens_of(longest)) + 8
    if isinstance(family, Common):
        times = 1 if length < 4096 else 3
        return times * (len(tokens_of(" 10000. whimsical-nightingale")) + 2)
    if isinstance(family, Frequent):
        return 4 * (len(tokens_of(" abcdef ...")) + 2)
    return len(tokens_of("\n\nDocument 10000:\n" + max(passages.shipped()[0].documents, key=len))) + 40


def family_line(family):
    key = "whimsical-nightingale" if family.keys == "words" else "f" * 36
    return f"One of the special magic {family.values} for {key} is: {'9' * (7 if family.values == 'numbers' else 36)}."


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "tokenizer, lengths", [("tiny", (3000, 8192)), ("words", (1500, 9000)), ("smollm2", (1024, 4096))]
)
def test_prompt_and_answer_fill_the_length_and_never_pass_it(tokenizers, tokenizer, lengths, task):
    if tokenizer not in tokenizers:
        pytest.skip("SmolLM2 is not in the cache")
    tokens_of = tokenizers[tokenizer]
    for length in lengths:
        for template in (None, TEMPLATE):
            made = example(task, tokens_of, length, 1, 7, template=template, sources=SOURCES)
            before, between = (template.before, template.between) if template else ("", " ")
            rest = made.question + between + made.answer_prefix
            total = sum(len(tokens_of(part)) for part in (before, made.context, rest)) + made.max_tokens
            assert total == made.tokens <= length
            assert length - total < one_more(task, tokens_of, length), (task, length)


def test_tokens_of_an_answer_are_the_papers():
    given = {task: family.max_tokens for task, family in TASKS.items()}
    niah = {task: 128 for task in TASKS if task.startswith("niah")}
    assert given == {**niah, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} and len(niah) == 8
    assert {task: family.scoring for task, family in TASKS.items()} == {
        task: "any" if task in ("qa_1", "qa_2") else "all" for task in TASKS
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_questions_and_another_gives_others(task):
    first = examples(task, by_spaces, 2000, 3, seed=1, sources=SOURCES)
    assert first == examples(task, by_spaces, 2000, 3, seed=1, sources=SOURCES)
    assert first[2] == example(task, by_spaces, 2000, 2, 1, sources=SOURCES)
    others = [*first, *examples(task, by_spaces, 2000, 3, seed=2, sources=SOURCES)]
    assert len({made.context for made in others}) == 6
    assert [made.index for made in first] == [0, 1, 2] and {made.task for made in first} == {task}


def test_questions_do_not_depend_on_the_process_and_load_no_model_code():
    code = (
        "import sys, hashlib; from longspan.evals.ruler.tasks import RULER; "
        "from longspan.evals.questions.making import example; "
        "from longspan.evals.questions.sources import Sources; given = Sources('Once upon a time. ' * 99); "
        "made = [example(RULER, task, str.split, 1500, 0, 3, sources=given) for task in RULER.tasks]; "
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


# --- needles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_needles_answer_their_question(task):
    family = TASKS[task]
    for made in examples(task, by_spaces, 3000, 4, seed=3, sources=SOURCES):
        found = NEEDLE.findall(made.context)
        asked = re.search(r" for (.+) in the text above\?$", made.question)[1]
        keys = re.split(r",? and |, ", asked)
        values = {key: [value for _, other, value in found if other == key] for key in keys}
        # The question's order of keys; each key's values in any order.
        per_key = len(made.outputs) // len(keys)
        for i, key in enumerate(keys):
            assert sorted(values[key]) == sorted(made.outputs[i * per_key : (i + 1) * per_key])
        assert {kind for kind, _, _ in found} == {family.values}
        assert len(keys) == family.queries and per_key == family.key_values
        distinct = {value for _, _, value in found}
        assert len(distinct) == len(found), "no value stands twice"
        if family.haystack != "needle":
            hidden = max(family.needle_keys, family.queries) * family.key_values
            assert len(found) == hidden and len({key for _, key, _ in found}) == max(family.needle_keys, family.queries)
        form = (
            r"\d{7}" if family.values == "numbers" else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-\w{12}"
        )
        assert all(re.fullmatch(form, value) for value in distinct)
        many = len(made.outputs) > 1
        assert made.answer_prefix.endswith(" are" if many else " is")
        assert ("numbers" in made.question or "uuids" in made.question) == many


def test_a_haystack_of_needles_holds_nothing_else_and_no_key_twice():
    for task in ("niah_multikey_2", "niah_multikey_3"):
        made = example(task, by_spaces, 4000, 0, 0)
        instruction, *lines = made.context.strip().split("\n")
        assert "hidden" in instruction and len(lines) > 300
        keys = [NEEDLE.fullmatch(line)[2] for line in lines]
        assert len(set(keys)) == len(keys)


def test_a_haystack_of_noise_is_noise_and_one_needle():
    made = example("niah_single_1", by_spaces, 3000, 0, 0)
    counts = Counter(made.context.strip().split("\n")[1:])
    assert counts.pop(NOISE) > 100 and list(counts.values()) == [1]


@pytest.mark.parametrize("hay", ["noise", "essay", "needle"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_needle_stands_where_it_was_asked_for(hay, depth):
    family = replace(TASKS["niah_single_1"], haystack=hay, depth=depth)
    for made in examples(family, by_spaces, 6000, 3, seed=5, sources=SOURCES):
        (found,) = (m for m in NEEDLE.finditer(made.context) if m[3] == made.outputs[0])
        assert made.depths == (pytest.approx(found.start() / len(made.context), abs=1e-4),)
        assert abs(made.depths[0] - depth) < 0.04


def test_drawn_depths_spread_over_the_whole_text():
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_3"):
        depths = [made.depths[0] for made in examples(task, by_spaces, 1500, 40, seed=0, sources=SOURCES)]
        assert min(depths) < 0.2 and max(depths) > 0.8 and 0.3 < sum(depths) / 40 < 0.7


def test_pythons_own_documentation_is_the_prose_where_none_is_given():
    made = example("niah_single_2", by_spaces, 1500, 0, 0)
    known = set(" ".join(Sources().words).split("."))
    whole = [sentence for sentence in made.context.split("\n")[1].split(".")[2:-2] if "special magic" not in sentence]
    assert len(whole) > 10 and sum(sentence in known for sentence in whole) > len(whole) - 3
    assert Sources().digest == Sources().digest


def test_the_users_prose_hides_the_needle_and_goes_round_where_it_is_short():
    text = " ".join(f"Sentence number {i} is here." for i in range(80))
    made = example("niah_single_2", by_spaces, 2000, 0, 0, sources=Sources(essay=text))
    told = re.findall(r"Sentence number (\d+) is here\.", made.context)
    assert len(told) > 300 and Counter(told).most_common()[-1][1] >= 4
    instruction, prose = made.context.strip().split("\n")
    (needle,) = NEEDLE.finditer(prose)
    rest = (prose[: needle.start()] + prose[needle.end() + 1 :]).split()
    twice = (text.split() * 9)[: len(rest) + len(text.split())]
    starts = [i for i in range(len(text.split())) if twice[i : i + len(rest)] == rest]
    assert "hidden" in instruction and starts, "nothing but the text, from somewhere on"
    with pytest.raises(UsageError, match="3 words"):
        Sources(essay="far too short")


# --- variable tracking --------------------------------------------------------------------------------------------


def track(text, value):
    """Run the assignments in their order; return the variables that have the value."""
    held = {}
    for name, right in re.findall(r"^VAR (\w+) = (.+)$", text, re.MULTILINE):
        held[name] = held[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
    return {name for name, own in held.items() if own == value}


@pytest.mark.parametrize("chains, hops", [(1, 4), (3, 2), (2, 7)])
def test_variables_are_found_by_running_the_assignments(chains, hops):
    for made in examples(Tracking(chains, hops), by_spaces, 2500, 4, seed=9):
        value = re.search(r"the value (\d{5}) ", made.question)[1]
        assert track(haystack(made), value) == set(made.outputs) and len(made.outputs) == hops + 1
        assert all(re.fullmatch("[A-Z]{5}", name) for name in made.outputs)
        assert f"{hops + 1} variables" in made.answer_prefix and value in made.answer_prefix
        lines = haystack(made).strip().split("\n")[2:]
        assert sum(line.startswith("VAR ") for line in lines) == chains * (hops + 1)
        assert {line for line in lines if not line.startswith("VAR ")} == {NOISE}


def test_the_solved_example_of_tracking_is_right_and_small(tokenizers):
    for tokens_of, most in ((by_spaces, 500), (tokenizers["tiny"], 1000)):
        made = example("vt", tokens_of, 4000, 0, 0)
        shown = made.context[: made.context.index(haystack(made))]
        value = re.search(r"the value (\d{5}) ", shown)[1]
        names = re.search(r"They are: ([A-Z ]+)\n", shown)[1].split()
        assert set(names) == track(shown, value) and all(len(name) == 3 for name in names)
        assert len(tokens_of(shown)) <= most
        assert value not in haystack(made)


# --- counting -----------------------------------------------------------------------------------------------------


def listed(text):
    found = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return Counter(word for _, word in found)


@pytest.mark.parametrize("length, often, seldom, shown", [(2000, 6, 1, (20, 3, 1)), (6000, 30, 3, (40, 10, 3))])
def test_common_words_are_found_by_counting(length, often, seldom, shown):
    for made in examples("cwe", by_spaces, length, 4, seed=2):
        counts = listed(haystack(made))
        assert {word for word, count in counts.items() if count == often} == set(made.outputs)
        assert len(made.outputs) == 10 and set(counts.values()) == {often, seldom}
        for word in made.outputs:
            assert not any(word in other for other in counts if other != word), "scoring would find it elsewhere"
        before = made.context[: made.context.index(haystack(made))]
        text, answer = before.split("in the list are: ")
        counts = listed(text.split("Question")[0])
        assert len(counts) == shown[0] and set(counts.values()) == set(shown[1:])
        assert {word for word, count in counts.items() if count == shown[1]} == set(listed(answer))


def test_a_list_longer_than_all_words_is_of_compounds():
    known = set(words.single())
    short, long = (example("cwe", by_spaces, length, 0, 0) for length in (12000, 16000))
    assert set(listed(haystack(short))) < known
    counts = listed(haystack(long))
    assert len(counts) > len(known) and not set(counts) & known
    assert {word for word, count in counts.items() if count == 30} == set(long.outputs)


def test_frequent_words_are_found_by_counting():
    for length in (1500, 9000):
        for made in examples("fwe", by_spaces, length, 3, seed=4):
            text = haystack(made).split("frequent ones. ")[1].split()
            counts = Counter(text)
            (noise, most), *rest = counts.most_common()
            assert noise == "..." and [word for word, _ in rest[:3]] == list(made.outputs)
            assert rest[2][1] > rest[3][1]
            assert all(re.fullmatch("[a-z]{6}", word) for word, _ in rest)
            # Counts are floor(N / (k^2 zeta(2))) for one N.
            whole = 3.141592653589793**2 / 6
            totals = range(int(most * whole), int((most + 1) * whole) + 1)
            expected = {
                tuple(c for k in range(1, (length - 50) // 50 + 1) if (c := int(n / k**2 / whole))) for n in totals
            }
            assert tuple(count for _, count in counts.most_common()) in expected


def test_zeta_is_known():
    assert zeta(2.0) == pytest.approx(3.141592653589793**2 / 6, rel=1e-12)
    assert zeta(4.0) == pytest.approx(3.141592653589793**4 / 90, rel=1e-12)
    assert zeta(1.5) == pytest.approx(2.612375348685488, rel=1e-12)


# --- documents ----------------------------------------------------------------------------------------------------


def documents(made):
    found = re.findall(r"Document (\d+):\n(.*?)(?=\n\n)", made.context, re.DOTALL)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [text for _, text in found]


@pytest.mark.parametrize("task, hops", [("qa_1", False), ("qa_2", True)])
def test_the_documents_that_a_question_needs_are_there_once(task, hops):
    library = passages.shipped()[hops]
    known = {asked.question: asked for asked in library.asked}
    places = []
    for made in examples(task, by_spaces, 6000, 6, seed=1):
        texts = documents(made)
        assert len(set(texts)) == len(texts) > len(library.documents), "all of ours, and invented ones"
        asked = known[made.question.split("Question: ")[1]]
        assert made.outputs == asked.answers
        gold = [library.documents[i] for i in asked.needs]
        assert [texts.count(text) for text in gold] == [1] * (1 + hops)
        assert any(made.outputs[0] in text for text in gold)
        places += [texts.index(text) / len(texts) for text in gold]
    assert min(places) < 0.4 and max(places) > 0.6


def test_what_distracts_most_comes_first():
    for made in examples("qa_1", by_spaces, 400, 5, seed=0):
        library, question = passages.shipped()[0], made.question.split("Question: ")[1]
        (asked,) = (asked for asked in library.asked if asked.question == question)
        near = {library.documents[i] for i in asked.near}
        assert len(near) == 3 and near < set(documents(made))


def test_every_question_comes_before_any_comes_again():
    asked = [made.question for made in examples("qa_2", by_spaces, 300, 40, seed=0)]
    assert len(set(asked[:32])) == 32 and asked[32:] == asked[:8]


def test_shipped_passages_answer_their_questions():
    single, hops = passages.shipped()
    assert len(single.documents) >= 60 and len(single.asked) >= 100 and len(hops.asked) >= 30
    asked = [each.question for library in (single, hops) for each in library.asked]
    assert len(set(asked)) == len(asked) and len(set(single.documents)) == len(single.documents)
    for each in single.asked:
        assert each.answers[0] in single.documents[each.needs[0]], each.question
        assert not any(answer in each.question for answer in each.answers)
    for each in hops.asked:
        assert each.answers[0] in hops.documents[each.needs[1]] and each.question.endswith("?")
        assert not any(answer in each.question for answer in each.answers), each.question


SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "Lamps",
            "paragraphs": [
                {
                    "context": "The lamp is red.",
                    "qas": [
                        {
                            "question": "Which colour?",
                            "answers": [{"text": "red"}, {"text": "red"}],
                            "is_impossible": False,
                        },
                        {"question": "Which age?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "The wick is long.",
                    "qas": [{"question": "How is the wick?", "answers": [{"text": "long"}]}],
                },
            ],
        },
        {"title": "Cats", "paragraphs": [{"context": "A cat sleeps.", "qas": []}]},
    ],
}
HOTPOT = [
    {"question": "Who?", "answer": "Ann", "context": [["Ships", ["A ship.", " Ann had it."]], ["Seas", ["A sea."]]]}
]


def test_questions_come_from_the_users_files(tmp_path):
    squad, hotpot = tmp_path / "squad.json", tmp_path / "hotpot.json"
    squad.write_text(json.dumps(SQUAD))
    hotpot.write_text(json.dumps(HOTPOT))
    (one, single), (two, hops) = passages.read(squad), passages.read(hotpot)
    assert (one, two) == ("qa_1", "qa_2")
    assert [(each.question, each.answers, each.needs, each.near) for each in single.asked] == [
        ("Which colour?", ("red",), (0,), (1,)),
        ("How is the wick?", ("long",), (1,), (0,)),
    ]
    sources = Sources(single=single, hops=hops)
    assert len({each.digest for each in (sources, SOURCES, Sources(single=single), Sources(hops=hops))}) == 4
    for made in examples("qa_1", by_spaces, 600, 2, seed=0, sources=sources):
        assert {"The lamp is red.", "The wick is long.", "A cat sleeps."} < set(documents(made))
    made = example("qa_2", by_spaces, 600, 0, 0, sources=sources)
    assert made.outputs == ("Ann",) and {"Ships\nA ship. Ann had it.", "Seas\nA sea."} < set(documents(made))


@pytest.mark.parametrize(
    "text, told",
    [
        (None, "can't read"),
        ("{", "no JSON"),
        ("[]", "no question"),
        ('{"data": []}', "no question"),
        ('{"dates": []}', "neither the form"),
        ("[1]", "neither the form"),
        ('"squad"', "neither the form"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, told):
    file = tmp_path / "questions.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=told):
        passages.read(file)


# --- names, words, lengths ----------------------------------------------------------------------------------------


def test_names_of_tasks():
    assert named("all") == list(TASKS) and len(TASKS) == 13
    assert named(" vt , cwe,vt") == ["vt", "cwe"]
    with pytest.raises(UnknownNameError, match="niah_single_1, "):
        named("vt,nothing")
    with pytest.raises(UsageError, match="no task"):
        named(" , ")


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_holds_no_question_is_refused_and_the_least_one_told(task):
    with pytest.raises(UsageError, match=f"60 tokens do not hold a question of {task}: ask for") as refused:
        example(task, by_spaces, 60, 0, 0)
    least = int(re.search(r"ask for (\d+)", str(refused.value))[1])
    assert example(task, by_spaces, least + 60, 0, 0).tokens <= least + 60


def test_configurations_of_ones_own():
    made = example(Niah("noise", needle_keys=3, values="uuids"), by_spaces, 800, 0, 0)
    assert made.task == "niah" and len(made.depths) == 3
    assert Documents(hops=True).scoring == "any" and example(Frequent(alpha=1.5), by_spaces, 3000, 0, 0).outputs


def test_words_are_words_and_compounds_never_end(monkeypatch):
    import random

    found = words.sections()
    assert set(found) == {"nouns", "adjectives", "verbs"}
    for section in found.values():
        assert len(set(section)) == len(section) > 400 and all(re.fullmatch("[a-z]{3,}", word) for word in section)
    monkeypatch.setattr(words, "sections", lambda: {"adjectives": ("big", "red"), "nouns": ("cat", "dog")})
    source = words.compounds(random.Random(0))
    drawn = [next(source) for _ in range(9)]
    assert len(set(drawn)) == 9 and {len(word.split("-")) for word in drawn} == {2, 3}


def test_the_data_files_say_whose_they_are():
    folder = Path(words.__file__).parent
    assert "licence" in (folder / "words.txt").read_text()[:300]
    assert "licence" in json.loads((folder / "passages.json").read_text())["about"]
