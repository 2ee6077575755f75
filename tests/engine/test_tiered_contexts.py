"""Pages that a budget does not hold lie in host memory and in files, and are read from there: the same answers."""

import pytest
import torch

from longspan import LLM
from longspan.attention import parse
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, UsageError
from longspan.evals.haystack import prose
from longspan.hf.loading import load
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.tiers import TierLimits, Tiers
from longspan.retrieval.heads import RetrievalHeads
from tiny_hybrid import save_hybrid

HEADS = RetrievalHeads(((1, 0), (2, 1), (2, 3)))
QUESTION = "Which street has the museum?"
PAGE_BYTES = 2 * 2 * PAGE * 8 * 4
"""Of one layer: keys and values, KV heads, tokens, head size, float32."""
SPECS = [
    "dense",
    "quest:budget=256,window=64",
    "quest:budget=256,window=64,who=layer",
    "tree:leaves=4,window=64",
    "superlinear:window=80,spans=2",
    "sparse:window=80",
    "retrieval:window=128,pages=2,read=place",
]


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:30000])


def tight(spec, tiny, folder=None, pages=9, **options):
    """A context whose layers may take so many pages each, summaries among them; about as many lie in host memory."""
    limits = TierLimits(None if folder is None else 9 * PAGE_BYTES, 1 << 24 if folder else 0, folder)
    root = Budget(tiny.dimensions.layers * pages * PAGE_BYTES, "KV")
    return KVContext(tiny, parse(spec), budget=Budget(None, "session's KV", root), tiers=Tiers(limits), **options), root


@pytest.mark.parametrize("spec", SPECS)
def test_what_lies_below_is_read_as_if_it_lay_above(tiny, tokens, spec, tmp_path):
    context, root = tight(spec, tiny, tmp_path, pages=10 if "quest" in spec else 9)
    free = KVContext(tiny, parse(spec))
    for stop in range(100, 1001, 100):
        for each in (context, free):
            each.extend(tokens[each.length : stop])
        assert root.used <= root.limit
    tiers = context.layers[0].pool.tiers
    assert free.nbytes > 1.3 * root.limit and tiers.used("host") and tiers.used("disk")
    for step in [tokens[1000:1030], *([token] for token in tokens[1030:1040])]:
        torch.testing.assert_close(context.step(step), free.step(step), atol=2e-3, rtol=1e-3)
        assert root.used <= root.limit
    traffic = tiers.traffic
    assert traffic.host_down and traffic.disk_down
    # Nobody chose pages for retrieval here, so that it reads its window alone.
    assert (traffic.host_up + traffic.disk_up > 0) == (context.mechanism.name != "retrieval")
    for each in (context, free):
        each.truncate(1000)
    torch.testing.assert_close(context.step(tokens[5:9]), free.step(tokens[5:9]), atol=2e-3, rtol=1e-3)
    context.free()
    assert root.used == tiers.used("host") == tiers.used("disk") == 0 and not list(tmp_path.iterdir())
    tiers.prefetcher.close()


def test_the_next_layers_pages_are_brought_up_meanwhile(tiny, tokens, tmp_path):
    context, _ = tight("dense", tiny, tmp_path, pages=6)
    context.extend(tokens[:900])
    for token in tokens[900:920]:
        context.step([token])
    traffic = context.layers[0].pool.tiers.traffic
    assert traffic.hits + traffic.waits > 0
    read = traffic.hits + traffic.waits + traffic.misses
    # The first layer is nobody's next one.
    assert traffic.misses < read


def test_hot_pages_come_up_again(tiny, tokens):
    context, root = tight("quest:budget=128,window=64", tiny, pages=12)
    context.extend(tokens[:900])
    above = lambda: {page for page, handle in enumerate(context.layers[2].table) if handle >= 0}  # noqa: E731
    assert not {3, 4} & above()
    for token in tokens[900:910]:
        context.step([token])
    measured = context._masses[2].pages(15)
    assert measured[:12].sum() > 0, "what was chosen is counted"
    with torch.inference_mode():  # as a model runs
        context._masses[2].step(13)
        context._masses[2].add(0, torch.tensor([3, 4]), torch.tensor([9.0, 9.0]))
    context.step(tokens[910:911])
    assert {3, 4} <= above() and root.used <= root.limit


