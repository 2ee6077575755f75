"""Runs of questions: what is asked and when, what a stopped run keeps, what is told, tables."""

import json
import re
import threading
import time
from dataclasses import asdict, replace

import pytest

from longspan.errors import UnknownNameError, UsageError
from longspan.evals.asking import rows, tables
from longspan.evals.asking.asker import Identity, Reply
from longspan.evals.asking.local import Local
from longspan.evals.asking.run import Given, plan, run
from longspan.evals.journal import Entry, Journal, read
from longspan.evals.questions import registry
from longspan.evals.questions.example import Template
from longspan.evals.questions.passages import shipped
from longspan.evals.questions.setup import Setup
from longspan.evals.questions.sources import Sources
from longspan.evals.ruler.tasks import RULER

SOURCES = Sources(essay=" ".join(shipped()[0].documents))
GIVEN = Given(RULER, ["qa_1", "qa_2"], [900, 1000], 2, 5, SOURCES)
TIMED = ("run", "read_tokens_per_s", "first_token_s", "decode_tokens_per_s", "seconds")


class Scripted:
    """Answers as it is told; counts by words."""

    template, counted_by, measures, chooses = Template(), "words", False, False

    def __init__(self, answer=lambda made: made.outputs[0], parallel=1, mechanism="script", together=1):
        self.answer, self.parallel, self.asked, self.together, self.groups = answer, parallel, [], together, []
        self.identity = Identity("scripted", "none", "", mechanism, "", mechanism)

    def tokens(self, text):
        return text.split()

    def ask(self, example, tick):
        self.asked.append((example.task, example.index))
        found = self.answer(example)
        return found if isinstance(found, Reply) else Reply(found)

    def ask_all(self, examples, tick):
        self.groups.append(len(examples))
        return [self.ask(example, tick) for example in examples]


class Stop(Exception):
    pass


def at(*askers):
    return lambda length: askers


def asked_of(given, *askers, journal=None, **options):
    """Ask all of a plan; returns rows and what was told."""
    told = []
    with Journal(journal) as kept:
        options.setdefault("tell", told.append)
        run(given, plan(given, at(*askers)), kept, {"device": "here"}, **options)
        return [rows.row_of(entry) for entry in kept.entries], told


def test_a_run_that_was_stopped_goes_on(make_llm, tmp_path):
    asker, file = Local(make_llm("streaming:window=64")), tmp_path / "ruler.jsonl"
    asked, told = plan(GIVEN, at(asker)), []
    keys = [each.key for each in asked]
    assert [(key.length, key.task, key.question) for key in keys][:5] == [
        (900, "qa_1", 0), (900, "qa_2", 0), (1000, "qa_1", 0), (1000, "qa_2", 0), (900, "qa_1", 1),
    ]  # fmt: skip

    def until_the_third(line):
        told.append(line)
        if line.startswith("[3/8]"):
            raise Stop

    with Journal(file) as journal, pytest.raises(Stop):
        run(GIVEN, asked, journal, {"device": "one"}, until_the_third)
    first = file.read_bytes()
    with Journal(file) as journal:
        assert run(GIVEN, asked, journal, {"device": "two"}, told.append) == 0
        done = rows.answered(journal.entries)
    assert file.read_bytes().startswith(first)
    assert [line.split("]")[0] for line in told] == [f"[{i}/8" for i in range(1, 9)]
    assert re.match(r"\[5/8\] qa_1 900: \d+ % of 2, read at [\d,]+ tokens/s, about .* left$", told[4])
    assert told[-1].endswith("about 0 s left")
    assert list(done) == keys
    assert [entry.environment["device"] for entry in done.values()] == ["one"] * 3 + ["two"] * 5
    assert all(entry.row["run"] == entry.environment["run"] for entry in done.values())
    assert len({entry.row["run"] for entry in done.values()}) == 2
    with Journal(file) as journal:
        run(GIVEN, asked, journal, {}, told.append)
    assert len(told) == 8, "nothing is asked twice"
    written = [entry.row for entry in read(file)]
    with Journal(None) as journal:
        run(GIVEN, asked, journal, {}, lambda _: None)
    assert [{k: v for k, v in row.items() if k not in TIMED} for row in written] == [
        {k: v for k, v in json.loads(json.dumps(entry.row)).items() if k not in TIMED} for entry in journal.entries
    ]


def test_rows_tell_questions_and_settings_apart(make_llm):
    keys = set()
    for given, llm, kv in (
        (GIVEN, make_llm("streaming:window=64"), "auto"),
        (GIVEN, make_llm("streaming:window=65"), "auto"),
        (GIVEN, make_llm(), "auto"),
        (GIVEN, make_llm("quest", prefill="streaming:window=64"), "auto"),
        (GIVEN, make_llm("streaming:window=64", kv_budget=10**7), "auto"),
        (GIVEN, make_llm("streaming:window=64", kv="fp16"), "fp16"),
        (replace(GIVEN, seed=6), make_llm("streaming:window=64"), "auto"),
        (replace(GIVEN, setup=Setup("both")), make_llm("streaming:window=64"), "auto"),
        (replace(GIVEN, setup=Setup(order="last")), make_llm("streaming:window=64"), "auto"),
        (replace(GIVEN, sources=Sources(essay="Quite another text. " * 99)), make_llm("streaming:window=64"), "auto"),
    ):
        keys.update(each.key for each in plan(given, at(Local(llm, kv))))
    assert len(keys) == 10 * 8


