"""Decisions: what common knowledge says, what is asked for, what would flip it; and the tree."""

from __future__ import annotations

import itertools
import json

import pytest

from longspan.errors import UnknownNameError, UsageError
from longspan.planner import evidence, measured
from longspan.planner.decide import decide, question
from longspan.planner.flips import flips, label
from longspan.planner.tree import Branch, Leaf, mermaid, text, tree


def chosen(*args, **options):
    found = decide(question(*args, **options)).choice
    return found.plan.asked.attention, found.plan.asked.placement and found.plan.asked.placement.name


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-7b-1m", "nemotron-3-nano-30b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("context", ["8K", "32K", "100K"])
@pytest.mark.parametrize("gpu", ["h100", "h200", "b200"])
def test_one_gpu_under_128k_dense(model, context, gpu):
    """A model that was trained for it, on a GPU that holds it."""
    assert chosen(model, context, gpu=gpu) == ("dense", None)


@pytest.mark.parametrize("context", ["512K", "1M", "4M"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-7b-1m"])
def test_one_gpu_over_512k_is_sub_quadratic_or_compressed(model, context):
    found = decide(question(model, context, gpu="h100")).choice
    read = found.plan.asked.attention
    assert not found.exact and read in ("retrieval", "superlinear", "tree", "quest", "sparse", "snapkv")


@pytest.mark.parametrize("context", ["256K", "1M", "2M"])
@pytest.mark.parametrize("gpu", ["h100", "h200", "b200"])
def test_several_gpus_and_exact_ring_or_context_parallel(context, gpu):
    attention, placement = chosen("qwen2.5-7b-1m", context, gpu=gpu, gpus=8, exact=True)
    assert attention == "dense" and placement in ("ring", "context_parallel")


@pytest.mark.parametrize("context", ["1M", "4M"])
def test_several_gpus_and_approximation_allowed_star_or_sharded(context):
    attention, placement = chosen("llama-3.1-8b", context, gpu="h100", gpus=8)
    assert placement in ("star", "sharded") and (placement == "star" or attention != "dense")


@pytest.mark.parametrize("nodes", [2, 4, 16])
def test_several_nodes_context_parallel(nodes):
    assert chosen("llama-3.1-8b", "1M", gpu="h100", gpus=8, nodes=nodes, exact=True) == ("dense", "context_parallel")


def test_it_says_why_what_comes_next_and_what_is_out():
    found = decide(question("llama-3.1-8b", "600K", gpu="h100"))
    assert "benchmarks/results/needle-h200.json row" in found.choice.why()
    assert found.runner_up is not None and label(found.runner_up) != label(found.choice)
    out = {each.name: each.against for each in found.out}
    assert any("trained for" in reason for reason in out["dense"]) and any("lack" in reason for reason in out["dense"])
    assert "needs a model trained with it" in out["infini"]
    told = found.told()
    json.dumps(told)
    assert told["choice"]["attention"] == "retrieval" and told["choice"]["exact"] is False
    exact = decide(question("llama-3.1-8b", "64K", gpu="h100"))
    assert exact.choice.why().startswith("exact, fits")


def test_a_quality_floor_leaves_what_evals_found_good():
    found = decide(question("llama-3.1-8b", "600K", gpu="h100", quality=0.9))
    assert found.choice.found.score >= 0.9
    for each in found.out:
        assert each.exact or each.against or each.found.score >= 0.9
    nothing = decide(question("llama-3.1-8b", "600K", gpu="h100", quality=1.0, exact=True))
    assert nothing.choice is None and nothing.told()["choice"] is None


def test_what_evals_find_decides(monkeypatch):
    """With other findings another mechanism is chosen: it is not written down here."""
    known = measured.entries()
    found = [{**e, "mechanism": "superlinear"} for e in known["evals"] if e.get("mechanism") == "retrieval"]
    other = [{**e, "score": 0.0, "low": 0.0, "high": 0.1} for e in known["evals"] if e.get("mechanism") == "retrieval"]
    monkeypatch.setattr(measured, "entries", lambda: {**known, "evals": [*found, *other]})
    evidence._entries.cache_clear()
    try:
        assert chosen("llama-3.1-8b", "600K", gpu="h100")[0] == "superlinear"
    finally:
        evidence._entries.cache_clear()


def test_limits_that_nothing_meets_are_relaxed_and_told():
    found = decide(question("llama-3.1-8b", "100K", gpu="h100", exact=True, wait=0.1))
    assert label(found.choice) == "dense" and "first token" in found.relaxed[0]


def test_patience_keeps_it_exact():
    hasty, patient = (question("qwen2.5-7b-1m", "600K", gpu="h200", wait=wait) for wait in (60, 1000))
    assert label(decide(hasty).choice) != "dense" and label(decide(patient).choice) == "dense"
    changes = {each.when: each.choice for each in flips(decide(hasty))}
    assert any(when.startswith("the first token may take") and choice == "dense" for when, choice in changes.items())


def test_flips_are_true():
    found = decide(question("llama-3.1-8b", "600K", gpu="h100"))
    changes = {each.when: each.choice for each in flips(found)}
    shorter = next(when for when in changes if when.startswith("up to"))
    from longspan.lengths import context_of

    n = context_of(shorter.split()[2])
    assert label(decide(question("llama-3.1-8b", n, gpu="h100")).choice) == changes[shorter] == "dense"
    assert label(decide(question("llama-3.1-8b", round(1.1 * n), gpu="h100")).choice) == label(found.choice)
    assert changes["nothing may be approximated"] == "nothing fits"
    large = decide(question("llama-3.1-70b", "100K", gpu="h100"))
    assert large.choice is None
    assert any("weights in" in each.when for each in flips(large))


def test_the_tree_is_made_of_decisions():
    made = tree(question("llama-3.1-8b", gpu="h100"), [(1, 1), (8, 1)])
    assert [each.name for each in made.under] == ["one NVIDIA H100 SXM, 80 GB", "8 x NVIDIA H100 SXM, 80 GB"]
    for hardware, gpus in zip(made.under, (1, 8), strict=True):
        for part, exact in zip(hardware.under, (True, False), strict=True):
            leaves = part.under
            assert leaves[-1].last is None and all(isinstance(each, Leaf) for each in leaves)
            for before, after in itertools.pairwise(leaves):
                assert before.last == after.first and before.choice != after.choice
            leaf = leaves[0]
            asked = question("llama-3.1-8b", leaf.first, gpu="h100", gpus=gpus, exact=exact)
            assert label(decide(asked).choice) == leaf.choice
    drawn = text(made)
    assert "├── one NVIDIA" in drawn and "└── 8 x" in drawn and ": dense" in drawn
    chart = mermaid(made)
    assert chart.startswith("flowchart LR\n") and '-->|"up to' in chart and chart.count("n0") == 3
    json.dumps(made.told())
    assert made.told()["then"][0]["then"][0]["then"][0]["choice"] == "dense"
    assert mermaid(Branch('a "b"', [])) == 'flowchart LR\n  n0["a #quot;b#quot;"]\n'


@pytest.mark.parametrize(
    "options, told",
    [({"quality": 1.5}, "quality"), ({"quality": 0}, "quality"), ({"wait": 0}, "wait"),
     ({"wait": float("nan")}, "wait"), ({"speed": -1}, "speed"), ({"gpu": "h300"}, "h100"), ({"gpus": 0}, "gpus"),
     ({"speed": float("inf")}, "speed")],
)  # fmt: skip
def test_nonsense_is_refused_in_a_line(options, told):
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        question(**options)
    assert told in str(caught.value) and "\n" not in str(caught.value)
