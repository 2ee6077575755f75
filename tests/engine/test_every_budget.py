"""`--kv-budget` and every mechanism of the registry: each obeys it, or refuses with a reason that names a fix."""

from __future__ import annotations

import pytest

from longspan import LLM
from longspan.attention import mechanism_class, names
from longspan.errors import PoolExhaustedError, UsageError
from longspan.evals.haystack import prose
from longspan.kv.base import PAGE
from longspan.retrieval.heads import RetrievalHeads

PAGE_BYTES = 2 * 2 * PAGE * 8 * 4
"""Of one layer: keys and values, KV heads, tokens, head size, float32."""
OPTIONS = {
    "streaming": "window=100", "sparse": "window=80", "superlinear": "window=80,spans=2",
    "quest": "budget=160,window=64", "sparq": "budget=160,window=64",
    "tree": "leaves=4,window=64", "infini": "segment=128",
    "h2o": "budget=150,window=70,every=64", "snapkv": "budget=150", "rocketkv": "budget=150",
    "expected": "budget=150", "keydiff": "budget=150,every=128", "kvzip": "budget=150",
    "retrieval": "window=128,pages=2,read=place",
}  # fmt: skip
"""Small enough for a thousand tokens to be a long context; what is not named here has no such options."""
OBEYS = {"streaming", "infini", "tree", "h2o", "snapkv", "rocketkv", "expected", "keydiff", "kvzip"}
"""Those that a text nearly twice as long as the budget leaves within it; the others keep every key, and say so."""


@pytest.fixture(autouse=True)
def heads(monkeypatch):
    monkeypatch.setattr(LLM, "heads", lambda self, progress=None: RetrievalHeads(((1, 0), (2, 1), (2, 3))))


def spec_of(name):
    return f"{name}:{OPTIONS[name]}" if name in OPTIONS else name


def test_nothing_is_left_out():
    assert OBEYS | set(OPTIONS) <= set(names())


@pytest.mark.parametrize("name", names())
def test_a_mechanism_obeys_a_budget_or_says_why_not(tiny, name):
    limit = tiny.dimensions.layers * 30 * PAGE_BYTES
    llm = LLM(tiny, spec_of(name), kv_budget=limit)
    session, most = llm.session(), []
    llm.add_text(session, prose()[:7500])
    assert len(session.tokens) > 1.8 * 30 * PAGE
    forward = type(tiny).forward

    def watched(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        most.append(llm.kv_budget.used)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tiny), "forward", watched)
        try:
            llm.prefill(session)
            llm.ask("Which street has the museum?", session, max_tokens=3)
        except (PoolExhaustedError, UsageError) as error:
            assert name not in OBEYS, f"{name} refused: {error}"
            assert "--" in str(error) and "\n" not in str(error), "it names an option to change"
        else:
            assert name in OBEYS, f"{name} keeps every key in half their bytes?"
    assert most and max(most) <= limit


@pytest.mark.parametrize("name", names())
def test_with_tiers_what_keeps_every_key_obeys_too(tiny, name, tmp_path):
    limit = tiny.dimensions.layers * 16 * PAGE_BYTES
    text = prose()[:3500]
    try:
        llm = LLM(tiny, spec_of(name), kv_budget=limit, kv_tier=f"host=50KB,disk=40MB:{tmp_path}")
    except UsageError as error:
        cls = mechanism_class(name)
        assert (cls.bounded_memory or cls.evicts) and "--kv-tier" in str(error)
        return
    session = llm.session()
    llm.add_text(session, text)
    llm.prefill(session)
    llm.ask("Which street has the museum?", session, max_tokens=3)
    assert llm.tiers.traffic.host_down and llm.kv_budget.used <= limit
    llm.tiers.prefetcher.close()