def test_a_question_is_planned_once_whoever_names_it_twice():
    assert len(plan(GIVEN, at(Scripted(), Scripted()))) == 8
    assert len(plan(GIVEN, at(Scripted(), Scripted(mechanism="other")))) == 16


def test_positions_beyond_the_window_are_told_once(make_llm):
    _, told = asked_of(replace(GIVEN, tasks=["qa_1"], lengths=[1500]), Local(make_llm("dense")))
    assert sum("beyond what" in line for line in told) == 1 and len(told) == 3


def test_a_run_ends_when_its_time_is_over():
    asker = Scripted()
    with Journal(None) as journal:
        assert run(GIVEN, plan(GIVEN, at(asker)), journal, {}, lambda _: None, until=time.monotonic()) == 7
    assert len(asker.asked) == 1


def test_what_is_answered_together_is_asked_together_and_takes_turns_with_others():
    several, single = Scripted(together=3, mechanism="several"), Scripted(mechanism="single")
    found, told = asked_of(GIVEN, several, single)
    assert several.groups == [3, 3, 2] and len(told) == 16
    assert (
        several.asked
        == single.asked
        == [(task, number) for number in (0, 1) for _ in (900, 1000) for task in GIVEN.tasks]
    )
    order = "".join(row.mechanism[1] for row in found)
    assert order == "eeeiiieeeiiieeii", "a question alone is not put off until all others are answered"


def test_what_is_answered_together_is_kept_whole_when_time_is_over():
    asker = Scripted(together=3)
    with Journal(None) as journal:
        assert run(GIVEN, plan(GIVEN, at(asker)), journal, {}, lambda _: None, until=time.monotonic()) == 5
        assert len(journal.entries) == 3


def test_what_another_journal_holds_is_not_asked_again():
    found, _ = asked_of(GIVEN, Scripted())
    elsewhere = [Entry(row.__dict__, {}) for row in found[:5]]
    asker = Scripted()
    more, told = asked_of(GIVEN, asker, elsewhere=elsewhere)
    assert len(asker.asked) == 3 == len(more) and told[0].startswith("[6/8]")


def test_no_answer_is_a_row_with_its_reason():
    def refuse(made):
        return Reply("", error="the context is too long") if made.index else Reply(made.outputs[0])

    found, told = asked_of(replace(GIVEN, lengths=[900], tasks=["qa_1"]), Scripted(refuse))
    assert [(row.score, row.error) for row in found] == [(1.0, ""), (0.0, "the context is too long")]
    assert told[-1].endswith("no answer: the context is too long")
    (line,) = tables.table(found)
    assert (line["score"], line["errors"], line["questions"]) == (50.0, 1, 2)


def test_several_questions_are_under_way_at_once_where_the_asker_bears_it():
    together = threading.Barrier(4, timeout=20)

    def answer(made):
        together.wait()  # fails unless four threads come here
        return made.outputs[0]

    asker = Scripted(answer, parallel=4)
    found, told = asked_of(GIVEN, asker)
    assert len(found) == len({row.key for row in found}) == 8 and all(row.score == 1 for row in found)
    assert [line.split("]")[0] for line in told] == [f"[{i}/8" for i in range(1, 9)]


def test_an_error_in_a_thread_stops_the_run_and_keeps_the_rows(tmp_path):
    def answer(made):
        if made.index == 1:
            raise UsageError("no such model")
        return made.outputs[0]

    with pytest.raises(UsageError, match="no such model"):
        asked_of(GIVEN, Scripted(answer, parallel=2), journal=tmp_path / "r.jsonl")
    kept = [entry.row["question"] for entry in read(tmp_path / "r.jsonl")]
    assert kept and set(kept) == {0}


def test_contenders_are_told_in_words():
    def asker(**fields):
        made = Scripted()
        made.identity = replace(made.identity, **fields)
        return made

    def words(given, **fields):
        return rows.contender(plan(given, at(asker(**fields)))[0].key)

    assert words(GIVEN) == "script"
    assert words(GIVEN, mechanism="quest", budget="1/4", attention="quest:budget=7") == "quest at 1/4"
    told = words(replace(GIVEN, setup=Setup("both", "last")), prefill="xattention", kv="int4", kv_budget=9)
    assert told == "script, prefill xattention, kv int4, kv-budget 9, question=both,order=last"
    assert words(GIVEN, endpoint="http://x/v1") == "script, from http://x/v1"


