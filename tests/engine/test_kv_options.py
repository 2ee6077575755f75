"""How keys and values are read and kept: prefill by another mechanism, formats, budgets, forks, pages that adapt."""

import pytest
import torch

from longspan import LLM
from longspan.attention import make, mechanisms, parse
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, SessionNotFoundError, UnknownNameError, UsageError
from longspan.evals.haystack import prose
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget


def read(model, spec, tokens, **options):
    context = KVContext(model, parse(spec), **options)
    context.extend(tokens)
    return context


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:30000])


@pytest.fixture
def question(tiny):
    return tiny.tokens("Which street has the museum?")


def test_xattention_that_keeps_everything_is_dense_whatever_decodes(tiny, tokens, question):
    dense = read(tiny, "quest:budget=192", tokens[:900], prefill=make("dense"))
    other = read(tiny, "quest:budget=192", tokens[:900], prefill=make("xattention", threshold=1.0))
    torch.testing.assert_close(other.step(question), dense.step(question), atol=1e-4, rtol=1e-4)


def test_prefill_is_for_documents_and_not_for_questions(tiny, tokens, question):
    by_window = read(tiny, "dense", tokens[:900], prefill=make("streaming", window=64))
    densely = read(tiny, "dense", tokens[:900])
    assert not torch.allclose(by_window.step(question), densely.step(question), atol=1e-3)
    # The first layer's keys do not depend on how was attended, the last layer's do.
    by_window.truncate(900), densely.truncate(900)
    torch.testing.assert_close(by_window.layers[0].keys(0, 900), densely.layers[0].keys(0, 900))
    assert not torch.allclose(by_window.layers[-1].keys(0, 900), densely.layers[-1].keys(0, 900), atol=1e-3)


@pytest.mark.parametrize("kv_format,most", [("fp8", 0.2), ("int8", 0.1), ("int4", 0.4)])
@pytest.mark.parametrize("spec", [name for name, cls in mechanisms().items() if not cls.prefill_only])
def test_a_smaller_format_changes_logits_a_little_and_halves_the_bytes(tiny, tokens, question, spec, kv_format, most):
    spec = {"retrieval": "retrieval:read=place"}.get(spec, spec)
    exact, rounded = read(tiny, spec, tokens[:900]), read(tiny, spec, tokens[:900], kv_format=kv_format)
    # With so small heads steps and centres take as much as numbers do; and a few pages stay exact.
    assert rounded.nbytes < 0.6 * exact.nbytes
    one, other = exact.step(question), rounded.step(question)
    assert not torch.equal(one, other)
    assert (one - other).norm() < most * one.norm()


@pytest.mark.parametrize("kv_format", ["fp8", "int4", "int2:residual=0,sinks=0"])
def test_a_question_is_taken_back_exactly_from_quantised_pages(tiny, tokens, question, kv_format):
    context = read(tiny, "dense", tokens[:900], kv_format=kv_format)
    first = context.step(question * 30)
    context.truncate(900)
    assert torch.equal(context.step(question * 30), first)


@pytest.mark.parametrize("spec", ["dense", "quest:budget=256", "tree"])
def test_a_fork_goes_its_own_way_and_copies_nothing(tiny, tokens, question, spec):
    parent = read(tiny, spec, tokens[:700])
    alone = parent.step(question)
    parent.truncate(700)
    held = sum(kv.pool.nbytes for kv in parent.layers)
    child = parent.fork()
    assert sum(kv.pool.nbytes for kv in parent.layers) == held
    child.extend(tokens[700:760])
    torch.testing.assert_close(parent.step(question), alone)
    parent.free()
    straight = read(tiny, spec, tokens[:760])
    torch.testing.assert_close(child.step(question), straight.step(question), atol=1e-3, rtol=1e-3)


def tight(model, spec, pages):
    """A budget of so many pages a layer, with their summaries."""
    probe = KVContext(model, parse(spec))
    pool = probe.layers[0].pool
    return Budget(pages * len(probe.layers) * (pool.native.page_bytes + pool.marks.page_bytes), "KV")


def test_the_tree_keeps_its_budget_and_reads_on(tiny, tokens, question):
    budget = tight(tiny, "tree", 30)
    context = KVContext(tiny, make("tree"), budget=Budget(None, "session's KV", budget))
    for start in range(0, 4000, 500):
        context.extend(tokens[start : start + 500])
        assert budget.used <= budget.limit
    assert context.length == 4000 and 30 * PAGE < 4000
    held = {kv.resolution(page) for kv in context.layers for page in range(len(kv.table))}
    assert held > {"fp32"} and held <= {"fp32", "int4", "int2", "summary"}
    before = context.step(question)
    assert before.isfinite().all() and budget.used <= budget.limit
    for _ in range(20):
        context.step(question[:1])
    assert budget.used <= budget.limit
    context.truncate(4000)
    assert context.step(question).isfinite().all()


def test_another_mechanism_refuses_what_its_budget_does_not_hold(tiny, tokens):
    budget = tight(tiny, "dense", 12)
    context = KVContext(tiny, make("dense"), budget=Budget(None, "session's KV", budget))
    other = KVContext(tiny, make("dense"), budget=Budget(None, "session's KV", budget))
    context.extend(tokens[:500])
    kept = context.step(tokens[500:510])
    context.truncate(500)
    with pytest.raises(PoolExhaustedError, match="--kv-budget"):
        other.extend(tokens[:500])
    assert other.length < 500
    assert torch.equal(context.step(tokens[500:510]), kept)


