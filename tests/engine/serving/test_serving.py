"""Many requests at once: each has the tokens that it would have alone, turns are fair, and nothing is left behind."""

import asyncio
import gc
import itertools
import random
import threading
import time

import pytest
import torch

from longspan import SamplingParams
from longspan.attention import parse
from longspan.engine.kv_context import KVContext
from longspan.engine.sampler import Sampler
from longspan.engine.serving import Delta, Done, Limits, Progress, Request, Scheduler
from longspan.engine.serving.choice import Choice
from longspan.engine.serving.drawing import draw
from longspan.engine.serving.handle import Handle, Wakes
from longspan.engine.serving.queueing import FairQueue
from longspan.errors import LongspanError, ModelError, PoolExhaustedError, UsageError

PROMPT = "The code of the gate is 7315. Lise keeps the spare key. "


@pytest.fixture
def serve(make_llm):
    made = []

    def start(attention="dense", limits=None, **options):
        scheduler = Scheduler(make_llm(attention, **options), limits=limits)
        scheduler.start()
        made.append(scheduler)
        return scheduler

    yield start
    for scheduler in made:
        scheduler.close(save=False)


def asked(seed, count=24, **more):
    sampling = {"temperature": 0.0} if seed is None else {"temperature": 0.9, "top_p": 0.9, "seed": seed}
    return Request(text=PROMPT * (1 + (seed or 0) % 5), params=SamplingParams(max_tokens=count, **sampling), **more)


def tokens_of(events, index=0):
    return [token for event in events if isinstance(event, Delta) and event.index == index for token in event.tokens]


def alone(llm, request):
    """What one context says by itself."""
    context = llm.new_context(llm.without_documents())
    assert isinstance(context, KVContext)
    sampler, said = Sampler(request.params), []
    logits = context.step(llm.model.tokens(request.text))
    while len(said) < request.params.max_tokens:
        token = sampler(logits)
        if token in llm.model.end_tokens:
            break
        said.append(token)
        logits = context.step([token])
    return said


@pytest.mark.parametrize(
    "attention,options",
    [
        ("dense", {}),
        ("dense", {"kv": "int8"}),
        ("streaming:window=100,sinks=4", {}),
        ("superlinear:window=80,spans=2", {}),
        ("quest:budget=128,window=64", {}),
        ("tree:leaves=4,window=64", {}),
    ],
)
def test_answers_are_those_of_each_alone(serve, attention, options):
    scheduler = serve(attention, **options)
    requests = [asked(seed) for seed in (None, 1, 2, 3, 4)]
    handles = [scheduler.submit(request) for request in requests]
    told = [tokens_of(handle) for handle in handles]
    assert told == [alone(scheduler.llm, request) for request in requests]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.3, "seed": 4, "logit_bias": {7: 5.0, 9: -3.0}},
        {"logit_bias": {11: 8.0}},
        {"temperature": 1.0, "seed": 5, "top_k": 9},
        {"temperature": 1.0, "seed": 6, "top_p": 0.7},
        {"temperature": 1.0, "seed": 7, "min_p": 0.1},
        {"temperature": 0.9, "seed": 8, "presence_penalty": 1.5},
        {"repetition_penalty": 1.4},
        {"temperature": 1e-30, "seed": 9},
    ],
)
def test_what_is_drawn_for_many_at_once_is_what_each_draws_alone(tiny, sampling):
    """Beside others of every kind, each token and its probabilities are those of a sampler of its own."""
    params = [SamplingParams(**sampling), SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=0.0)]
    logits = 3 * torch.randn(40, 3, 320, generator=torch.Generator().manual_seed(len(str(sampling))))
    context = KVContext(tiny, parse("dense"))
    choices = [Choice(tiny, context, i, each, 99, logprobs=[3, None, 0][i]) for i, each in enumerate(params)]
    apart = [Choice(tiny, context, i, each, 99, logprobs=[3, None, 0][i]) for i, each in enumerate(params)]
    for rows in logits:
        for row, (ours, theirs, (token, told)) in enumerate(zip(choices, apart, draw(rows, choices), strict=True)):
            wanted = theirs.draw(rows[row])
            assert token == wanted[0] and [each.token for each in told] == [each.token for each in wanted[1]]
            for mine, other in zip(told, wanted[1], strict=True):
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-5)
                assert [t for t, _ in mine.top] == [t for t, _ in other.top]
            ours.tokens.append(token)
            theirs.tokens.append(token)


