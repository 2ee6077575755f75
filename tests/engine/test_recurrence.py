"""Hybrid models in the engine: pages and recurrent states go together through reading, cuts, forks and files."""

import signal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from recurrent import EVERYTHING, FAMILIES, HEADS, QUESTION, SPECS, close, new, plain_next, whole

from longspan import LLM
from longspan.attention import Mechanism
from longspan.engine import recurrence
from longspan.errors import PoolExhaustedError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.states import StateCheckpoints
from longspan.retrieval import heads as heads_store
from tiny_llama import CHUNK

# --- answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,spec",
    [*(("nemotron_h", spec) for spec in EVERYTHING), *((family, EVERYTHING[2]) for family in FAMILIES[1:])],
)
def test_answers_are_those_of_transformers_in_one_run(models, text, family, spec):
    model, plain = models(family)
    heads_store.store(model.fingerprint, HEADS, {})
    llm = LLM(model, spec)
    session = llm.session()
    llm.add_text(session, text)
    llm.prefill(session)
    asked = []
    step = session.memory.step
    session.memory.step = lambda new: asked.append(list(new)) or step(new)
    for question in (QUESTION, "And the museum?", QUESTION):
        asked.clear()
        answer = llm.ask(question, session, max_tokens=12)
        prompt = torch.tensor([session.memory.tokens + asked[0]])
        assert session.memory.length >= 3 * CHUNK and answer.stats.decoded_tokens > 0
        with torch.inference_mode():
            written = plain.generate(prompt, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(prompt))
        expected = [token for token in written[0, prompt.shape[1] :].tolist() if token not in model.end_tokens]
        assert [token for new in asked[1:] for token in new] == expected[: len(asked) - 1]
        assert answer.own_words == model.decode(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_taken_back_at_no_cost(models, tokens, family, monkeypatch):
    model, plain = models(family)
    context, calls = new(model), []
    forward = type(model).forward
    context.extend(tokens[:301])
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: calls.append(len(a[1])) or forward(*a, **k))
    for question in (tokens[301:330], tokens[:200]):
        logits = context.step(question)
        close(logits, plain_next(plain, tokens[:301] + question))
        context.step([7])
        calls.clear()
        context.truncate(301)
        assert calls == []
        whole(context)
    close(context.step(tokens[301:305]), plain_next(plain, tokens[:305]))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["nemotron_h", "bamba"])
def test_chunks_and_steps_give_one_reading(models, tokens, family, spec):
    model, _ = models(family)
    by_chunks, by_pieces = new(model, spec), new(model, spec)
    for context in (by_chunks, by_pieces):
        # Documents may be read by another mechanism than answers.
        context.extend(tokens[:500] if context is by_chunks else tokens[:37])
    by_pieces.extend(tokens[37:301])
    by_pieces.extend(tokens[301:500])
    expected = by_chunks.step(tokens[500:520])
    for token in tokens[500:519]:
        by_pieces.step([token])
    close(by_pieces.step(tokens[519:520]), expected)
    whole(by_pieces)


# --- cutting back ---------------------------------------------------------------------------------------------


def test_cutting_reads_again_from_the_nearest_checkpoint_alone(models, tokens, often, monkeypatch):
    model, plain = models("nemotron_h")
    context, calls = new(model), []
    context.extend(tokens[:500])
    context.step(tokens[:50])
    assert context.recurrence.positions == [128, 256, 384, 500, 512, 550]
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: calls.append(list(a[1])) or forward(*a, **k))
    for length, again in (
        (530, [[*tokens[12:30]]]),
        (512, []),
        (505, [tokens[:5]]),
        (500, []),
        (300, [tokens[256:300]]),
    ):
        held = context.tokens[:length]
        calls.clear()
        context.truncate(length)
        assert calls == again
        assert context.tokens == held
        whole(context)
    calls.clear()
    close(context.step(tokens[300:310]), plain_next(plain, tokens[:310]))
    context.truncate(0)
    assert context.recurrence.positions == [] and context.nbytes == 0
    close(context.step(tokens[:9]), plain_next(plain, tokens[:9]))


def test_what_was_read_again_is_for_good_where_it_was_before(models, tokens, often, monkeypatch):
    context = new(models("nemotron_h")[0])
    context.extend(tokens[:300])
    context.step(tokens[300:340])
    context.truncate(280)
    assert context.recurrence.committed == context._committed == 280
    context.step(tokens[280:290])
    calls = []
    forward = type(context.model).forward
    monkeypatch.setattr(type(context.model), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    context.truncate(280)
    assert calls == [], "the document's end has a state of its own again"


@pytest.mark.parametrize("share", [1.0, 0.25, 0.03])
def test_checkpoints_take_a_share_of_what_pages_take(nemotron, tokens, monkeypatch, share):
    assert new(nemotron).recurrence.most(10**9) == recurrence.LEAST * PAGE
    monkeypatch.setattr(recurrence, "LEAST", 1)
    monkeypatch.setattr(recurrence, "SHARE", share)
    context = new(nemotron)
    context.extend(tokens)
    state = context.recurrence.state_bytes
    assert state == sum(tensor.nbytes for tensor in context.recurrence.state().values())
    checkpoints = [at for at in context.recurrence.positions if at < 1000]
    every = checkpoints[0]
    assert every % CHUNK == 0 and checkpoints == list(range(every, 1000, every))
    assert len(checkpoints) * state <= share * sum(kv.nbytes for kv in context.layers)
    page = sum(kv.pool.native.page_bytes for kv in context.layers)
    assert (every - CHUNK) // PAGE < state / (share * page), "no further apart than that asks for"


@pytest.mark.parametrize(
    "spec", ["streaming:window=100,sinks=4", "retrieval:window=128,pages=2", "h2o:budget=128,window=64"]
)
def test_memory_of_a_window_stays_bounded(nemotron, tokens, often, spec):
    context, sizes = new(nemotron, spec), []
    for start in range(0, 1000 - CHUNK, CHUNK):
        context.extend(tokens[start : start + CHUNK])
        sizes.append(context.recurrence.nbytes)
    assert sizes[-1] <= 2 * context.recurrence.state_bytes
    assert len(context.recurrence.positions) <= 2


OPERATION = st.one_of(
    st.tuples(st.just("extend"), st.integers(1, 200)),
    st.tuples(st.just("step"), st.integers(1, 150)),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("back"), st.none()),
    st.tuples(st.just("fork"), st.integers(0, 3)),
    st.tuples(st.just("restore"), st.none()),
    st.tuples(st.just("fail"), st.integers(1, 4)),
)


