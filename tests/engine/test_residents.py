"""Sessions in memory by name: within a quota, moved by last use, back on use, and as if they had never moved."""

import errno
import os
import threading

import pytest

from longspan import LLM
from longspan.engine import residents
from longspan.engine.residents import Residents
from longspan.errors import PoolExhaustedError, UsageError
from longspan.sessions import upkeep
from longspan.sessions.store import SessionStore

QUESTION = "What is the code of the tower?"


def ask(llm, session, question=QUESTION):
    return llm.ask(question, session, max_tokens=6, remember=True).text


def fill(llm, held, text, names):
    """Have a session read by each name; returns what uninterrupted ones answer."""
    expected = {}
    for i, name in enumerate(names):
        with held.using(name) as session:
            llm.add_text(session, f"{i} {text}")
            llm.prefill(session)
        alone = llm.session()
        llm.add_text(alone, f"{i} {text}")
        expected[name] = [ask(llm, alone), ask(llm, alone, "And the museum?")]
    return expected


@pytest.mark.parametrize(
    "spec,options",
    [
        ("dense", {}),
        ("dense", {"kv": "int8"}),
        ("streaming:window=100,sinks=4", {}),
        ("superlinear:window=80,spans=2", {}),
        ("quest:budget=128,window=64", {}),
        ("tree:leaves=4,window=64", {}),
        ("infini:segment=128", {"prefill": None}),
        ("h2o:budget=128,window=32", {}),
        ("retrieval:window=128,pages=2", {}),
    ],
)
@pytest.mark.parametrize("host", [0, 1 << 30])
def test_answers_are_those_of_sessions_that_never_moved(make_llm, text, spec, options, host):
    llm = make_llm(spec, reuse=False, **options)
    held = Residents(llm, memory=1, host=host)  # nothing stays that is not in use
    expected = fill(llm, held, text, ["a", "b"])
    assert held.nbytes == 0 and (held.host_bytes > 0) == bool(host)
    for i in range(2):
        for name in ("a", "b"):
            with held.using(name) as session:
                assert held.nbytes > 0
                assert ask(llm, session, [QUESTION, "And the museum?"][i]) == expected[name][i]
    moves = held.moves
    # A session that is still coming from its file does not go to host memory by way of reading it all.
    assert moves.to_host == moves.from_host + (2 if host else 0) and (moves.to_host > 0) == bool(host)
    assert moves.from_disk + moves.from_host == 4
    assert held.close() == [] and held.host_bytes == 0
    assert [len(llm.session(name).turns) for name in ("a", "b")] == [2, 2], "and all of it is on disk"


def test_a_hybrid_model_moves_with_its_states(models, text):
    llm = LLM(models("lfm2")[0], "dense", reuse=False)
    held = Residents(llm, memory=1, host=1 << 30)
    expected = fill(llm, held, text, ["a"])
    with held.using("a") as session:
        assert ask(llm, session) == expected["a"][0]
    held.host = 0
    held.tidy()
    with held.using("a") as session:
        assert ask(llm, session, "And the museum?") == expected["a"][1]
    assert held.moves.as_json() == {"to_host": 2, "to_disk": 2, "from_host": 1, "from_disk": 1, "stayed": 0}


def test_the_longest_unused_goes_first_and_what_is_in_use_stays(make_llm, text):
    llm = make_llm("dense", reuse=False)
    held = Residents(llm)
    fill(llm, held, text, ["a", "b", "c"])
    each = held.nbytes // 3
    held.memory = 2 * each + each // 2
    session = held.get("a")  # now the last that was used
    held.tidy()
    assert held.names == ["c", "a"] and held.nbytes <= held.memory
    held.memory = 1
    held.tidy()
    assert held.names == ["a"] and session.memory is not None
    assert held.get("a") is session
    held.release("a")
    held.tidy()
    assert held.names == ["a"], "it was asked for twice"
    with pytest.raises(UsageError, match="in use"):
        held.forget("a")
    held.release("a")
    assert held.names == [] and session.memory is None
    with pytest.raises(UsageError, match="get it"):
        held.release("a")
    assert sorted(llm.store.names()) == ["a", "b", "c"]