def test_one_row_that_can_not_be_drawn_from_is_told_and_the_others_are_drawn(tiny):
    context = KVContext(tiny, parse("dense"))
    choices = [Choice(tiny, context, i, SamplingParams(logit_bias={999: 1.0} if i == 2 else ()), 9) for i in range(4)]
    logits = torch.randn(4, 320, generator=torch.Generator().manual_seed(0))
    logits[1, 5] = torch.nan
    first, second, third, fourth = draw(logits, choices)
    assert first == (int(logits[0].argmax()), ()) and fourth == (int(logits[3].argmax()), ())
    assert isinstance(second, ModelError) and "NaN" in str(second)
    assert isinstance(third, UsageError) and "999" in str(third)


def test_an_event_loop_is_woken_once_for_all_that_came():
    class Loop:
        calls, closed = 0, False

        def call_soon_threadsafe(self, set_all, events):
            if self.closed:
                raise RuntimeError
            self.calls += 1
            set_all(events)

    loop, wakes, cancelled = Loop(), Wakes(), []
    handles = [Handle(lambda i=i: cancelled.append(i), 1, wakes) for i in range(5)]
    for handle in handles:
        handle._waiting = loop, asyncio.Event()
        handle.put(Delta(0, "a"))
        handle.put(Delta(0, "b"))
    assert not any(handle._waiting[1].is_set() for handle in handles)
    wakes.flush()
    assert all(handle._waiting[1].is_set() for handle in handles) and loop.calls == 1
    wakes.flush()
    assert loop.calls == 1, "nothing came"
    loop.closed = True
    list(itertools.islice(handles[3], 2))
    handles[3].put(Delta(0, "c"))
    wakes.flush()
    assert cancelled == [3], "nobody reads there any more"


def test_choices_share_the_prompt_and_have_seeds_of_their_own(serve):
    scheduler = serve()
    events = list(scheduler.submit(asked(5, n=3)))
    told = [tokens_of(events, index) for index in range(3)]
    assert told == [tokens_of(scheduler.submit(again(5, i))) for i in range(3)]
    assert scheduler.metrics().read_tokens < 3 * len(scheduler.llm.model.tokens(PROMPT))


def again(seed, number):
    one = asked(seed)
    return Request(text=one.text, params=one.params.another(number))


def test_a_conversation_goes_on_from_where_it_stood(serve):
    scheduler = serve()
    first = [{"role": "user", "content": PROMPT}]
    answer = "".join(e.text for e in scheduler.submit(Request(messages=first)) if isinstance(e, Delta))
    then = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "And who?"}]
    done = list(scheduler.submit(Request(messages=then, params=SamplingParams(max_tokens=2))))[-1]
    assert done.usage.cached_tokens >= len(scheduler.llm.model.tokens(PROMPT)) and scheduler.metrics().prefix_hits == 1


def test_a_long_ingest_does_not_hold_up_a_chat_and_stops_where_it_is(serve, text):
    scheduler = serve()
    chat = scheduler.submit(asked(None, 400))
    next(event for event in chat if isinstance(event, Delta))
    long = scheduler.submit(Request(documents=[("long", text * 40)], session="long"))
    total = next(event.total for event in long if isinstance(event, Progress))
    for _ in range(8):
        assert isinstance(next(chat), Delta), "the chat goes on while the text is read"
    read = scheduler.run(lambda llm, held: held.peek("long").memory.length).result(10)
    assert 0 < read < total
    long.cancel()
    assert next(event for event in long if isinstance(event, Done)).finish_reason == "cancelled"
    memory = scheduler.run(lambda llm, held: held.peek("long").memory, session="long").result(10)
    assert read <= memory.length < total and {kv.length for kv in memory.layers} == {memory.length}
    assert memory.tokens == scheduler.llm._context_tokens(scheduler.residents.peek("long"), memory)[: memory.length]
    chat.cancel()


