"""Checkpoints of recurrent state: a small recurrence that is cut back anywhere continues as if it had never gone on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import PoolExhaustedError, SessionCorruptError, UsageError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.states import StateCheckpoints

DECAY = torch.tensor([[0.9, 0.5, 0.99]], dtype=torch.float64)


def step(state, token):
    """One step of a gated linear recurrence with a convolution of width 3: both kinds of state that Mamba-2 has."""
    window = torch.cat([state["conv"][1:], torch.tensor([[float(token)]], dtype=torch.float64)])
    ssm = DECAY * state["ssm"] + torch.sin(window.sum()) * torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    return {"ssm": ssm, "conv": window}


def initial():
    return {"ssm": torch.zeros(2, 3, dtype=torch.float64), "conv": torch.zeros(3, 1, dtype=torch.float64)}


SIZE = sum(tensor.nbytes for tensor in initial().values())


class Running:
    """Tokens read so far, and the states that a model with this recurrence would keep."""

    def __init__(self, every, budget=None, states=None, tokens=()):
        self.states, self.tokens = states or StateCheckpoints(every, budget), list(tokens)

    def read(self, new):
        self.tokens += new
        while self.states.length < len(self.tokens):
            start = self.states.length
            stop = min(len(self.tokens), self.states.next_stop())
            state = self.states.latest() or initial()
            for token in self.tokens[start:stop]:
                state = step(state, token)
            self.states.update(stop, state)

    def cut(self, length):
        """Cut back, run what lacks again, and return how many tokens that were."""
        tokens, self.tokens = self.tokens[:length], []
        at = self.states.truncate(length)
        assert at == self.states.length <= length
        self.tokens = tokens[:at]
        self.read(tokens[at:])
        return length - at

    def check(self):
        state = initial()
        for token in self.tokens:
            state = step(state, token)
        latest = self.states.latest() or initial()
        assert all(torch.equal(latest[name], tensor) for name, tensor in state.items())


OPERATION = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 300)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("commit"), st.none()),
    st.tuples(st.just("fork"), st.integers(0, 3)),
    st.tuples(st.just("restore"), st.none()),
)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 2]), st.lists(OPERATION, max_size=8))
def test_a_recurrence_that_is_cut_forked_and_restored_continues_as_it_would(every, operations):
    budget = Budget()
    everyone, now = [Running(every, budget)], 0
    for name, argument in operations:
        one = everyone[now]
        if name == "read":
            one.read(list(range(len(one.tokens) * 7, len(one.tokens) * 7 + argument)))
        elif name == "cut":
            length = int(len(one.tokens) * argument)
            again = one.cut(length)
            assert again < every * PAGE, "more was run again than lies between checkpoints"
        elif name == "commit":
            one.states.commit()
        elif name == "fork":
            everyone.append(Running(every, states=one.states.fork(), tokens=one.tokens))
            now = argument % len(everyone)
        else:
            one.states.restore("s.", len(one.tokens), one.states.tensors("s."))
        everyone[now].check()
        # Every state counts once, however many contexts share it.
        distinct = {id(state) for each in everyone for state in each.states._kept.values()}
        assert budget.used == SIZE * len(distinct)
        for each in everyone:
            due = len(each.tokens) // (every * PAGE)
            assert len(each.states.positions) <= due + 2, "checkpoints, the committed state and the latest"
    for each in everyone:
        each.check()
        each.states.free()
    assert budget.used == 0


def test_a_question_is_taken_back_without_running_anything_again():
    running = Running(4)
    running.read(list(range(1000)))
    running.states.commit()
    running.read(list(range(77)))
    assert running.cut(1000) == 0
    running.check()
    assert running.cut(999) == 999 - 3 * 4 * PAGE
    running.check()


def test_states_are_copies():
    states, given_state = StateCheckpoints(1), initial()
    states.update(10, given_state)
    given_state["ssm"].fill_(7)
    assert (states.latest()["ssm"] == 0).all()


def test_a_state_that_the_budget_has_no_room_for_is_refused_and_changes_nothing():
    whole = Budget(3 * SIZE, "KV")
    running = Running(1, whole)
    running.read(list(range(3 * PAGE)))
    with pytest.raises(PoolExhaustedError, match="KV budget"):
        running.read([1])
    assert running.states.length == 3 * PAGE and whole.used == 3 * SIZE
    other = running.states.fork(Budget(3 * SIZE, "fork", whole))
    assert whole.used == 3 * SIZE
    with pytest.raises(PoolExhaustedError, match="small"):
        running.states.fork(Budget(SIZE, "small", whole))
    running.states.free()
    assert whole.used == 3 * SIZE and other.positions == [PAGE, 2 * PAGE, 3 * PAGE]
    other.free()
    assert whole.used == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.pop("s.64.ssm"),
        lambda t: t.pop("s.100.conv"),
        lambda t: t.update({"s.64.ssm": t["s.64.ssm"][:1]}),
        lambda t: t.update({"s.64.ssm": t["s.64.ssm"].float()}),
        lambda t: [t.pop(name) for name in list(t) if name.startswith("s.100")],
        lambda t: t.update({"s.200.ssm": t["s.64.ssm"], "s.200.conv": t["s.64.conv"]}),
        lambda t: t.update({"s.0.ssm": t["s.64.ssm"], "s.0.conv": t["s.64.conv"]}),
    ],
)
def test_saved_states_that_do_not_fit_are_refused_and_change_nothing(spoil):
    running = Running(1)
    running.read(list(range(100)))
    saved = running.states.tensors("s.")
    assert set(saved) == {f"s.{at}.{name}" for at in (64, 100) for name in ("ssm", "conv")}
    spoil(saved)
    other = Running(1)
    other.read([5, 6, 7])
    with pytest.raises(SessionCorruptError, match="read again"):
        other.states.restore("s.", 100, saved)
    other.check()


def test_checkpoints_are_given_up_evenly_and_what_must_stay_stays():
    budget = Budget()
    running = Running(1, budget)
    running.read(list(range(3 * PAGE + 10)))
    running.states.commit()
    assert running.states.committed == 3 * PAGE + 10
    running.read(list(range(4 * PAGE)))
    pages = [PAGE * i for i in range(1, 8)]
    kept = [*pages[:3], 3 * PAGE + 10, *pages[3:], 7 * PAGE + 10]
    assert running.states.positions == kept
    # Those nearest to both neighbours first; of equals the older.
    for gone in (3 * PAGE, 7 * PAGE, 4 * PAGE, PAGE, 6 * PAGE, 2 * PAGE, 5 * PAGE):
        assert running.states.thin()
        kept.remove(gone)
        assert running.states.positions == kept and budget.used == SIZE * len(kept)
    assert not running.states.thin() and kept == [3 * PAGE + 10, 7 * PAGE + 10]
    running.check()
    running.cut(6 * PAGE)
    running.check()
    running.states.free()
    assert not running.states.thin() and budget.used == 0


def test_bad_values_are_refused():
    with pytest.raises(UsageError, match="every=0"):
        StateCheckpoints(0)
    states = StateCheckpoints(1)
    states.update(10, initial())
    for length in (-1, 11):
        with pytest.raises(UsageError, match="10 tokens"):
            states.truncate(length)
    with pytest.raises(AssertionError):
        states.update(PAGE + 1, initial())  # it ran past a boundary