def test_what_a_setup_can_not_do_is_refused():
    for setup, told in ((Setup(order="first"), "--order first"), (Setup(context="summary"), "--context summary")):
        with pytest.raises(UsageError, match=f"{told} changes what is right in cwe: use it with niah_single_1, "):
            plan(replace(GIVEN, tasks=["vt", "cwe"], setup=setup), at(Scripted()))
    with pytest.raises(UsageError, match="by=heads needs a model's heads or states, and scripted shows none"):
        plan(replace(GIVEN, setup=Setup(context="retrieved:by=heads")), at(Scripted()))


@pytest.mark.parametrize(
    "setup, told",
    [
        ({"question": "never"}, "--question 'never' is none of after"),
        ({"order": "middle"}, "--order 'middle' is none of kept"),
        ({"context": "half"}, "--context 'half' is none of full, retrieved, summary"),
        ({"context": "retrieved:by=luck"}, "by=luck is unknown: use lexical, dense, hybrid or heads"),
        ({"context": "retrieved:passages=0"}, "passages=0 is too small"),
        ({"context": "summary:chunk=0"}, "chunk=0 is too small"),
        ({"context": "summary:words=9"}, "has no option 'words'; its options: chunk, focused, tokens"),
    ],
)
def test_what_is_no_setup_is_refused(setup, told):
    with pytest.raises(UsageError, match=told):
        Setup(**setup)


def test_the_registry_lists_its_evals():
    assert "ruler" in registry.names() and registry.evaluation("ruler") is RULER
    with pytest.raises(UnknownNameError, match="ruler"):
        registry.evaluation("nothing")
    with pytest.raises(UsageError, match="already"):
        registry.register("ruler", "elsewhere:RULER")
    for name in registry.names():
        assert registry.evaluation(name).name == name and registry.evaluation(name).tasks


# --- tables ---------------------------------------------------------------------------------------------------------


def row(task, length, score, **other):
    key = rows.Key("ruler", task, length, 0, 0, "", "q", "f", "float32", "dense", "", "dense", "", "auto", 0, "")
    given = {"run": "r", "model": "m", "parameters": {}, "tokens": length, "depths": [], "scoring": "all"}
    given |= {"score": score, "chance": 0.0, "error": "", "read_by": "dense", "read_tokens": 9, "seconds": 1.0}
    given |= {"read_tokens_per_s": 1.0, "kept_bytes": 4, "first_token_s": 1, "decode_tokens_per_s": 0.0}
    return rows.Row(**{**asdict(key), **given, "measures": {}, "answer": "", "wanted": ["x"], **other})


def test_the_table_has_scores_and_intervals_by_task_and_length():
    found = tables.table(
        [row("vt", 4096, 1.0), row("vt", 4096, 0.5), row("cwe", 4096, 0.0, chance=0.5), row("vt", 8192, 0.0)]
    )
    lines = [(line["task"], line["length"], line["questions"], line["score"]) for line in found]
    assert lines == [("vt", 4096, 2, 75.0), ("cwe", 4096, 1, 0.0), ("vt", 8192, 1, 0.0), ("average", 4096, 3, 37.5)]
    assert all(line["low"] <= line["score"] <= line["high"] for line in found)
    lengths, cells = tables.cells(found)
    assert [line.get("kept_bytes") for line in found] == [4, 4, 4, None]
    assert [line["chance"] for line in found] == [0, 50, 0, 25]
    assert lengths == [4096, 8192] and [line[1] for line in cells] == ["vt", "cwe", "average"]
    assert cells[0] == ["dense", "vt", "75.0 (50 to 100)", "0.0 (0 to 79)"] and cells[1][3] == ""


def test_contenders_have_lines_of_their_own():
    found = tables.table([row("vt", 4096, 1.0), row("vt", 4096, 0.0, mechanism="quest", budget="1/4")])
    assert [(line["contender"], line["score"]) for line in found] == [("dense", 100.0), ("quest at 1/4", 0.0)]


def test_probabilities_are_told_as_perplexities():
    given = {"scoring": "probability", "eval": "perplexity"}
    found = tables.table([row("text", 4096, 0.5, measures={"nll": nll}, **given) for nll in (0.6, 0.8)])
    (line,) = found
    assert line["perplexity"] == pytest.approx(2.0138, abs=1e-3) and line["low"] < 2.0138 < line["high"]
    assert "score" not in line and tables.cells(found)[1][0][2].startswith("2.01 (")


@pytest.mark.parametrize(
    "strange", [{"score": "1"}, {"wanted": "x"}, {"depths": None}, {"more": 1}, {"measures": []}, {"kept_bytes": 1.5}]
)
def test_rows_of_another_eval_are_refused(strange):
    good = row("vt", 4096, 1.0).__dict__
    assert rows.answered([Entry(good, {})])
    with pytest.raises(UsageError, match="another eval"):
        rows.answered([Entry({**good, **strange}, {})])


def test_more_questions_than_memory_holds_are_refused():
    with pytest.raises(UsageError, match="fewer --questions"):
        plan(replace(GIVEN, questions=10**20), at(Scripted()))