def test_where_tokens_must_come_soon_others_wait_and_texts_are_read_meanwhile(serve, text):
    scheduler = serve(limits=Limits(token_seconds=1e-9))
    for _ in range(2):  # the first shows that a step takes longer
        handles = [scheduler.submit(asked(None, 40)) for _ in range(5)]
        reads = scheduler.submit(Request(documents=[("d", text)], session="d"))
        writing, ended = [], [next(e for e in handle if isinstance(e, Done)).finish_reason for handle in handles]
        assert (
            set(ended) <= {"length", "stop"} and next(e for e in reads if isinstance(e, Done)).finish_reason == "read"
        )
    handles = [scheduler.submit(asked(None, 40)) for _ in range(4)]
    for handle in handles:
        for _ in handle:
            writing.append(scheduler.metrics().writing_now)
    assert max(writing) == 1


def test_requests_on_one_session_wait_for_each_other(serve):
    scheduler = serve()
    list(scheduler.submit(Request(documents=[("codes", PROMPT * 4)], session="codes")))
    ask = [Request(messages=[{"role": "user", "content": f"Who {i}?"}], session="codes", remember=True,
                   params=SamplingParams(max_tokens=3)) for i in range(4)]  # fmt: skip
    handles = [scheduler.submit(each) for each in ask]
    forked = scheduler.run(lambda llm, held: len(held.peek("codes").turns), session="codes")
    assert forked.result(10) in range(5)
    for handle in handles:
        assert next(e for e in handle if isinstance(e, Done)).usage.cached_tokens > 0
    turns = scheduler.run(lambda llm, held: [turn.question for turn in held.peek("codes").turns]).result(10)
    assert turns == [f"Who {i}?" for i in range(4)]


def test_what_does_not_fit_the_memory_waits_or_is_told_why(serve):
    page = KVContext(serve().llm.model, serve().llm.without_documents()).layers[0].pool.least_bytes * 3
    scheduler = serve(kv_budget=12 * page)
    with pytest.raises(PoolExhaustedError, match="--kv-budget"):
        list(scheduler.submit(asked(None, 900)))
    handles = [scheduler.submit(asked(seed, 60)) for seed in (1, 2, 3, 6, 7, 8)]  # two of them fit at once
    for handle in handles:
        assert next(e for e in handle if isinstance(e, Done)).finish_reason in ("length", "stop")
    scheduler.close(save=False)
    gc.collect()
    assert scheduler.llm.kv_budget.used == 0