def test_a_budget_too_small_for_the_trees_window_is_told(tiny, tokens):
    context = KVContext(tiny, make("tree"), budget=tight(tiny, "tree", 5))
    with pytest.raises(PoolExhaustedError, match=r"newest .* raise it"):
        context.extend(tokens[:4000])


@pytest.mark.parametrize(
    "options,error,told",
    [
        (dict(attention="quest", kv="fp3"), UnknownNameError, "auto, fp32, fp16, bf16, fp8"),
        (dict(attention="quest", kv="fp32"), None, ""),
        (dict(attention="tree", prefill="dense", kv_budget=10**9), UsageError, "leave out --prefill"),
        (dict(attention="retrieval", kv="fp8"), UsageError, "leave out"),
        (dict(attention="quest", kv_budget=100), UsageError, "one page"),
        (dict(attention="streaming", prefill="xattention"), UsageError, "keeps everything"),
        (dict(attention="quest", prefill="nothing"), UnknownNameError, "xattention"),
    ],
)
def test_what_can_not_work_is_refused(tiny, options, error, told):
    def start():
        llm = LLM(tiny, **options)
        llm.new_context(llm.attention)

    if error is None:
        start()
        return
    with pytest.raises(error, match=told):
        start()


@pytest.mark.parametrize("attention", ["dense", "quest:budget=192", "retrieval:window=128,pages=2"])
def test_a_forked_session_goes_its_own_way(make_llm, places, attention):
    llm = make_llm(attention)
    session = llm.session("harbour")
    llm.add_text(session, "The code of the gate is 7315. " * 12, "notes")
    llm.prefill(session)
    first = llm.ask("What is the code of the gate?", session, max_tokens=8).text
    llm.save(session)
    child = llm.fork("harbour", "annexe")
    llm.add_text(child, "The ferry to Oslo leaves from pier 12. " * 12, "more")
    llm.prefill(child)
    assert child.memory.length > session.memory.length
    other = llm.fork(session)
    assert other.name is None
    assert llm.ask("What is the code of the gate?", other, max_tokens=8).text == first
    assert llm.ask("What is the code of the gate?", session, max_tokens=8).text == first
    llm.save(child)
    assert llm.store.names() == ["annexe", "harbour"]
    with pytest.raises(SessionNotFoundError, match="annexe, harbour"):
        llm.fork("harbor")
    with pytest.raises(UsageError, match="saved already"):
        llm.fork(session, "annexe")


KEPT = [dict(kv="fp8"), dict(prefill="xattention"), dict(kv_budget=10**9)]


@pytest.mark.parametrize("options", KEPT)
def test_what_retrieval_can_not_keep_is_refused_before_a_model_is_loaded(options):
    with pytest.raises(UsageError, match="such as --attention quest"):
        LLM("no such model", "retrieval", **options)


@pytest.mark.parametrize(
    "options,told",
    [
        (dict(attention="tree", prefill="dense", kv_budget=10**9), "leave out --prefill or"),
        (dict(attention="quest", kv_budget=100), "one page"),
        (dict(kv_budget=100), "one page"),
        (dict(attention="streaming", prefill="xattention"), "keeps everything"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_documents_are_read(tiny, options, told):
    with pytest.raises(UsageError, match=told):
        LLM(tiny, **options)


@pytest.mark.parametrize("options", KEPT)
def test_with_automatic_attention_a_long_text_is_refused_before_it_is_split_into_tokens(
    make_llm, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    llm = make_llm(**options)
    (tmp_path / "a.txt").write_text("The code of the gate is 7315. " * 12)
    (tmp_path / "b.txt").write_text("The ferry to Oslo leaves from pier 12. " * 5000)
    session = llm.session()
    llm.read(session, ["a.txt"])
    expected = llm.ask("Who?", session, max_tokens=6).text
    split = []
    tokens, offsets = type(llm.model).tokens, type(llm.model).tokens_with_offsets
    monkeypatch.setattr(type(llm.model), "tokens", lambda model, text: split.append(text) or tokens(model, text))
    monkeypatch.setattr(
        type(llm.model), "tokens_with_offsets", lambda model, text: split.append(text) or offsets(model, text)
    )
    (tmp_path / "aa.txt").write_text("Nobody had asked for a lantern.")
    with pytest.raises(UsageError, match=r"b\.txt is longer than .* window, and beyond it .* --attention quest"):
        llm.read(session, ["aa.txt", "b.txt"])
    assert max(map(len, split)) <= 8 * llm.model.dimensions.window, "all of it was split"
    assert [document.name for document in session.documents] == ["a.txt"]
    assert llm.ask("Who?", session, max_tokens=6).text == expected


def test_a_document_that_fits_is_read_densely_as_was_asked_for(make_llm):
    llm = make_llm(kv="fp8")
    session = llm.session()
    llm.add_text(session, "The code of the gate is 7315. " * 12, "notes")
    llm.prefill(session)
    assert session.memory.mechanism.name == "dense" and session.memory.layers[0].resolution(0) == "fp8"
