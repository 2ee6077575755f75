"""What questions cost: the numbers that must come out, break-evens, prices of one's own, and one's own GPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from longspan.errors import UnknownNameError, UsageError
from longspan.planner.cost import WAYS, Hosted, Job, Own, Spent, break_evens, by_queries, lines, rented
from longspan.planner.plan import plan
from longspan.planner.prices import Prices, own, price_list

TWO = Hosted(Prices("two", 2.0, 8.0, cached=0.5), 0.02)


def spent(job, payer, **options):
    return {line.way: line for line in lines(job, payer, **options)}


def test_a_corpus_of_ten_million_and_a_hundred_questions_a_day():
    """At $2 a million input tokens: $2,000 a day for everything every time, cents for retrieval."""
    job = Job(10**7, 100, question=0, answer=0)
    day = spent(job, TWO, daily=True)
    assert day["whole"].total.dollars == 2000
    assert day["retrieval"].total.dollars == pytest.approx(0.512), "five chunks of 512 tokens a question"
    assert day["cached"].total.dollars == pytest.approx(20 + 500)
    assert day["hybrid"].total.dollars == pytest.approx(8 * 0.512)
    assert day["retrieval"].once.dollars == pytest.approx(0.2), "made searchable once, no part of the day"


def test_what_a_question_costs_by_hand():
    job = Job(10**6, 10, question=100, answer=500)
    found = spent(job, TWO)
    assert found["whole"].each.dollars == pytest.approx((1_000_100 * 2 + 500 * 8) / 1e6)
    assert found["cached"].each.dollars == pytest.approx((10**6 * 0.5 + 100 * 2 + 500 * 8) / 1e6)
    assert found["retrieval"].each.dollars == pytest.approx((2660 * 2 + 500 * 8) / 1e6)
    assert found["cached"].total.dollars == pytest.approx(2 + 10 * found["cached"].each.dollars)
    assert found["whole"].each.seconds == pytest.approx(1_000_100 / 10_000 + 500 / 60)
    assert [line.way for line in lines(job, TWO)] == list(WAYS)
    assert found["retrieval"].told()["tokens_read"] == 2560


def test_a_short_text_is_never_read_more_than_whole():
    found = spent(Job(1000, 3), TWO)
    assert {line.read for line in found.values()} == {1000}


def test_writing_a_cache_and_long_requests_cost_what_they_cost():
    dear = Prices("dear", 3.0, 15.0, cached=0.3, write=3.75)
    found = spent(Job(10**5, 1, question=0, answer=0), Hosted(dear, 0.0))
    assert found["cached"].once.dollars == pytest.approx(0.375)
    tiered = price_list().model("gemini-2.5-pro")
    assert tiered.request(200_000, 0, 0) == pytest.approx(0.25)
    assert tiered.request(200_001, 0, 1000) == pytest.approx(200_001 * 2.5e-6 + 1000 * 15e-6)
    assert tiered.request(1, 300_000, 0) == pytest.approx(2.5e-6 + 0.075)


def test_reading_for_nothing_and_writing_a_cache_for_something():
    assert Prices("free", 0.0, 1.0, cached=0.1, write=0.5).request(1e6, 0, 0, write=True) == 0.5


def test_break_evens_hold():
    job = Job(10**6, 10)
    told = break_evens(job, TWO)
    assert "cached costs less than whole from 2 questions on" in told
    one, two = (spent(replace(job, queries=count), TWO) for count in (1, 2))
    assert one["cached"].total.dollars > one["whole"].total.dollars
    assert two["cached"].total.dollars < two["whole"].total.dollars
    assert "a question to the whole text costs no more than retrieval up to 2,560 tokens" in told
    plain = Hosted(Prices("plain", 2.0, 8.0), 0.0)
    assert "cached never costs less than whole" in break_evens(job, plain)
    free = Hosted(Prices("free", 0.0, 0.0), 0.0)
    assert break_evens(job, free)[0].endswith("from the first question on") or "never" in break_evens(job, free)[0]


def test_dear_searching_breaks_even_late():
    job = Job(10**6, 10, question=0, answer=0)
    searched = Hosted(Prices("x", 2.0, 8.0, cached=0.01), 5.0)
    sentence = next(each for each in break_evens(job, searched) if each.startswith("retrieval costs less than whole"))
    count = int(sentence.split()[-3].replace(",", ""))
    costs = by_queries(job, searched, [count - 1, count])
    assert costs["retrieval"][0] >= costs["whole"][0] and costs["retrieval"][1] < costs["whole"][1]


def test_ones_own_gpu_costs_what_a_plan_says():
    job = Job(128_000, 10, question=100, answer=500)
    payer = Own("llama-3.1-8b", "h100", 3.6)
    found = spent(job, payer)
    made = plan("llama-3.1-8b", 128_100, gpu="h100")
    seconds = made.prefill.high + 500 * made.step.high
    assert found["whole"].each == Spent(pytest.approx(seconds / 1000), pytest.approx(seconds))
    assert found["cached"].total.seconds < found["whole"].total.seconds
    assert found["retrieval"].once.dollars == 0
    two = spent(job, replace(payer, gpus=2))["whole"].each
    assert two.seconds < seconds and two.dollars == pytest.approx(2 * two.seconds * 3.6 / 3600)


def test_a_rented_gpu_pays_from_so_many_questions():
    job, payer = Job(128_000, 10), Own("llama-3.1-8b", "h100", 2.69)
    count = rented(job, TWO, payer)
    each = TWO.each(job, "cached").dollars
    assert (count - 1) * each < 24 * 2.69 <= count * each
    assert rented(job, Hosted(Prices("cheap", 1e-6, 1e-6), 0.0), payer) is None


def test_prices_are_dated_and_have_sources():
    found = price_list()
    for prices in found.models.values():
        assert prices.date and prices.source.startswith("https://") and prices.input <= prices.output
        assert prices.cached is None or prices.cached < prices.input
    assert found.date and {"h100", "h200", "b200", "a100"} <= set(found.gpu_hours)


def test_prices_of_ones_own(tmp_path):
    file = tmp_path / "prices.json"
    file.write_text(json.dumps({"models": {"ours": {"input": 1, "output": 4}}, "embedding": {"input": 0.5}}))
    found = price_list(file)
    assert found.model("ours") == Prices("ours", 1.0, 4.0)
    assert found.embedding == 0.5 and found.model("gpt-4.1").input == 2.0
    base = found.model("gpt-4.1")
    changed = own(base, 1.0, None, None)
    assert (changed.input, changed.output, changed.cached) == (1.0, 8.0, 0.25), "a quarter, as the base's"
    assert own(base, None, None, 0.1).cached == 0.1 and own(base, None, None, None) is base
    with pytest.raises(UnknownNameError, match="ours"):
        found.model("theirs")


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "can't be read"), ("[]", "object"), ('{"models": []}', "models"), ('{"models": {"a": 3}}', "a of"),
        ('{"models": {"a": {"input": 1}}}', "output"), ('{"models": {"a": {"input": -1, "output": 1}}}', "a.input"),
        ('{"models": {"a": {"input": 1, "output": 1, "tax": 2}}}', "'tax'"), ('{"gpu_hours": {"h100": "x"}}', "h100"),
        ('{"gpt-4.1": {"input": 1, "output": 4}}', "'gpt-4.1'"),
        ('{"embedding": {"input": null}}', "embedding"), ('{"models": {"a": {"input": true, "output": 1}}}', "a.input"),
    ],
)  # fmt: skip
def test_a_price_file_that_is_none_is_refused_in_a_line(tmp_path, text, told):
    file = tmp_path / "prices.json"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        price_list(file)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_nonsense_is_refused():
    for options in ({"tokens": 0}, {"queries": 0}, {"chunk": 0}, {"top_k": -1}, {"wide": 0}, {"answer": -1}):
        with pytest.raises(UsageError):
            Job(**({"tokens": 1000, "queries": 1} | options))
    for price in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--price-in"):
            own(price_list().model("gpt-4.1"), price, None, None)
