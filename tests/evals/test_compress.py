"""Ways to compress side by side: the arithmetic of ratios, the cases, the rows; on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch

from longspan.attention import make
from longspan.engine.kv_context import KVContext
from longspan.errors import UsageError
from longspan.evals import compress
from longspan.evals.compress import Case, Ours, Outcome, Question, cases, row, within
from longspan.evals.compress_report import COLUMNS, picture, table
from longspan.evals.compress_run import Given, run
from longspan.evals.haystack import prose
from longspan.evals.journal import Journal

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
@pytest.mark.parametrize("ratio", [2, 4])
def test_what_is_kept_is_the_share_that_was_asked_for(tiny, way, ratio):
    length = 1000
    mechanism, kv_format = within(tiny, way, ratio, length)
    tokens = tiny.tokens(prose()[:40000])[:length]
    kept = {}
    for name, made in (("dense", (make("dense"), None)), (way, (mechanism, kv_format))):
        context = KVContext(tiny, made[0], kv_format=made[1])
        context.extend(tokens)
        kept[name] = context.nbytes
    # Pages that are not full, and in a smaller format the one being filled, are counted too.
    page = KVContext(tiny, make("dense")).layers[0].pool.native.page_bytes * tiny.dimensions.layers
    allowed = 2 * page * (2 if ":heads=adaptive" in way else 1) + (page if kv_format else 0)
    assert 0 < kept[way] <= kept["dense"] / ratio + allowed


def test_a_format_alone_keeps_its_share_or_is_refused(tiny):
    mechanism, kv_format = within(tiny, "fp8", 2, LENGTH)
    assert (mechanism, kv_format) == (make("dense"), "fp8")
    with pytest.raises(UsageError, match="keeps more than 1/16"):
        within(tiny, "fp8", 16, LENGTH)
    with pytest.raises(UsageError, match="unknown"):
        within(tiny, "snapkv+fp9", 2, LENGTH)


def test_ours_scores_and_answers_as_the_engine_does(tiny, asked):
    runner = Ours(tiny, make("dense"), None)
    text = asked[1]
    continued = runner.continued(text, 5)
    found = runner.run(text, continued)
    context = KVContext(tiny, make("dense"))
    lost = 0.0
    for i, token in enumerate(text.tokens + list(text.follows)):
        logits = context.step([token])
        if LENGTH - 1 <= i < LENGTH - 1 + 12:
            lost -= float(torch.log_softmax(logits, 0)[text.follows[i - LENGTH + 2]])
    assert found.nlls == pytest.approx(lost, rel=1e-3)
    assert list(found.likeliest) == continued
    assert found.kept_bytes > 0
    answer = runner.run(asked[0], ()).answer
    assert answer and len(tiny.tokens(answer)) <= 8


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
    given = Given(["streaming", "fp8", "snapkv+fp8"], (), [2.0, 8.0], LENGTH, 3, {"of": "these"})
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.begin({"device": "none"})
        rows = run(tiny, None, replace(given, ways=["streaming"]), asked, journal, told.append)
    assert [(r.way, r.ratio) for r in rows] == [("dense", 1.0), ("streaming", 2.0), ("streaming", 8.0)]
    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.begin({"device": "none"})
        told.clear()
        again = run(tiny, None, given, asked, journal, told.append)
    assert again[:2] == rows[:2] and len(again) == 6, "fp8 alone can't keep an eighth"
    assert sum("dense at" in line for line in told) == 0 and any("left out: fp8 at 8" in line for line in told)
    dense, *others = again
    assert dense.kept_share == 1 and all(0 < r.kept_share < 1 for r in others)
    assert len(table([vars(r) for r in again])[0]) == len(COLUMNS)
    file = tmp_path / "compress.png"
    picture([vars(r) for r in again], "tiny", file)
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_a_peer_that_is_another_model_is_not_compared(tiny, asked, monkeypatch):
    class Other:
        name = "kvpress"

        def ask(self, asked):
            count = len(asked["score"][1:]) and len(asked["score"][1])
            scores = [{"nll": 500.0, "likeliest": []}, {"nll": 0.0, "likeliest": [0] * count}]
            return {"bytes": 1, "scores": scores, "answers": [[0]]}

    given = Given([], [], [2.0], LENGTH, 3, {})
    with Journal(None) as journal, pytest.raises(UsageError, match="did not load the same weights"):
        journal.begin({})
        run(tiny, Other(), given, asked, journal, lambda _: None)


def test_a_peer_loads_the_folder_that_ours_came_from(tiny, folder):
    assert compress.folder_of(tiny) == folder