def test_a_kv_budget_makes_the_others_leave(make_llm, text):
    free = make_llm("dense", reuse=False)
    session = free.session()
    free.add_text(session, text)
    free.prefill(session)
    llm = make_llm("dense", reuse=False, kv_budget=int(1.6 * session.memory.nbytes))
    held = Residents(llm)
    expected = {}
    for name in ("a", "b"):
        with held.using(name) as one:
            held.memory = 1  # makes room for the one that is read
            held.tidy()
            held.memory = None
            llm.add_text(one, f"{name} {text}")
            llm.prefill(one)
            expected[name] = llm.ask(QUESTION, one, max_tokens=6).text
    assert held.names == ["b"]
    for name in ("a", "b", "a"):
        with held.using(name) as one:
            assert llm.ask(QUESTION, one, max_tokens=6).text == expected[name]
            assert held.names == [name]
    held.get("a")
    with pytest.raises(PoolExhaustedError):
        held.get("b")
    assert held.names == ["a"]


def test_time_and_what_was_promised(make_llm, text):
    now = [0.0]
    llm = make_llm("dense", reuse=False)
    held = Residents(llm, ttl=60, clock=lambda: now[0])
    fill(llm, held, text, ["kept", "passing"])
    for name in ("kept", "passing"):
        llm.save(held.get(name))
        held.release(name)
    llm.store.keep("passing", False, 3600)
    now[0] = 50
    with held.using("passing") as session:
        session.turns.clear()
    now[0] = 80
    held.tidy()
    assert held.names == ["passing"], "the other was not used for longer than a minute"
    now[0] = 200
    held.tidy()
    assert held.names == []
    info = llm.store.show("passing")
    assert (info.kept, info.ttl) == (False, 3600), "moving it to disk promises nothing more"
    gone = upkeep.collect(llm.store, now=info.used.timestamp() + 4000).sessions
    assert gone == ["passing"] and llm.store.names() == ["kept"]


def test_what_can_not_be_saved_stays(make_llm, text, monkeypatch):
    llm = make_llm("dense", reuse=False)
    held = Residents(llm)
    expected = fill(llm, held, text, ["a"])
    held.memory = 1
    with monkeypatch.context() as patch:

        def full(handle, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "write", full)
        held.tidy()
        assert held.names == ["a"] and held.moves.stayed == 1 and "free some space" in held.refused
        assert held.close() == ["a"]
        with held.using("a") as session:
            assert ask(llm, session) == expected["a"][0]
    assert held.close() == [] and SessionStore().names() == ["a"]


def test_a_session_that_was_never_read_leaves_nothing(make_llm):
    llm = make_llm("dense")
    held = Residents(llm)
    with held.using("new") as session:
        assert session.memory is None
    assert held.close() == [] and not llm.store.exists("new")
    with pytest.raises(UsageError, match="name"):
        held.get("../new")
    assert held.names == []
    held.get("new")
    held.release("new")
    held.forget("new")
    assert held.names == []
    with pytest.raises(UsageError, match="below 0"):
        Residents(llm, memory=-1)


def test_threads_share_sessions_that_come_and_go(make_llm, text):
    llm = make_llm("dense", reuse=False)
    held = Residents(llm, memory=1, host=300_000)
    names = ["a", "b", "c"]
    fill(llm, held, text, names)
    lengths = {name: llm.session(name).memory.length for name in names}
    wrong, model = [], threading.Lock()

    def work(seed):
        for i in range(12):
            name = names[(seed + i * (seed + 1)) % 3]
            with held.using(name) as session:
                if session.memory is None or session.memory.length != lengths[name]:
                    wrong.append(name)
                    continue
                with model:  # one session is one thread's at a time
                    session.memory.step([5, 6])
                    session.memory.truncate(lengths[name])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and held.moves.to_disk + held.moves.to_host > 3
    assert held.close() == [] and held.nbytes == 0
    assert llm.kv_budget.used == 0 and residents.Residents(llm).names == []