class Only:
    """Allows some tokens, as a bool mask or as a bitmask."""

    def __init__(self, size, tokens, bits):
        self.mask = torch.zeros(-(-size // 32) * 32, dtype=torch.bool)
        self.mask[list(tokens)] = True
        if bits:
            words = (self.mask.view(-1, 32).long() << torch.arange(32)).sum(1)
            self.mask = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
        self.came = []

    def allowed(self):
        return self.mask

    def accept(self, token):
        self.came.append(token)


@pytest.mark.parametrize("bits", [False, True])
def test_a_constraint_says_which_tokens_may_come(serve, bits):
    scheduler, tokens = serve(), {40, 63, 64, 95, 300}
    made = []

    def make():
        made.append(Only(320, tokens, bits))
        return made[-1]

    events = list(scheduler.submit(asked(3, 12, constraint=make, n=2)))
    said = [tokens_of(events, index) for index in range(2)]
    assert all(said) and set(said[0]) <= tokens and set(said[1]) <= tokens
    assert [each.came for each in made] == said


def test_biases_and_penalties_change_what_is_said(serve):
    scheduler = serve()
    plain = tokens_of(scheduler.submit(asked(None)))

    def other(**sampling):
        params = SamplingParams(max_tokens=24, **sampling)
        return tokens_of(scheduler.submit(Request(text=PROMPT, params=params)))

    assert plain[0] not in other(logit_bias={plain[0]: -100})
    assert set(other(logit_bias={77: 100})) == {77}
    said = other(presence_penalty=100.0)
    assert len(set(said)) == len(said)
    assert other(logit_bias={77: 50}, frequency_penalty=0.5).count(77) > other(
        logit_bias={77: 50}, frequency_penalty=20.0
    ).count(77)


def test_logprobs_of_a_prompt_are_those_of_its_tokens(serve):
    scheduler = serve()
    tokens = scheduler.llm.model.tokens(PROMPT * 6)
    request = Request(tokens=tokens, params=SamplingParams(max_tokens=1), prompt_logprobs=2, logprobs=0)
    read = next(event for event in scheduler.submit(request) if hasattr(event, "tokens"))
    rows = KVContext(scheduler.llm.model, scheduler.llm.without_documents()).score(tokens).log_softmax(-1)
    own = rows[:-1].gather(1, torch.tensor([tokens[1:]]).T)[:, 0].tolist()
    assert read.tokens == tuple(tokens) and [told.logprob for told in read.logprobs] == pytest.approx(own, abs=1e-4)
    assert all(len(told.top) == 2 for told in read.logprobs)


class Item:
    def __init__(self, key, session=None, priority=0):
        self.key, self.session, self.priority = key, session, priority


def test_turns_are_fair_among_keys():
    queue = FairQueue()
    for key, count in (("much", 30), ("little", 3)):
        for _ in range(count):
            queue.put(Item(key))
    order = []
    for _ in range(8):
        item = queue.take(lambda _: True)
        queue.serve(item.key, 100)
        queue.done(item)
        order.append(item.key)
    assert order.count("little") == 3 and order[:6].count("much") == 3
    late = Item("late")
    queue.put(late)
    assert queue.take(lambda _: True).key in ("late", "much"), "absence is not paid for"
    first = Item("much", priority=1)
    queue.put(first)
    assert queue.take(lambda _: True) is first


def test_who_does_not_fit_may_let_others_pass():
    queue = FairQueue()
    long, short = Item("a"), Item("a")
    queue.put(long)
    queue.put(short)
    assert queue.take(lambda item: item is not long) is None
    assert queue.take(lambda item: None if item is long else True) is short


def test_a_session_is_kept_in_order():
    queue = FairQueue()
    one, two, other = Item("a", "s"), Item("a", "s"), Item("a")
    for item in (one, two, other):
        queue.put(item)
    assert queue.take(lambda _: True) is one
    assert queue.take(lambda _: True) is other and queue.take(lambda _: True) is None
    queue.done(one)
    assert queue.take(lambda _: True) is two


def test_nothing_is_left_after_many_requests_that_were_cancelled(serve, text):
    before = threading.active_count()
    scheduler = serve(limits=Limits(queue=300, cached=4), kv_budget=1 << 24)
    draw, ended = random.Random(0), []
    handles = []
    for i in range(200):
        documents = [("d", text)] if i % 10 == 0 else []
        session = f"s{i % 3}" if i % 7 == 0 else None
        handles.append(scheduler.submit(Request(
            messages=[{"role": "user", "content": f"{i} {PROMPT}"}], documents=documents, session=session,
            params=SamplingParams(max_tokens=draw.randint(1, 12), temperature=1.0), key=f"k{i % 4}", n=1 + (i % 9 == 0),
        )))  # fmt: skip
    for handle in handles:
        if draw.random() < 0.5:
            handle.cancel()
        elif draw.random() < 0.5:
            threading.Timer(0.05 * draw.random(), handle.cancel).start()
    for handle in handles:
        ended += [event.finish_reason for event in handle if isinstance(event, Done)]
    assert len(ended) == sum(1 + (i % 9 == 0) for i in range(200))
    assert {"cancelled"} < set(ended) <= {"cancelled", "length", "stop"}
    scheduler.run(lambda llm, held: None).result(10)  # the round of the last event is over
    metrics = scheduler.metrics()
    assert metrics.waiting_now == metrics.reading_now == metrics.writing_now == 0 and metrics.cached_now <= 4
    assert sum(metrics.finished.values()) == len(ended)
    scheduler.close()
    del handles, handle
    gc.collect()
    assert scheduler.llm.kv_budget.used == 0 and not scheduler.metrics().pages_now
    until = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_an_error_of_ours_is_told_and_others_are_served(serve, monkeypatch):
    scheduler = serve()
    monkeypatch.setattr("longspan.engine.serving.job.Job._begin", lambda *_: 1 / 0)
    with pytest.raises(LongspanError, match="ZeroDivisionError"):
        list(scheduler.submit(asked(None)))
    monkeypatch.undo()
    assert tokens_of(scheduler.submit(asked(None)))
