"""Rows become samples and scores: each question once, names that tell apart, averages, differences."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.errors import UsageError
from longspan.evals.journal import Entry, Journal
from longspan.evals.report import sections
from longspan.evals.report.make import make
from longspan.evals.report.reading import entries
from longspan.evals.report.samples import names, samples
from longspan.evals.report.scale import PERPLEXITY, number
from longspan.evals.report.scores import AVERAGE, Scores
from longspan.evals.statistics import interval

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OLD_RULER = {
    "questions": "q", "fingerprint": "f", "dtype": "float32", "attention": "snapkv:budget=512", "prefill": "",
    "kv": "int4", "kv_budget": 0, "task": "niah_single_1", "length": 4096, "seed": 0, "question": 3, "tokens": 4000,
    "depths": [0.25], "score": 1.0, "read_by": "snapkv", "read_tokens_per_s": 1.0, "kept_bytes": 5, "first_token_s": 1,
    "decode_tokens_per_s": 1.0, "answer": "7", "wanted": ["7", "8"],
}  # fmt: skip
OLD_NEEDLE = {
    "mechanism": "quest:who=model,budget=64", "spec": "quest", "kind": "single", "requested": 8192, "length": 8190,
    "haystack": 2, "question": 5, "fingerprint": "f", "dtype": "float32", "depth": 0.5, "right": True,
    "own_words": True, "ranked_first": False, "cited": True, "chosen_by": "heads", "attention": "quest",
    "first_token_s": 0.1, "answer": "seven", "wanted": "7",
}  # fmt: skip


def scores(*rows, name="ruler"):
    found, rest = samples(rows)
    assert not rest
    return Scores(name, found)


def test_a_question_counts_once_however_often_its_row_is_there(entry):
    rows = [entry(1.0, 0), entry(0.0, 0, answer="later"), entry(0.0, 1), entry(1.0, 0, mechanism="quest")]
    found, rest = samples(rows)
    assert [(sample.asked.how, sample.question[-1], sample.score) for sample in found] == [
        ("dense", 0, 1.0),
        ("dense", 1, 0.0),
        ("quest", 0, 1.0),
    ]
    assert rest == []
    assert "1 rows answer a question that another row answered before" in make(rows).notes[0]


def test_rows_of_earlier_forms_are_read():
    (ruler, needle), rest = samples([Entry(OLD_RULER, {"model": "a/b.gguf"}), Entry(OLD_NEEDLE, {})])
    assert rest == []
    assert (ruler.eval, ruler.task, ruler.length, ruler.depth, ruler.score) == ("ruler", "niah_single_1", 4096, 0.25, 1)
    assert ruler.asked == ("b.gguf", "f", "float32", "snapkv:budget=512, kv int4", "snapkv, kv int4")
    assert ruler.wanted == "7, 8" and ruler.kept_bytes == 5
    assert (needle.eval, needle.task, needle.length, needle.depth, needle.score) == ("facts", "single", 8192, 0.5, 1)
    assert needle.asked.how == "quest:who=model,budget=64" and needle.asked.family == "quest:who=model"


def test_committed_results_are_read():
    found = make(entries(sorted(RESULTS.glob("needle*.json"))))
    (needles,) = found.scores
    right = {
        (who.how, length): cell.score.mean for (who, task, length), cell in needles.cells.items() if task == "single"
    }
    assert right["retrieval", 131072] == 1.0 and right["dense", 4096] == pytest.approx(6 / 16)


@pytest.mark.parametrize("wrong", [{"score": "much"}, {"depths": 5}, {"length": None}])
def test_a_row_that_can_not_be_read_is_told(wrong):
    with pytest.raises(UsageError, match="a row can't be read"):
        samples([Entry({**OLD_RULER, **wrong}, {})])


def test_names_are_as_short_as_tells_apart(entry):
    def named(*rows):
        return list(names(samples(rows)[0]).values())

    assert named(entry(mechanism="quest"), entry(mechanism="dense")) == ["dense", "quest"]
    assert named(entry(), entry(model="x/big", fingerprint="b" * 32)) == ["tiny dense", "big dense"]
    assert named(entry(), entry(dtype="bfloat16")) == ["tiny float32 dense", "tiny bfloat16 dense"]
    assert named(entry(), entry(fingerprint="b" * 32)) == ["tiny ffffff dense", "tiny bbbbbb dense"]
    how = named(entry(mechanism="quest", budget="1/4", kv="int4", setup="question=both"))
    assert how == ["quest at 1/4, kv int4, question=both"]
    assert named(entry(mechanism="", endpoint="http://x/v1", dtype="")) == ["from http://x/v1"]


def test_an_average_needs_every_task(entry):
    rows = [entry(1.0, 0), entry(0.0, 1), entry(1.0, task="cwe"), entry(1.0, length=8192)]
    found = scores(*rows)
    (who,) = found.names
    assert found.cell(who, AVERAGE, 4096).score.mean == 0.75 and found.cell(who, AVERAGE, 8192) is None
    assert found.cell(who, "vt", 4096).score == interval([1.0, 0.0])
    assert found.whole == AVERAGE and found.rows() == ["vt", "cwe", AVERAGE]
    partly = scores(*rows, entry(0.5, mechanism="quest"))
    assert partly.whole is None, "one who was not asked every task has no average to stand beside"
    assert [table.caption for table in sections.overview(partly)] == [
        "RULER, vt: score in percent, 95 % interval",
        "RULER, cwe: score in percent, 95 % interval",
    ]


def test_differences_are_taken_question_by_question(entry):
    base = [entry(score, i) for i, score in enumerate([1, 0, 1, 0, 1, 0, 1, 0])]
    better = [entry(min(1, score + 0.25), i, mechanism="quest") for i, score in enumerate([1, 0, 1, 0, 1, 0, 1, 0])]
    found = scores(*base, *better, entry(1.0, 99, mechanism="quest"))
    (((who, length), between),) = found.differences().items()
    assert (who.how, length, between.count) == ("quest", 4096, 8), "the ninth was asked of one alone"
    assert between.mean == pytest.approx(0.125) and between.low >= 0 and between.high <= 0.25
    apart = found.cells[who, "vt", 4096].score
    assert between.high - between.low < (apart.high - apart.low) / 2
    table = sections.differences(found)
    assert table.caption.startswith("Points above dense") and table.rows[0][1][0].text == "+12.5"
    assert sections.differences(scores(*base)) is None


def test_tasks_of_the_same_questions_are_averaged_question_by_question(entry):
    def rows(name):
        return [
            entry(float((i < 6) if who == "dense" else (i < 3)), i, eval=name, task=task, mechanism=who)
            for who in ("dense", "quest")
            for task in ("a", "b", "c", "d")
            for i in range(12)
        ]

    alike, apart = scores(*rows("rot"), name="rot"), scores(*rows("ruler"))
    dense, quest = alike.names
    for found in (alike, apart):
        assert found.cell(dense, AVERAGE, 4096).score.mean == 0.5 and found.cell(dense, AVERAGE, 4096).score.count == 48
        assert found.differences()[quest, 4096].mean == -0.25
    assert alike.cell(dense, AVERAGE, 4096).score.low == alike.cell(dense, "a", 4096).score.low
    width = [found.differences()[quest, 4096].high - found.differences()[quest, 4096].low for found in (alike, apart)]
    assert width[0] > 1.8 * width[1]


def test_questions_made_of_different_texts_are_told(entry):
    assert make([entry(), entry(number=1)]).notes == []
    (note,) = make([entry(), entry(number=1, questions="other")]).notes
    assert note.startswith("Questions of ruler were made of different texts")


def test_perplexities_are_means_of_likelihoods(entry):
    given = {"eval": "perplexity", "scoring": "probability"}
    rows = [entry(0.5, i, measures={"nll": nll}, **given) for i, nll in enumerate([0.6, 0.8])]
    found = scores(*rows, entry(0.0, 2, error="too long", **given), name="perplexity")
    assert found.scale is PERPLEXITY
    (line,) = found.lines()
    assert line["perplexity"] == pytest.approx(2.014, abs=1e-3) and line["questions"] == 2 and line["failed"] == 1
    assert line["low"] <= line["perplexity"] <= line["high"]
    assert sections.overview(found)[0].rows[0][1][0].text == "2.014" and sections.worst(found) is None


def test_what_got_no_answer_counts_and_is_told(entry):
    rows = [entry(0.0, 0, error="the context is too long"), entry(1.0, 1)]
    found = make(rows)
    assert found.notes == ["1 of 2 questions got no answer and count as wrong: see why below."]
    assert found.told()["scores"][0]["failed"] == 1 and found.told()["scores"][0]["score"] == 50.0
    table = sections.failures(found.scores[0])
    assert table.rows == [("dense", table.rows[0][1])] and table.rows[0][1][0].text == "the context is too long"
    assert sections.worst(found.scores[0]) is None, "it is told among those without an answer"


def test_evals_stand_apart_and_strangers_are_left_out(entry):
    found = make([entry(), entry(eval="needle", task="easy"), Entry({"frogs": 3}, {})])
    assert [scores.eval for scores in found.scores] == ["ruler", "needle"]
    assert found.notes == ["1 of 3 rows are of no eval that a report knows: they are left out."]
    with pytest.raises(UsageError, match="no row here"):
        make([Entry({"frogs": 3}, {})])


def test_runs_are_found_in_folders_and_files(entry, tmp_path):
    one, other = entry(1.0, 0), entry(0.0, 1)
    for name, each in (("a/ruler.jsonl", one), ("a/deeper/ruler-2of2.jsonl", other)):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with Journal(file) as journal:
            journal.begin(each.environment)
            journal.append(each.row)
    (tmp_path / "a" / "strange.jsonl").write_text('{"x": 1}\n')
    told = []
    assert [each.row["question"] for each in entries([tmp_path / "a"], told.append)] == [1, 0]
    assert len(told) == 1 and "strange.jsonl is no journal" in told[0]
    assert entries([tmp_path / "a" / "ruler.jsonl"]) == [one]
    printed = tmp_path / "printed.json"
    printed.write_text(json.dumps({"device": "d", "runs": [{"run": "r", "device": "x"}], "rows": [one.row]}))
    for name in ("printed.json", "printed.txt", "printed", "printed.jsonl"):
        printed = printed.rename(tmp_path / name)
        assert entries([printed]) == [replace(one, environment={"run": "r", "device": "x"})], "whatever its name"
    assert entries([(tmp_path / "a" / "ruler.jsonl").rename(tmp_path / "journal.json")]) == [one]


@pytest.mark.parametrize(
    "name,text,told",
    [
        ("gone.jsonl", None, "can't read"), ("gone.json", None, "can't read"), ("x.json", "[1]", "no result of an"),
        ("x.json", "{", "no result"), ("x.json", '{"rows": [3]}', "no result"), ("x.jsonl", "{}\n", "no journal"),
        ("x.json", '{"rows": [], "runs": 7}', "no answers"), ("x.json", '{"rows": [{"run": 7}]}', "no result"),
        ("empty/x.txt", "", "holds no journal"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_refused_in_a_line(tmp_path, name, text, told):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        entries([file.parent if file.parent != tmp_path else file])
    assert "\n" not in str(caught.value)


def test_numbers_are_written_for_people():
    assert [number(value, 1) for value in (0.04, -0.04, -3.25, 100.0)] == ["0.0", "0.0", "−3.2", "100.0"]
    assert number(2.5, 0, sign=True) == "+2" and number(-0.01, 1, sign=True) == "0.0"
