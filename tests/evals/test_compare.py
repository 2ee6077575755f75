"""Mechanisms side by side, through the real engine on a tiny model."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from longspan.attention import make, parse
from longspan.engine.kv_context import KVContext
from longspan.errors import UsageError
from longspan.evals.asking.engines import choosing
from longspan.evals.compare import Task, contenders, measure
from longspan.evals.compare_report import picture, table
from longspan.evals.haystack import prose

pytestmark = pytest.mark.usefixtures("one_thread", "places")
LENGTH = 900
EVICTING = {"h2o", "snapkv", "rocketkv", "expected", "keydiff", "kvzip"}


@pytest.fixture
def task(tiny):
    return Task(LENGTH, tiny.tokens(prose()[:20000])[: LENGTH + 24], haystacks=1, greedy=6, seed=0)


def test_dense_comes_first_and_agrees_with_itself(make_llm, task):
    (row,) = measure(make_llm(), [], ["1/4"], task)
    assert (row.mechanism, row.budget, row.keys) == ("dense", "all", LENGTH)
    assert row.perplexity_ratio == 1 and row.agreement == 1
    assert row.questions == 8 and row.decode_tokens_per_s > 0


def test_perplexity_is_that_of_the_next_tokens(make_llm, tiny, task):
    (row,) = measure(make_llm(), [], ["1/4"], task)
    context = KVContext(tiny, make("dense"))
    lost = 0.0
    for i, token in enumerate(task.tokens):
        logits = context.step([token])
        if LENGTH - 1 <= i < len(task.tokens) - 1:
            lost -= float(torch.log_softmax(logits, 0)[task.tokens[i + 1]])
    assert row.perplexity == pytest.approx(math.exp(lost / 24), rel=1e-3)


def test_who_reads_everything_is_dense_and_who_reads_little_is_not(make_llm, task):
    specs = ["quest:dense_layers=0,window=64", "tree:window=64", "streaming"]
    rows = {(row.mechanism, row.budget): row for row in measure(make_llm(), specs, ["2", "1/2"], task)}
    assert len(rows) == 7
    for spec in specs[:1]:
        assert rows[spec, "2"].perplexity_ratio == pytest.approx(1, abs=1e-3)
        assert rows[spec, "2"].agreement == 1
    for spec in specs:
        assert rows[spec, "1/2"].keys < rows[spec, "2"].keys <= 1.5 * LENGTH
        assert rows[spec, "1/2"].perplexity_ratio != rows[spec, "2"].perplexity_ratio


def test_every_chooser_runs_at_every_budget_and_leaves_no_trace(make_llm, task):
    specs = list(choosing())
    names = {parse(spec).name for spec in specs}
    assert names == {"streaming", "sparse", "superlinear", "quest", "sparq", "tree", "retrieval"} | EVICTING
    assert {"quest:who=model", "tree:who=layer", "superlinear:sinks=4,summary=bounds", "retrieval:read=place"} <= set(
        specs
    )
    rows = list(measure(make_llm(), specs, ["1/2"], task))
    assert [row.mechanism for row in rows] == ["dense", *specs]
    (alone,) = (row for row in measure(make_llm(), [specs[-1]], ["1/2"], task) if row.mechanism == specs[-1])
    timed = {"decode_tokens_per_s": 0, "decode_ratio": 0}
    assert asdict(replace(alone, **timed)) == asdict(replace(rows[-1], **timed))


@pytest.mark.parametrize("name", sorted(EVICTING))
def test_who_evicts_reads_for_itself(make_llm, task, name):
    spec = f"{name}:window=64" if name == "kvzip" else f"{name}:window=64,every=128"
    rows = {row.budget: row for row in measure(make_llm(), [spec], ["2", "1/4"], task)}
    assert rows["2"].perplexity_ratio == pytest.approx(1, abs=1e-3) and rows["2"].agreement == 1
    assert rows["1/4"].perplexity_ratio != rows["2"].perplexity_ratio
    assert rows["1/4"].keys < rows["2"].keys == LENGTH


def test_known_rows_are_not_measured_again(make_llm, task):
    first = list(measure(make_llm(), ["streaming"], ["1/2"], task))
    rest = list(measure(make_llm(), ["streaming"], ["1/2", "1/4"], task, known=first))
    assert [(row.mechanism, row.budget) for row in rest] == [("streaming", "1/4")]
    assert rest[0].perplexity_ratio == pytest.approx(rest[0].perplexity / first[0].perplexity, abs=1e-3)
    assert list(measure(make_llm(), ["streaming"], ["1/2"], task, known=first)) == []


def test_a_budget_too_small_for_one_of_many_leaves_that_one_out(make_llm, task):
    told = []
    found = contenders(["tree", "streaming"], ["1/20"], LENGTH, told.append)
    assert [each.spec for each in found] == ["dense", "streaming"]
    assert len(told) == 1 and "tree" in told[0] and "1/20" in told[0]


@pytest.mark.parametrize("spec", ["xattention", "quest:budget=1024", "nothing"])
def test_what_has_no_place_here_is_refused(spec):
    budget = "1/100"
    with pytest.raises(UsageError):
        contenders([spec], [budget], LENGTH)


def test_prefill_by_another_mechanism_changes_what_is_read(make_llm, task):
    (dense,) = measure(make_llm(), [], ["1/2"], task)
    (window,) = measure(make_llm(), [], ["1/2"], task, make("streaming", window=64))
    assert window.perplexity != dense.perplexity


def test_the_table_and_the_picture_show_the_rows(make_llm, task, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [asdict(row) for row in measure(make_llm(), ["streaming", "quest"], ["1/2", "1/4"], task)]
    lines = table(rows)
    assert len(lines) == 5 and lines[0][:3] == ["dense", "all", str(LENGTH)]
    file = tmp_path / "compare.png"
    picture(rows, "a tiny model", file)
    assert file.read_bytes().startswith(b"\x89PNG")
