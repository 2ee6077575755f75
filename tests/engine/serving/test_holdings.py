"""Sessions of a server within a quota: they leave memory and come back, and are counted where they lie."""

import time

import pytest

from longspan import SamplingParams
from longspan.engine.serving import Delta, Done, Limits, Request, Scheduler

FACT = "The code of the {} is 7315. Lise keeps the spare key. "


@pytest.fixture
def serve(make_llm):
    made = []

    def start(limits, **options):
        scheduler = Scheduler(make_llm("dense", reuse=False, **options), limits=limits)
        scheduler.start()
        made.append(scheduler)
        return scheduler

    yield start
    for scheduler in made:
        scheduler.close(save=False)


def read(scheduler, name, times=8):
    list(scheduler.submit(Request(documents=[(name, FACT.format(name) * times)], session=name)))


def ask(scheduler, name):
    question = [{"role": "user", "content": "Which code?"}]
    request = Request(messages=question, session=name, params=SamplingParams(max_tokens=5), makes_session=False)
    return "".join(event.text for event in scheduler.submit(request) if isinstance(event, Delta))


def counted(scheduler):
    """What is counted once the last request's round is over and pages were looked at."""
    scheduler.run(lambda llm, held: None).result(10)
    scheduler.run(lambda llm, held: scheduler._rounds._count_pages()).result(10)
    return scheduler.metrics()


@pytest.mark.parametrize("host", [0, 1 << 30])
def test_sessions_leave_memory_and_answer_as_before(serve, host):
    scheduler = serve(Limits(session_bytes=1, session_host_bytes=host))
    names = ("gate", "pier", "tower")
    for name in names:
        read(scheduler, name)
    told = {name: ask(scheduler, name) for name in names}
    now, moves = counted(scheduler), scheduler.residents.moves
    assert scheduler.residents.nbytes == 0, "none is in use"
    assert ("host", "fp32") in now.pages_now if host else not now.pages_now
    assert now.sessions_now == (3 if host else 0)
    assert (now.session_bytes_now["host"] > 0) == bool(host) and now.session_bytes_now["device"] == 0
    assert now.session_moves["from_host" if host else "from_disk"] >= 3
    for name in names:
        assert ask(scheduler, name) == told[name]
    assert (moves.to_host if host else moves.to_disk) >= 6
    free = serve(Limits())
    assert {name: ask(free, name) for name in names} == told
    assert counted(free).pages_now["device", "fp32"] > 0 and free.residents.moves.to_disk == 0


def test_what_was_read_alone_is_not_saved_again_to_move(serve):
    scheduler = serve(Limits(sessions=1))
    for name in ("gate", "pier"):
        read(scheduler, name)
    before = {name: scheduler.llm.store.show(name).saved for name in ("gate", "pier")}
    for name in ("gate", "pier", "gate"):
        ask(scheduler, name)
    counted(scheduler)
    assert scheduler.residents.names == ["gate"] and scheduler.residents.moves.to_disk >= 3
    assert before == {name: scheduler.llm.store.show(name).saved for name in ("gate", "pier")}


def test_a_session_that_nobody_uses_leaves_an_idle_server(serve, monkeypatch):
    monkeypatch.setattr("longspan.engine.serving.scheduler._LOOKED", 0.02)
    scheduler = serve(Limits(session_seconds=0.1))
    read(scheduler, "gate")
    until = time.monotonic() + 5
    while len(scheduler.residents) and time.monotonic() < until:
        time.sleep(0.01)
    assert not len(scheduler.residents) and ask(scheduler, "gate"), "and comes back"


def test_a_session_that_comes_back_is_promised_room_like_any_other(serve):
    """Two answers each fit the budget beside one session, but not beside both: the second waits, and nobody fails."""
    free = serve(Limits())
    read(free, "alone", 40)
    size = free.run(lambda llm, held: held.peek("alone").memory.nbytes).result(10)
    scheduler = serve(Limits(cached=0), kv_budget=int(1.8 * size))
    for name in ("gate", "pier"):
        read(scheduler, name, 40)
    handles = [
        scheduler.submit(Request(messages=[{"role": "user", "content": "Which?"}], session=name,
                                 params=SamplingParams(max_tokens=40, logit_bias={0: -100})))
        for name in ("gate", "pier", "gate", "pier")
    ]  # fmt: skip
    for handle in handles:
        assert next(event for event in handle if isinstance(event, Done)).finish_reason == "length"
    assert scheduler.residents.moves.from_disk >= 2
