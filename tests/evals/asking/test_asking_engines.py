"""Ways to attend as askers: shares of the context become options at each length, and what can't work is told."""

import pytest

from longspan.attention import mechanisms
from longspan.errors import UnknownNameError, UsageError
from longspan.evals.asking.engines import Engines, Way, choosing, ways


def test_every_mechanism_stands_at_every_share_and_an_exact_one_once():
    assert ways(["dense", "streaming"], ["1/4", "1/8"]) == [
        Way("dense"), Way("streaming", "1/4"), Way("streaming", "1/8"),
    ]  # fmt: skip
    assert ways(["dense", "streaming", "streaming"], []) == [Way("dense"), Way("streaming")]
    with pytest.raises(UsageError, match="--prefill"):
        ways(["xattention"], [])
    with pytest.raises(UnknownNameError, match="unknown attention 'nothing'"):
        ways(["nothing"], [])


def test_a_share_is_the_mechanisms_own_option_at_each_length(make_llm):
    engines = Engines(make_llm, [Way("dense"), Way("quest:who=layer", "1/4"), Way("")])
    for length, budget in ((1024, "budget=256"), (4096, "budget=1024")):
        dense, quest, own = (asker.identity for asker in engines.at(length))
        assert (dense.mechanism, dense.budget, dense.attention) == ("dense", "", "dense")
        assert (quest.mechanism, quest.budget) == ("quest:who=layer", "1/4")
        assert budget in quest.attention and "who=layer" in quest.attention
        assert own.mechanism == own.attention == "auto"


def test_what_can_not_work_within_its_share_is_told_or_refused(make_llm):
    told = []
    found = Engines(make_llm, [Way("streaming", "1/4"), Way("tree", "1/4")], leave_out=told.append).at(256)
    assert [asker.identity.mechanism for asker in found] == ["streaming"]
    assert told == [
        "left out: tree at 1/4, 256 tokens: attention 'tree' can't read within 64 of 256 keys: allow 512 or more"
    ]
    with pytest.raises(UsageError, match="allow 512 or more"):
        Engines(make_llm, [Way("tree", "1/4")]).at(256)


def test_all_that_choose_work_at_a_quarter(make_llm):
    specs = list(choosing())
    assert len(set(specs)) == len(specs) > 12
    named = {spec.partition(":")[0] for spec in specs}
    assert {"streaming", "sparse", "quest", "tree", "superlinear", "h2o", "snapkv", "retrieval"} < named
    assert not any(mechanisms()[name].exact or mechanisms()[name].needs_training for name in named)
    assert len(Engines(make_llm, ways(specs, ["1/4"])).at(4096)) == len(specs)
