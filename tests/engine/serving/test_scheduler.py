"""The scheduler's face: events in order, in threads and event loops, errors, limits, and what is saved at the end."""

import asyncio

import pytest

from longspan import SamplingParams
from longspan.engine.serving import Delta, Done, Limits, Request, Scheduler
from longspan.errors import BusyError, ContextTooLongError, UsageError

PROMPT = "The ferry to"


@pytest.fixture
def scheduler(make_llm):
    made = Scheduler(make_llm("dense"))
    made.start()
    yield made
    made.close()


def few(count=4, **sampling):
    return SamplingParams(max_tokens=count, **sampling)


def text_of(events, index=0):
    return "".join(event.text for event in events if isinstance(event, Delta) and event.index == index)


def done(events):
    return [event for event in events if isinstance(event, Done)]


def test_events_come_in_order_and_end(scheduler):
    events = list(scheduler.submit(Request(text=PROMPT, params=few(), n=2, logprobs=3)))
    first, second = done(events)
    assert {first.index, second.index} == {0, 1} and first.finish_reason == "length"
    assert first.usage.completion_tokens == 4 and first.usage.prompt_tokens == second.usage.prompt_tokens > 0
    told = [event for event in events if isinstance(event, Delta) and event.tokens and event.index == 0]
    assert all(len(event.logprobs[0].top) == 3 for event in told)
    assert all(event.logprobs[0].top[0] == (event.tokens[0], event.logprobs[0].logprob) for event in told), "greedy"
    assert text_of(events, 0) == text_of(events, 1)


def test_an_event_loop_reads_the_same(scheduler):
    async def read():
        return [event async for event in scheduler.submit(Request(text=PROMPT, params=few()))]

    assert text_of(asyncio.run(read())) == text_of(scheduler.submit(Request(text=PROMPT, params=few())))


def test_what_is_wrong_is_raised_where_events_are_read(scheduler):
    with pytest.raises(ContextTooLongError, match="window"):
        list(scheduler.submit(Request(messages=[{"role": "user", "content": "so " * 900}], documents=[("a", "Oslo.")])))
    assert done(scheduler.submit(Request(text=PROMPT, params=few()))), "others are not concerned"


@pytest.mark.parametrize(
    "wrong",
    [{}, {"text": ""}, {"text": "a", "tokens": [1]}, {"text": "a", "n": 0}, {"text": "a", "logprobs": 51}],
)
def test_a_request_that_says_too_little_or_too_much(wrong):
    with pytest.raises(UsageError):
        Request(**wrong)


def test_limits_refuse(make_llm):
    scheduler = Scheduler(make_llm("dense"), limits=Limits(queue=1, choices=2, answer_tokens=8))
    with pytest.raises(UsageError, match="at most 2"):
        scheduler.submit(Request(text=PROMPT, n=3))
    with pytest.raises(UsageError, match="at most 8"):
        scheduler.submit(Request(text=PROMPT, params=few(9)))
    waiting = scheduler.submit(Request(text=PROMPT, params=few()))
    with pytest.raises(BusyError) as refused:  # nothing is served before `start`
        scheduler.submit(Request(text=PROMPT, params=few()))
    assert refused.value.retry_after > 0 and scheduler.metrics().refused == 1
    scheduler.start()
    assert done(waiting)[0].finish_reason == "length"
    scheduler.close()


def test_a_session_is_read_remembered_and_saved(make_llm):
    scheduler = Scheduler(make_llm("dense"))
    scheduler.start()
    read = Request(documents=[("codes", "The code of the gate is 7315.")], session="gate")
    assert done(scheduler.submit(read))[0].finish_reason == "read"
    ask = Request(messages=[{"role": "user", "content": "Which?"}], session="gate", params=few(), remember=True)
    answer = text_of(scheduler.submit(ask))
    assert scheduler.run(lambda llm, held: len(held.peek("gate").turns)).result() == 1
    scheduler.close()
    restored = make_llm("dense").session("gate")
    assert [document.name for document in restored.documents] == ["codes"]
    assert restored.turns[0].question == "Which?" and restored.turns[0].answer == answer.strip()