@hypothesis_settings(max_examples=12, deadline=None, derandomize=True)
@given(st.sampled_from(["nemotron_h", "bamba"]), st.lists(OPERATION, min_size=2, max_size=7))
def test_any_sequence_of_operations_equals_reading_afresh(models, tokens, family, operations):
    model, plain = models(family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrence, "LEAST", 1)
        patch.setattr(recurrence, "SHARE", 1e9)
        budget = Budget(None, "KV")
        everyone, now = [new(model, budget=Budget(None, "session's KV", budget))], 0
        everyone[0].extend(tokens[:50])
        for name, argument in operations:
            one = everyone[now]
            before = list(one.tokens)
            if name in ("extend", "step"):
                more = tokens[one.length % 300 :][:argument]
                getattr(one, name)(more)
                before += more
            elif name == "cut":
                length = int(one.length * argument)
                one.truncate(length)
                before = before[:length]
            elif name == "back":
                length = one.recurrence.committed
                one.truncate(length)
                before = before[:length]
            elif name == "fork":
                everyone.append(one.fork())
                now = argument % len(everyone)
                before = list(everyone[now].tokens)
            elif name == "restore":
                other = new(model, budget=Budget(None, "session's KV", budget))
                other.restore(one.tokens, {key: tensor.clone() for key, tensor in one.tensors().items()})
                everyone[now] = other
            else:
                _fail(one, argument, tokens[:90])
            one = everyone[now]
            assert one.tokens == before
            whole(one)
            assert one.budget.used == one.nbytes
        for one in everyone:
            held = list(one.tokens)
            for question in ([9, 8], [11]):
                close(one.step(question), plain_next(plain, held + question))
                one.truncate(len(held))
            one.free()
            whole(one)
        assert budget.used == 0


def _fail(context, at, chunk):
    """An error at the at-th layer that attends, or where there is none such, in taking the state."""
    real, calls, update = Mechanism.attend, [], StateCheckpoints.update

    def attend(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("the disk of a swapped page, say")
        return real(self, *args, **kwargs)

    def refuse(self, *_):
        raise PoolExhaustedError("no room")

    with pytest.MonkeyPatch.context() as patch, pytest.raises((RuntimeError, PoolExhaustedError)):
        patch.setattr(Mechanism, "attend", attend)
        patch.setattr(StateCheckpoints, "update", refuse)
        context.step(chunk)
    assert StateCheckpoints.update is update


# --- interruptions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "quest", "retrieval:window=128,pages=2"])
@pytest.mark.parametrize("at", ["update", "commit", "state", "append"])
def test_ctrl_c_leaves_pages_and_states_together(nemotron, tokens, often, monkeypatch, spec, at):
    from longspan.kv import pages

    home = {"update": StateCheckpoints, "commit": StateCheckpoints, "append": pages.PagedKV}.get(
        at, recurrence.Recurrence
    )
    context = new(nemotron, spec)
    context.extend(tokens[:200])
    real, calls = getattr(home, at), []

    def interrupted(self, *arguments):
        done = real(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return done

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(home, at, interrupted)
            context.extend(tokens[200:700])
    finally:
        signal.signal(signal.SIGINT, before)
    assert 200 <= context.length < 700 and context.tokens == tokens[: context.length]
    whole(context)
    if at == "update":
        assert context.length == 3 * CHUNK, "a chunk whose state was taken is not read in vain"
    context.extend(tokens[context.length : 700])
    straight = new(nemotron, spec)
    straight.extend(tokens[:700])
    if spec.startswith("retrieval"):
        close(context.mass(tokens[:9], HEADS), straight.mass(tokens[:9], HEADS))
    else:
        close(context.step(tokens[:5]), straight.step(tokens[:5]))


def test_reading_again_that_is_interrupted_leaves_a_shorter_context(models, tokens, monkeypatch):
    model, plain = models("nemotron_h")
    context = new(model)
    context.extend(tokens[:700])
    forward, calls = type(model).forward, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model), "forward", interrupted)
        context.truncate(600)  # no checkpoint lies before: it is read from the start
    assert context.length == 2 * CHUNK and context.tokens == tokens[: 2 * CHUNK]
    whole(context)
    context.extend(tokens[2 * CHUNK : 400])
    close(context.step(tokens[400:410]), plain_next(plain, tokens[:410]))
