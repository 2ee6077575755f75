"""Ways to compress side by side: the arithmetic of ratios, the cases, the rows; on a tiny model."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longspan.attention import make, parse
from longspan.engine.kv_context import KVContext
from longspan.errors import UsageError
from longspan.evals import compress
from longspan.evals.compress import Case, Outcome, Question, cases, row
from longspan.evals.compress_ours import Ours, Readings, Way, within
from longspan.evals.compress_report import COLUMNS, picture, table
from longspan.evals.compress_run import Given, run
from longspan.evals.compress_work import Copy, Here
from longspan.evals.haystack import prose
from longspan.evals.journal import Journal, read
from longspan.evals.together import continued
from longspan.hf.loading import load
from tiny_hybrid import save_hybrid

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.compress import result

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 600


@pytest.fixture(scope="module")
def asked(tiny):
    return cases(tiny, prose()[:40000], LENGTH, ["niah_single_1"], 1, 2, 12, seed=0, longest_answer=4)


def test_cases_have_the_length_asked_for_and_the_texts_next_tokens(tiny, asked):
    question, *texts = asked
    assert question.question is not None and question.question.max_tokens == 4
    assert len(question.tokens) <= LENGTH
    every = tiny.tokens(prose()[:40000])
    for text, start in zip(texts, [0, (len(every) - LENGTH - 12) // 2], strict=True):
        assert text.tokens + list(text.follows) == every[start : start + LENGTH + 12]
        assert len(text.tokens) == LENGTH - 1


def test_too_short_a_text_is_refused(tiny):
    with pytest.raises(UsageError, match="give more with --doc"):
        cases(tiny, "short", LENGTH, [], 0, 1, 12, seed=0, longest_answer=4)


@pytest.mark.parametrize("way", ["streaming", "snapkv", "keydiff", "snapkv+fp8", "expected:heads=adaptive"])
@pytest.mark.parametrize("ratio", [4, 5])
def test_what_is_kept_is_the_share_that_was_asked_for(tiny, way, ratio):
    length = 1000
    way_at = within(tiny, way, ratio, length)
    tokens = tiny.tokens(prose()[:40000])[:length]
    kept = {}
    for name, made in (("dense", Way(make("dense"))), (way, way_at)):
        context = Readings(tiny).read(made, tokens)
        kept[name] = context.nbytes
    # What evicts shrinks to the bytes allowed, positions and pages that are not full among them.
    page = KVContext(tiny, make("dense")).layers[0].pool.native.page_bytes * tiny.dimensions.layers
    assert 0 < kept[way] <= kept["dense"] / ratio * (1 if way_at.mechanism.evicts or way == "streaming" else 8 / 7)
    assert kept[way] > kept["dense"] / ratio - 3 * page or not way_at.mechanism.evicts


def test_a_format_alone_keeps_its_share_or_is_refused(tiny):
    assert within(tiny, "fp8", 2, LENGTH) == Way(make("dense"), "fp8")
    with pytest.raises(UsageError, match="keeps more than 1/16"):
        within(tiny, "fp8", 16, LENGTH)
    with pytest.raises(UsageError, match="unknown"):
        within(tiny, "snapkv+fp9", 2, LENGTH)


def test_ours_scores_and_answers_as_the_engine_does(tiny, asked):
    runner = Ours(tiny, Way(make("dense")))
    text = asked[1]
    continued = runner.continued(text, 5)
    (found,) = runner.run([text], [continued])
    context = KVContext(tiny, make("dense"))
    lost = 0.0
    for i, token in enumerate(text.tokens + list(text.follows)):
        logits = context.step([token])
        if LENGTH - 1 <= i < LENGTH - 1 + 12:
            lost -= float(torch.log_softmax(logits, 0)[text.follows[i - LENGTH + 2]])
    assert found.nlls == pytest.approx(lost, rel=1e-3)
    assert list(found.likeliest) == continued
    assert found.kept_bytes > 0
    answer = runner.run(asked[:1], ())[0].answer
    assert answer and len(tiny.tokens(answer)) <= 8


WAYS = [
    "dense",
    "streaming",
    "h2o",
    "snapkv",
    "snapkv:heads=adaptive",
    "rocketkv",
    "expected:when=question",
    "snapkv+fp8",
]


@pytest.mark.parametrize("way", WAYS)
def test_answers_written_together_are_those_written_alone(tiny, way):
    tokens = tiny.tokens(prose()[:40000])
    made = within(tiny, way, 5 if "+" in way else 2, LENGTH) if way != "dense" else Way(make("dense"))
    contexts, first, alone = [], [], []
    for start, count in ((0, LENGTH), (700, LENGTH - 90), (1500, LENGTH - 1)):
        context = Readings(tiny).read(made, tokens[start : start + count])
        first.append(int(context.step(tokens[:30]).argmax()))
        contexts.append(context)
    before = [(context.length, context.nbytes) for context in contexts]
    wanted = [7, 1, 5]
    together = continued(tiny, contexts, first, 7, lambda i, written: len(written) == wanted[i])
    assert [(context.length, context.nbytes) for context in contexts] == before, "nothing is left behind"
    for context, token, count in zip(contexts, first, wanted, strict=True):
        alone.append([token])
        while len(alone[-1]) < count:
            alone[-1].append(int(context.step(alone[-1][-1:]).argmax()))
    assert together == alone


def test_answers_of_a_hybrid_model_are_written_one_by_one(tmp_path):
    model = load(str(save_hybrid(tmp_path, "lfm2")), device="cpu", dtype=torch.float32)
    tokens, contexts = model.tokens(prose()[:8000]), []
    for start in (0, 300):
        contexts.append(Readings(model).read(Way(make("dense")), tokens[start : start + 200]))
    together = continued(model, contexts, [5, 6], 4, lambda _, written: len(written) == 4)
    for context, said in zip(contexts, together, strict=True):
        again = said[:1]
        while len(again) < 4:
            again.append(int(context.step(again[-1:]).argmax()))
        assert again == said and context.length == 203


@pytest.mark.parametrize("way", ["snapkv+fp8", "expected:heads=adaptive", "keydiff:every=0"])
def test_a_document_is_read_once_for_every_ratio(tiny, way, monkeypatch):
    tokens, readings, read = tiny.tokens(prose()[:40000])[:LENGTH], Readings(tiny), []
    forward = type(tiny).forward
    monkeypatch.setattr(type(tiny), "forward", lambda self, t, *a, **o: (read.extend(t), forward(self, t, *a, **o))[1])
    shared = {}
    for ratio in (5, 6, 8):
        context = readings.read(within(tiny, way, ratio, LENGTH), tokens)
        shared[ratio] = [group.positions().tolist() for kv in context.kept.layers for group in kv.groups]
        context.free()
    assert read == tokens
    for ratio, rows in shared.items():
        context = Readings(tiny).read(within(tiny, way, ratio, LENGTH), tokens)
        assert [group.positions().tolist() for kv in context.kept.layers for group in kv.groups] == rows


def test_a_way_that_waits_for_the_question_counts_the_document_too(tiny, asked):
    whole = Ours(tiny, Way(make("dense"))).run(asked, ())
    kept = {}
    for way in ("snapkv", "snapkv:when=question"):
        kept[way] = Ours(tiny, within(tiny, way, 4, LENGTH)).run(asked, ())
    for dense, early, late in zip(whole, kept["snapkv"], kept["snapkv:when=question"], strict=True):
        assert early.kept_bytes <= dense.kept_bytes / 4 and late.kept_bytes > dense.kept_bytes
    # Here the question's tokens are the text's own last ones, and the rows that they look at are kept.
    assert all(math.isfinite(late.nlls) for late in kept["snapkv:when=question"])


def test_a_row_counts_scores_perplexity_and_agreement():
    question = Question("t", [1], ("yes",), "all", 3)
    made = [Case([0], question), Case([0], replace(question, task="u")), Case([0], None, (1, 2, 3))]
    outcomes = [Outcome(100, "Yes."), Outcome(100, "no"), Outcome(40, "", 2.0, (7, 8))]
    dense = row("longspan", "dense", 1.0, "dense", made, outcomes, [(7, 9)], None)
    assert dense.tasks == {"t": 1.0, "u": 0.0} and dense.score == 0.5
    assert dense.perplexity == pytest.approx(math.e, abs=1e-3) and dense.agreement == 0.5
    assert dense.kept_bytes == 80 and dense.kept_share == 1
    assert 0 <= dense.low < dense.score < dense.high <= 1
    half = row("longspan", "x", 2.0, "x", made, [replace(o, kept_bytes=20) for o in outcomes], [(7, 8)], dense)
    assert half.kept_share == 0.25 and half.agreement == 1 and half.perplexity_ratio == 1


def test_a_run_is_kept_and_goes_on(tiny, asked, tmp_path):
    told = []
    given = Given(["streaming", "fp16", "snapkv"], (), [2.0, 3.0], LENGTH, 3, {"of": "these"})
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.begin({"device": "none"})
        rows = run(tiny, (), replace(given, ways=["streaming"]), asked, journal, told.append)
    assert [(r.way, r.ratio) for r in rows] == [("dense", 1.0), ("streaming", 2.0), ("streaming", 3.0)]
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.begin({"device": "none"})
        told.clear()
        again = run(tiny, (), given, asked, journal, told.append)
    assert again[:2] == rows[:2] and len(again) == 6, "fp16 alone can't keep a third"
    assert sum("dense at" in line for line in told) == 0 and any("left out: fp16 at 3" in line for line in told)
    dense, *others = again
    assert dense.kept_share == 1 and all(0 < r.kept_share < 1 for r in others)
    assert len(table([vars(r) for r in again])[0]) == len(COLUMNS)
    file = tmp_path / "compress.png"
    picture([vars(r) for r in again], "tiny", file)
    assert file.read_bytes()[:4] == b"\x89PNG"


class Peers:
    """A peer whose every row is the same."""

    name, ended = "kvpress", False

    def __init__(self, nll, fails=()):
        self.nll, self.asked, self.fails = nll, [], fails

    def ask(self, asked):
        self.asked.append((asked["press"], asked["ratio"]))
        if asked["press"] in self.fails:
            raise UsageError("kvpress: it fell")
        return {"cases": [self.case(each["score"]) for each in asked["cases"]]}

    def case(self, score):
        count = len(score[1:]) and len(score[1])
        scores = [{"nll": self.nll, "likeliest": []}, {"nll": 0.0, "likeliest": [0] * count}]
        return {"bytes": 1, "scores": scores, "answer": [0]}


def test_copies_of_a_peer_share_its_rows(tiny, asked):
    nll = Ours(tiny, Way(make("dense"))).run(asked[1:], ())
    peers = [Peers(sum(outcome.nlls for outcome in nll) / len(nll)) for _ in range(2)]
    given = Given(["snapkv"], ["a", "b", "c"], [2.0, 4.0], LENGTH, 3, {})
    with Journal(None) as journal:
        journal.begin({})
        rows = run(tiny, peers, given, asked, journal, lambda _: None)
        again = run(tiny, peers, given, asked, journal, lambda _: None)
    assert rows == again and len(rows) == 2 + 2 + 6
    assert [(r.who, r.way, r.ratio) for r in rows[4:]] == [("kvpress", p, r) for p in "abc" for r in (2.0, 4.0)]
    told = [plan for peer in peers for plan in peer.asked if plan[0]]
    assert sorted(told) == sorted((p, r) for p in "abc" for r in (2.0, 4.0)), "each row once"


def test_a_press_that_fails_is_left_out_and_a_peer_that_ended_is_told(tiny, asked):
    nll = Ours(tiny, Way(make("dense"))).run(asked[1:], ())
    peer, told = Peers(sum(outcome.nlls for outcome in nll) / len(nll), fails=("b",)), []
    given = Given([], ["a", "b", "c"], [2.0], LENGTH, 3, {})
    with Journal(None) as journal:
        journal.begin({})
        rows = run(tiny, [peer], given, asked, journal, told.append)
        assert [r.way for r in rows[2:]] == ["a", "c"] and any("left out: b at 2: kvpress: it fell" in t for t in told)


def test_a_peer_that_ended_leaves_the_rest_to_the_others(tiny, asked):
    nll = Ours(tiny, Way(make("dense"))).run(asked[1:], ())
    mean, told = sum(outcome.nlls for outcome in nll) / len(nll), []
    well, ill = Peers(mean), Peers(mean, fails=("a", "b", "c"))
    given = Given(["snapkv"], ["a", "b", "c"], [2.0], LENGTH, 3, {})
    with Journal(None) as journal:
        journal.begin({})
        ill.ended = True
        rows = run(tiny, [well, ill], given, asked, journal, told.append)
    assert sum(r.who == "kvpress" for r in rows[2:]) >= 2, "at most the row that it was at is lost"
    assert [r.way for r in rows if r.who == "longspan"] == ["dense", "snapkv"]


def test_what_fails_here_ends_nothing_else(tiny, asked, monkeypatch):
    ours, told = Ours.run, []

    def full(runner, cases, continuations):
        if runner.way.mechanism.name == "snapkv":
            raise torch.OutOfMemoryError("no room\nfor it")
        return ours(runner, cases, continuations)

    monkeypatch.setattr(Ours, "run", full)
    with Journal(None) as journal:
        journal.begin({})
        rows = run(tiny, (), Given(["snapkv", "keydiff"], (), [2.0], LENGTH, 3, {}), asked, journal, told.append)
    assert [r.way for r in rows] == ["dense", "keydiff"]
    assert any(line == "left out: snapkv at 2: OutOfMemoryError: no room for it" for line in told)


def test_a_format_alone_is_measured_once_for_all_ratios(tiny, asked, monkeypatch):
    ours, runs = Ours.run, []
    monkeypatch.setattr(Ours, "run", lambda runner, *given: runs.append(runner.way) or ours(runner, *given))
    here = Here(tiny, LENGTH, asked, [[1, 2, 3]])
    assert here.measure("fp8", 1.5) == here.measure("fp8", 2.0) and len(runs) == 1
    assert here.measure("snapkv", 2.0) != here.measure("snapkv", 4.0) and len(runs) == 3


def test_what_its_format_alone_keeps_few_enough_of_is_left_out(tiny):
    with pytest.raises(
        UsageError, match="int2:residual=0,sinks=0 alone keeps no more than 1/2: nothing would be evicted"
    ):
        within(tiny, "snapkv+int2:residual=0,sinks=0", 2, LENGTH)


@pytest.mark.parametrize("ratio", [2, 4])
def test_heads_of_all_layers_keep_no_more_bytes_together(tiny, ratio):
    way = within(tiny, "kvzip", ratio, LENGTH)
    assert way.mechanism.heads == "model"
    context = Readings(tiny).read(way, tiny.tokens(prose()[:40000])[:LENGTH])
    dense = KVContext(tiny, make("dense")).layers[0].pool.native.page_bytes * tiny.dimensions.layers * -(-LENGTH // 64)
    assert 0.85 * dense / ratio < context.nbytes <= dense / ratio
    context.free()


def test_what_keeps_every_key_is_measured_as_it_was_told_to_read(tiny):
    assert within(tiny, "quest:budget=160,sinks=4+fp8", 1.5, LENGTH) == Way(parse("quest:budget=160,sinks=4"), "fp8")
    with pytest.raises(UsageError, match="keeps more than 1/4"):
        within(tiny, "quest:budget=160", 4, LENGTH)


def test_copies_of_ours_measure_what_this_process_does(tiny, folder, asked):
    given = Given(["snapkv", "streaming", "keydiff", "fp16"], (), [2.0, 3.0], LENGTH, 3, {})
    dtype = str(tiny.dtype).removeprefix("torch.")
    with Journal(None) as journal, Copy(str(folder), "cpu", dtype) as copy:
        journal.begin({})
        told = []
        rows = run(tiny, (), given, asked, journal, told.append, [copy])
        assert any("left out: fp16 at 3: " in line for line in told)
    with Journal(None) as journal:
        journal.begin({})
        assert run(tiny, (), given, asked, journal, lambda _: None) == rows
    assert [(r.way, r.ratio) for r in rows[1:]] == [(w, r) for w in given.ways for r in (2.0, 3.0)][: len(rows) - 1]


def test_what_fails_in_a_copy_is_told_in_a_line(tiny, folder, asked):
    with Copy(str(folder), "cpu", "float32") as copy:
        copy.begin(LENGTH, asked, [[1, 2, 3]])
        with pytest.raises(UsageError, match=r"a copy of longspan: unknown attention 'nobody'"):
            copy.measure("nobody", 2.0)
        options, outcomes = copy.measure("snapkv", 2.0)
        assert options.startswith("snapkv") and len(outcomes) == len(asked)


def test_when_the_time_is_over_nothing_is_begun_and_it_says_so(tiny, asked):
    told = []
    given = Given(["streaming", "snapkv"], (), [2.0], LENGTH, 3, {}, minutes=1e-9)
    with Journal(None) as journal:
        journal.begin({})
        rows = run(tiny, (), given, asked, journal, told.append)
    assert [r.way for r in rows] == ["dense"]
    assert "2 rows were not reached" in told[-1]


def test_a_peer_that_is_another_model_is_not_compared(tiny, asked, monkeypatch):
    given = Given([], [], [2.0], LENGTH, 3, {})
    with Journal(None) as journal, pytest.raises(UsageError, match="did not load the same weights"):
        journal.begin({})
        run(tiny, [Peers(500.0)], given, asked, journal, lambda _: None)


def test_a_peer_loads_the_folder_that_ours_came_from(tiny, folder):
    assert compress.folder_of(tiny) == folder


def test_a_result_is_put_together_from_journals(tiny, asked, tmp_path):
    of = [{"length": 1}, {"length": 2}]
    for name, ways, told in (("a", ["snapkv"], of[0]), ("b", ["snapkv", "keydiff"], of[0]), ("c", [], of[1])):
        with Journal(tmp_path / name) as journal:
            journal.begin({"device": "none", "command": f"run {name}", "model": "/some/model.gguf"})
            run(tiny, (), Given(ways, (), [2.0], LENGTH, 3, told), asked, journal, lambda _: None)
    found = result([entry for name in "abc" for entry in read(tmp_path / name)])
    assert found["of"] == of[0] and found["command"] == "run a; run b" and found["model"] == "model.gguf"
    assert [(row["way"], row["ratio"]) for row in found["rows"]] == [("dense", 1.0), ("snapkv", 2.0), ("keydiff", 2.0)]