@pytest.mark.parametrize("spec", ["quest:budget=256,window=64", "dense"])
def test_forks_share_what_lies_below_and_saved_contexts_come_back(tiny, tokens, spec, tmp_path):
    context, root = tight(spec, tiny, tmp_path)
    context.extend(tokens[:800])
    free = KVContext(tiny, parse(spec))
    free.extend(tokens[:800])
    wanted = free.step(tokens[3:6])
    other = context.fork()
    for each in (context, other, context):
        torch.testing.assert_close(each.step(tokens[3:6]), wanted, atol=2e-3, rtol=1e-3)
        each.truncate(800)
        assert root.used <= root.limit
    saved = {name: tensor.clone() for name, tensor in context.tensors().items()}
    context.free()
    other.extend(tokens[800:900])
    free.truncate(800)
    free.extend(tokens[800:900])
    torch.testing.assert_close(other.step(tokens[3:6]), free.step(tokens[3:6]), atol=2e-3, rtol=1e-3)
    again, small = tight(spec, tiny, tmp_path, pages=8)  # less than it was saved from
    again.restore(tokens[:800], saved)
    torch.testing.assert_close(again.step(tokens[3:6]), wanted, atol=2e-3, rtol=1e-3)
    assert small.used <= small.limit
    whole = KVContext(tiny, parse(spec))
    whole.restore(tokens[:800], saved)
    assert all(not kv.exact for kv in whole.layers), "without a budget everything comes up"


def test_full_tiers_are_one_line_and_what_was_read_stays(tiny, tokens, tmp_path):
    context, root = tight("dense", tiny, pages=8)
    context.layers[0].pool.tiers.budgets["host"].limit = 20 * PAGE_BYTES
    context.extend(tokens[:500])
    length, said = context.length, context.step(tokens[:3])
    context.truncate(length)
    with pytest.raises(PoolExhaustedError, match="raise --kv-tier"):
        context.extend(tokens[500:1000])
    context.truncate(length)
    torch.testing.assert_close(context.step(tokens[:3]), said, atol=1e-4, rtol=1e-4)
    assert root.used <= root.limit


def test_states_of_a_hybrid_model_lie_beside(tmp_path, tokens):
    model = load(str(save_hybrid(tmp_path, "lfm2")), device="cpu", dtype=torch.float32)
    root = Budget(24 * PAGE_BYTES, "KV")
    context = KVContext(model, parse("dense"), budget=root, tiers=Tiers(TierLimits(1 << 24)))
    free = KVContext(model, parse("dense"))
    for each in (context, free):
        each.extend(tokens[:900])
    assert any(kv.exact for kv in context.layers) and root.used <= root.limit
    torch.testing.assert_close(context.step(tokens[900:910]), free.step(tokens[900:910]), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", [*SPECS[1:4], "retrieval:window=128,pages=2,read=place"])
def test_sessions_answer_alike_within_a_budget(tiny, text, spec, monkeypatch, tmp_path):
    monkeypatch.setattr(LLM, "heads", lambda self, progress=None: HEADS)
    said = []
    for options in ({}, {"kv_budget": 3 * 12 * PAGE_BYTES, "kv_tier": f"host=200KB,disk=8MB:{tmp_path}"}):
        llm = LLM(tiny, spec, **options)
        session = llm.session()
        llm.add_text(session, text * 2)
        llm.prefill(session)
        answers = [llm.ask(q, session, max_tokens=5) for q in (QUESTION, "What is the code of the pier?")]
        said.append([(answer.text, answer.pages) for answer in answers])
        if options:
            assert llm.tiers.traffic.host_down
            llm.tiers.prefetcher.close()
    assert said[0] == said[1]


def test_what_does_not_go_together_is_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="give --kv-budget as well"):
        LLM(tiny, "dense", kv_tier="host=1GB")
    for spec in ("h2o:budget=64,window=16", "streaming:window=64"):
        with pytest.raises(UsageError, match="leave out --kv-tier"):
            LLM(tiny, spec, kv_budget=1 << 20, kv_tier="host=1GB")
