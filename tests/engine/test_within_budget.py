"""Documents, answers and sessions under a byte budget: cold pages are left as summaries, and bytes are given back."""

import signal

import pytest
import torch

from longspan import LLM
from longspan.attention import make, parse
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, UsageError
from longspan.evals.haystack import prose
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import SUMMARY
from longspan.retrieval.heads import RetrievalHeads

QUESTION = "Which street has the museum?"
HEADS = RetrievalHeads(((1, 0), (2, 1), (2, 3)))
TIGHT = 1_000_000
"""Bytes that do not hold the text below in full."""
BUDGETS = [("auto", TIGHT), ("auto", 700_000), ("fp8", 380_000), ("fp8", 300_000), ("int4", 340_000)]
"""Formats and bytes under which pages are held in fewer bits, or some of them as their summaries alone."""


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:30000])


@pytest.fixture
def long_text(text):
    """About 3000 tokens, three times the model's window."""
    return " ".join(text.replace("street", f"street {chr(97 + i)}") for i in range(7))


def read(llm, text, name=None):
    session = llm.session(name)
    llm.add_text(session, text)
    llm.prefill(session)
    return session


def resolutions(context):
    return [[kv.resolution(page) for page in range(len(kv.table))] for kv in context.layers]


def demoted(context):
    """Pages that are held in less detail than they came in."""
    own = {kv.pool.format.name for kv in context.layers} | {kv.pool.native.format.name for kv in context.layers}
    return [[resolution not in own for resolution in layer] for layer in resolutions(context)]


@pytest.mark.parametrize(
    "spec", ["tree", "tree:who=model", "tree:dense_layers=1", "tree:sinks=200", "tree:coarse=false"]
)
@pytest.mark.parametrize("kv,budget", BUDGETS)
def test_a_question_is_answered_where_pages_were_demoted(tiny, calibrated, long_text, spec, kv, budget):
    llm = LLM(tiny, spec, kv=kv, kv_budget=budget)
    session = read(llm, long_text)
    assert any(map(any, demoted(session.memory)))
    answer = llm.ask(QUESTION, session, max_tokens=3)
    assert answer.citations and answer.stats.decoded_tokens == 3
    assert llm.kv_budget.used <= budget
    llm.add_text(session, "The cellar is closed. " * 40)
    assert llm.ask(QUESTION, session, max_tokens=3).citations


def test_demoted_pages_are_searched_by_their_exact_copies(tiny, tokens):
    free = KVContext(tiny, make("tree"), make("streaming", window=200))
    tight = KVContext(tiny, make("tree"), make("streaming", window=200), budget=Budget(TIGHT, "KV"))
    for context in (free, tight):
        context.extend(tokens[:3000])
    # Of the first layer alone, where keys do not depend on how was attended.
    heads = RetrievalHeads(((0, 0), (0, 3)))
    assert any(map(any, demoted(tight)))
    question = tiny.tokens(QUESTION)
    torch.testing.assert_close(tight.mass(question, heads), free.mass(question, heads), atol=1e-6, rtol=1e-4)


def test_a_question_of_many_pages_stays_within_the_budget(tiny, tokens):
    budget = Budget(TIGHT, "KV")
    context = KVContext(tiny, make("tree"), budget=budget)
    context.extend(tokens[:3000])
    assert context.mass(tokens[:450], HEADS).shape == (3, 3000)
    assert budget.used <= TIGHT and context.length == 3000


@pytest.mark.parametrize("prefill", ["streaming:window=1200", "streaming:window=64,sinks=200"])
def test_what_reads_documents_may_look_further_back_than_what_answers(tiny, tokens, prefill):
    context = KVContext(tiny, make("tree"), parse(prefill), budget=Budget(TIGHT + TIGHT // 4, "KV"))
    context.extend(tokens[:4000])
    assert any(map(any, demoted(context)))
    assert context.step(tokens[:5]).isfinite().all()
    context = KVContext(tiny, make("streaming", window=100), parse(prefill))
    context.extend(tokens[:4000])
    assert context.step(tokens[:5]).isfinite().all()


def test_dense_layers_fall_back_where_pages_were_demoted(tiny, tokens):
    context = KVContext(tiny, make("tree", window=64, dense_layers=1))
    context.extend(tokens[:900])
    for kv in context.layers:
        kv.demote(range(2, 8), SUMMARY, keep_exact=True)
    assert context.step(tokens[:5]).isfinite().all()


@pytest.mark.parametrize("kv,budget", BUDGETS)
def test_a_session_with_demoted_pages_goes_on_where_it_was(tiny, calibrated, long_text, kv, budget):
    llm = LLM(tiny, "tree", kv=kv, kv_budget=budget)
    session = read(llm, long_text, "codes")
    llm.save(session)
    before = resolutions(session.memory)
    assert any(map(any, demoted(session.memory)))
    said = llm.ask(QUESTION, session, max_tokens=8).text
    again = LLM(tiny, "tree", kv=kv, kv_budget=budget)
    restored = again.session("codes")
    assert resolutions(restored.memory) == before
    assert again.ask(QUESTION, restored, max_tokens=8).text == said
    again.add_text(restored, "The cellar is closed. " * 40)
    again.prefill(restored)
    assert again.kv_budget.used <= budget


@pytest.mark.parametrize("kv,budget", BUDGETS)
def test_a_session_is_restored_without_the_budget_it_was_read_under(tiny, calibrated, long_text, kv, budget):
    llm = LLM(tiny, "tree", kv=kv, kv_budget=budget)
    llm.save(read(llm, long_text, "codes"))
    free = LLM(tiny, "tree", kv=kv)
    session = free.session("codes")
    assert not any(map(any, demoted(session.memory))), "all come back as they were"
    free.add_text(session, "The cellar is closed. " * 40)
    assert free.ask(QUESTION, session, max_tokens=3).citations


@pytest.mark.parametrize("kv,budget", BUDGETS)
def test_a_session_is_restored_under_a_smaller_budget_than_it_was_read_under(tiny, calibrated, long_text, kv, budget):
    llm = LLM(tiny, "tree", kv=kv)
    session = read(llm, long_text, "codes")
    llm.save(session)
    keys = [kv.keys(0, kv.length).clone() for kv in session.memory.layers]
    small = LLM(tiny, "tree", kv=kv, kv_budget=budget)
    restored = small.session("codes")
    assert small.kv_budget.used <= budget
    assert small.ask(QUESTION, restored, max_tokens=3).citations
    assert any(map(any, demoted(restored.memory)))
    small.add_text(restored, "The cellar is closed. " * 20)
    small.prefill(restored)
    assert small.kv_budget.used <= budget
    # Nothing was lost: without a budget every page comes back as it was.
    small.keep_documents(restored, 1)
    small.save(restored)
    again = LLM(tiny, "tree", kv=kv).session("codes")
    for kv, wanted in zip(again.memory.layers, keys, strict=True):
        assert kv.length == wanted.shape[2] and torch.equal(kv.keys(0, PAGE * 30), wanted[:, :, : PAGE * 30])
    with pytest.raises(PoolExhaustedError, match="does not hold the newest"):
        LLM(tiny, "tree", kv=llm._kv_format or "auto", kv_budget=TIGHT // 10).session("codes")


def test_a_context_that_is_dropped_gives_its_bytes_back(tiny, calibrated, text):
    llm = LLM(tiny, "quest", kv_budget=2 * TIGHT)
    for _ in range(8):
        session = read(llm, text)
        assert 0 < llm.kv_budget.used < TIGHT
        del session
        assert llm.kv_budget.used == 0


def test_a_session_that_the_budget_does_not_hold_takes_nothing_of_it(tiny, calibrated, text):
    llm = LLM(tiny, "quest")
    llm.save(read(llm, text, "codes"))
    small = LLM(tiny, "quest", kv_budget=TIGHT // 10)
    with pytest.raises(PoolExhaustedError, match="--kv-budget"):
        small.session("codes")
    assert small.kv_budget.used == 0


@pytest.mark.parametrize("spec,error", [("quest", PoolExhaustedError), (None, UsageError)])
def test_documents_that_can_not_be_kept_leave_the_session_as_it_was(
    tiny, calibrated, text, long_text, tmp_path, spec, error
):
    llm = LLM(tiny, spec, kv_budget=TIGHT // 2)
    session = read(llm, text)
    said, length = llm.ask(QUESTION, session, max_tokens=4).text, session.memory.length
    (tmp_path / "long.txt").write_text(long_text)
    with pytest.raises(error):
        llm.read(session, [tmp_path / "long.txt"])
    assert len(session.documents) == 1 and session.memory.length == length
    assert llm.ask(QUESTION, session, max_tokens=4).text == said


def test_a_question_too_long_is_refused_before_documents_are_read(tiny, calibrated, text):
    from longspan.errors import ContextTooLongError

    llm = LLM(tiny, "quest")
    session = llm.session()
    llm.add_text(session, text)
    with pytest.raises(ContextTooLongError, match="window holds"):
        llm.generate("x " * 440, session)
    assert session.memory is None


def test_a_text_shorter_than_the_sinks_is_read_again(tiny, calibrated):
    llm = LLM(tiny, "retrieval")
    session = read(llm, "Gate")
    assert session.memory.length <= HEADS.sinks
    answer = llm.ask("Gate?", session, max_tokens=2)
    assert answer.read_again == ["Gate"] and [c.text for c in answer.citations] == ["Gate"]


@pytest.mark.parametrize("spec,kv", [("dense", None), ("quest", "fp8"), ("tree", None)])
@pytest.mark.parametrize("at", ["take", "charge", "append"])
def test_ctrl_c_while_pages_change_leaves_them_whole(tiny, tokens, monkeypatch, spec, kv, at):
    from longspan.kv import budget as budgets
    from longspan.kv import pages, planes

    home = {"charge": budgets.Budget, "append": pages.SlotTable}.get(at, planes.Plane)
    limit = 600_000 if spec == "tree" else 10 * TIGHT
    root = Budget(limit, "KV")
    context = KVContext(tiny, parse(spec), kv_format=kv, budget=Budget(None, "session's KV", root))
    context.extend(tokens[:600])
    whole, calls = getattr(home, at), []

    def interrupted(self, *arguments):
        done = whole(self, *arguments)
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return done

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(home, at, interrupted)
            context.extend(tokens[600:1000])
    finally:
        signal.signal(signal.SIGINT, before)
    context.extend(tokens[context.length : 1000])
    assert {kv.length for kv in context.layers} == {1000}
    assert root.used == sum(kv.nbytes for kv in context.layers)
    # Documents were read by the same chunks, wherever it was stopped.
    straight = KVContext(tiny, parse(spec), kv_format=kv, budget=Budget(limit, "KV"))
    straight.extend(tokens[:600])
    straight.extend(tokens[600:1000])
    torch.testing.assert_close(context.step(tokens[:5]), straight.step(tokens[:5]), atol=1e-3, rtol=1e-3)
    assert -(-context.length // PAGE) == len(context.layers[0].table)


@pytest.mark.parametrize("spec", ["dense", "retrieval"])
def test_ctrl_c_when_the_layers_are_done_takes_the_chunk_back(tiny, calibrated, tokens, monkeypatch, spec):
    context = LLM(tiny, spec).new_context(parse(spec))
    context.extend(tokens[:200])
    forward = type(tiny).forward

    def interrupted(*arguments, **options):
        forward(*arguments, **options)
        raise KeyboardInterrupt

    class Stopping(list):
        def extend(self, chunk):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(context, "tokens", Stopping(context.tokens))
        context.extend(tokens[200:300])
    assert {kv.length for kv in context.layers} == {200}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tiny), "forward", interrupted)
        context.extend(tokens[200:300])
    assert {kv.length for kv in context.layers} == {context.length} == {200}
