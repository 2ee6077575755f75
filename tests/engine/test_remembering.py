"""A mechanism with a memory beside pages (infini) in the engine: taken back, forked, saved, bounded, trained or not."""

import pytest
import torch

from longspan import LLM
from longspan.attention import Mechanism, make, parse
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, SessionCorruptError, UsageError
from longspan.evals.haystack import prose
from longspan.hf import trained
from longspan.hf.loading import load
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.retrieval.heads import RetrievalHeads
from tiny_llama import CHUNK, WINDOW, save_model

HEADS = RetrievalHeads(((1, 0), (2, 1), (2, 3)))
SPECS = ("infini:segment=100", "infini:segment=64,rule=linear", "infini:segment=256")
QUESTION = "What is the code of the tower?"


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:30000])


def new(model, spec, **options):
    return KVContext(model, parse(spec), **options)


def memories(context):
    """Every layer's latest state, copied."""
    found = []
    for kv in context.layers:
        latest = kv.memory.latest()
        found.append((kv.memory.length, None if latest is None else {k: v.clone() for k, v in latest.items()}))
    return found


def same(one, other):
    for (length, state), (other_length, other_state) in zip(one, other, strict=True):
        assert length == other_length and (state is None) == (other_state is None)
        for name in state or {}:
            assert torch.equal(state[name], other_state[name])
    return True


class Whole:
    """A reader that keeps every key and no memory: what the context must equal."""

    def __init__(self, model, spec):
        self.model, self.kept = model, new(model, "dense")
        self.mechanism = parse(spec)

    def attend(self, layer, q, k, v, scale):
        kv = self.kept.layers[layer]
        kv.append(k, v)
        return self.mechanism.attend(q, kv, scale=scale)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [99, 256, 257, 700])
def test_what_was_dropped_is_missed_by_nothing(tiny, tokens, spec, length):
    context, whole = new(tiny, spec), Whole(tiny, spec)
    context.extend(tokens[:length])
    logits = tiny.forward(tokens[: length + 1], whole, logits=1)[0]
    torch.testing.assert_close(context.step(tokens[length : length + 1]), logits, atol=2e-3, rtol=1e-3)
    segment = context.mechanism.segment
    assert context.layers[0].memory.length == (length + 1) // segment * segment
    assert context.layers[0].pages_held <= segment // PAGE + 2


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("length", [256, 300, 700])
@pytest.mark.parametrize("kv_format", [None, "fp8"])
def test_a_question_over_segments_is_taken_back_without_a_trace(tiny, tokens, spec, length, kv_format):
    context = new(tiny, spec, kv_format=kv_format)
    context.extend(tokens[:length])
    before, used = memories(context), context.nbytes
    expected = context.step(tokens[length : length + 10])
    context.truncate(length)
    for count in (330, 90, 1):  # other tokens, over the ends of several segments, and written one by one
        context.step(tokens[:count])
        for token in tokens[:5]:
            context.step([token])
        context.truncate(length)
        assert same(memories(context), before) and context.nbytes == used
    assert torch.equal(context.step(tokens[length : length + 10]), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_steps_equal_reading(tiny, tokens, spec):
    at_once, by_one = new(tiny, spec), new(tiny, spec)
    logits = at_once.step(tokens[: 2 * CHUNK + 40])
    by_one.extend(tokens[: CHUNK - 3])
    by_one.step(tokens[CHUNK - 3 : 2 * CHUNK + 30])
    for i in range(2 * CHUNK + 30, 2 * CHUNK + 39):
        by_one.step(tokens[i : i + 1])
    by_one = by_one.step(tokens[2 * CHUNK + 39 : 2 * CHUNK + 40])
    torch.testing.assert_close(by_one, logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_chunk_leaves_memory_as_it_was(tiny, tokens, spec, at, monkeypatch):
    context = new(tiny, spec)
    context.extend(tokens[:190])
    before, pages = memories(context), [kv.pool.slots - kv.pool.free for kv in context.layers]
    real, calls = Mechanism.attend, []

    def attend(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3 + at:  # in the second chunk
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Mechanism, "attend", attend)
        context.extend(tokens[190:500])
    assert context.length == 256
    context.extend(tokens[256:500])
    straight = new(tiny, spec)
    for start, stop in ((0, 190), (190, 256), (256, 500)):
        straight.extend(tokens[start:stop])
    assert same(memories(context), memories(straight))
    assert torch.equal(context.step(tokens[:9]), straight.step(tokens[:9]))
    # And one that never came to be counted.
    other = new(tiny, spec)
    other.extend(tokens[:190])
    calls[:] = [1] * (2 + at - 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Mechanism, "attend", attend)
        calls[:] = [1] * (3 + at - 1)
        other.extend(tokens[190:500])
    assert other.length == 190 and same(memories(other), before)
    assert [kv.pool.slots - kv.pool.free for kv in other.layers] == pages


def test_memory_stops_growing(tiny, tokens):
    context, sizes = new(tiny, "infini:segment=192"), []
    for start in range(0, 33 * CHUNK, CHUNK):
        context.extend(tokens[start : start + CHUNK])
        sizes.append(context.nbytes)
    page, state = 2 * 2 * PAGE * 8 * 4, 4 * 2 * (8 * 8 + 8)
    # 128, 256 and 384 tokens, and so on: two pages of a segment, one, or none.
    assert sizes == [3 * 2 * page, 3 * (page + state), 3 * state, *[3 * (n * page + state) for n in (2, 1, 0)] * 10]


@pytest.mark.parametrize("spec", SPECS)
def test_restored_contexts_go_on_alike(tiny, tokens, spec):
    for length in (90, 256, 700):
        context, other = new(tiny, spec), new(tiny, spec)
        context.extend(tokens[:length])
        context.step(tokens[:150])
        context.truncate(length)
        other.restore(tokens[:length], {name: tensor.clone() for name, tensor in context.tensors().items()})
        assert same(memories(context), memories(other)) and context.nbytes == other.nbytes
        for one in (context, other):
            one.extend(tokens[length : length + 250])
        question = tiny.tokens("Which street?")
        assert torch.equal(context.mass(question, HEADS), other.mass(question, HEADS))
        assert torch.equal(context.step(question), other.step(question))


def test_tensors_that_do_not_fit_are_refused(tiny, tokens):
    spec = "infini:segment=100"
    context = new(tiny, spec)
    context.extend(tokens[:300])
    kept = context.tensors()
    assert {"0.memory.300.M", "0.memory.300.z"} < set(kept)
    for name in kept:
        if name.startswith("0."):
            with pytest.raises(SessionCorruptError):
                new(tiny, spec).restore(tokens[:300], {other: kept[other] for other in kept if other != name})
    with pytest.raises(SessionCorruptError):
        new(tiny, spec).restore(tokens[:100], kept)


@pytest.mark.parametrize("spec", SPECS)
def test_a_fork_goes_its_own_way(tiny, tokens, spec):
    root = Budget(None, "KV")
    parent = new(tiny, spec, budget=Budget(None, "one", root))
    parent.extend(tokens[:700])
    expected = parent.step(tokens[:9])
    parent.truncate(700)
    child, used = parent.fork(), root.used
    child.extend(tokens[700:1000])
    assert torch.equal(parent.step(tokens[:9]), expected)
    parent.truncate(700)
    straight = new(tiny, spec)
    straight.extend(tokens[:700])
    straight.extend(tokens[700:1000])
    assert torch.equal(child.step(tokens[:9]), straight.step(tokens[:9]))
    child.free()
    assert root.used == used == parent.nbytes
    parent.free()
    assert root.used == 0


def test_a_long_document_fits_a_small_budget(tiny, tokens):
    page, state = 2 * 2 * PAGE * 8 * 4, 4 * 2 * (8 * 8 + 8)
    budget = Budget(3 * (CHUNK // PAGE * page + (100 // PAGE + 2) * page + 2 * state), "KV")
    context = new(tiny, "infini:segment=100", budget=budget)
    context.extend(tokens[:4000])
    assert budget.used == context.nbytes < budget.limit
    with pytest.raises(PoolExhaustedError, match="--kv-budget"):
        context.step(tokens[:600])
    context.truncate(4000)
    assert budget.used == context.nbytes
    assert context.step(tokens[:60]).isfinite().all()


# --- through the engine's face --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["infini:segment=100", "infini:segment=64,beta=-2.0"])
def test_a_session_answers_alike_before_and_after_it_was_saved(make_llm, text, spec):
    llm = make_llm(spec)
    session = llm.session("codes")
    llm.add_text(session, text, "codes.txt")
    llm.prefill(session)
    said = [llm.ask(question, session, max_tokens=24).text for question in (QUESTION, "And the museum?")]
    assert [llm.ask(question, session, max_tokens=24).text for question in (QUESTION, "And the museum?")] == said
    llm.save(session)
    other = make_llm(spec)
    restored = other.session("codes")
    assert other.prefill(restored).read_tokens == 0
    assert [other.ask(question, restored, max_tokens=24).text for question in (QUESTION, "And the museum?")] == said
    child = other.fork(restored, "annexe")
    assert other.ask(QUESTION, child, max_tokens=24).text == said[0]
    for engine, one in ((llm, session), (other, restored)):
        engine.add_text(one, "The lantern is in the cellar. " * 20, "more")
    assert llm.ask(QUESTION, session, max_tokens=9).text == other.ask(QUESTION, restored, max_tokens=9).text


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model whose configuration says that it was trained with infini, and its gates."""
    from transformers import AutoConfig

    folder = save_model(tmp_path_factory.mktemp("taught") / "tiny", max_position_embeddings=WINDOW)
    config = AutoConfig.from_pretrained(folder)
    trained.record(config, "infini", torch.arange(12).view(3, 4) / 4 - 1.5)
    config.save_pretrained(folder)
    return load(str(folder), device="cpu", dtype=torch.float32)


def test_an_untrained_model_is_told_of_and_a_trained_one_is_not(make_llm, calibrated, taught, text):
    llm = make_llm("infini:segment=100")
    session = llm.session()
    llm.add_text(session, text)
    for answer in (llm.ask(QUESTION, session, max_tokens=2), llm.ask(QUESTION, max_tokens=2)):
        (note,) = (note for note in answer.notes if "trained" in note)
        assert "infini" in note and "\n" not in note
    for other in (make_llm("streaming"), LLM(taught, "infini:segment=100")):
        assert not any("trained" in note for note in other.ask(QUESTION, max_tokens=2).notes)


def test_gates_of_a_trained_model_are_used(tiny, taught, tokens):
    contexts = [new(model, "infini:segment=100") for model in (tiny, taught)]
    for context in contexts:
        context.extend(tokens[:300])
    plain, gated = (context.step(tokens[300:301]) for context in contexts)
    assert not torch.allclose(plain, gated, atol=1e-2), "the same weights, and other gates"
    assert taught.fingerprint != tiny.fingerprint
    # Layer for layer: gates that are all the same are the option.
    taught.trained = trained.Trained("infini", torch.full((3, 4), -2.0))
    try:
        same_gates, option = new(taught, "infini:segment=100"), new(tiny, "infini:segment=100,beta=-2.0")
        for context in (same_gates, option):
            context.extend(tokens[:300])
        assert torch.equal(same_gates.step(tokens[300:301]), option.step(tokens[300:301]))
    finally:
        taught.trained = trained.Trained("infini", torch.arange(12).view(3, 4) / 4 - 1.5)


def test_documents_and_questions_are_read_by_the_same(tiny, tokens):
    for attention, prefill in (("infini", "streaming"), ("streaming", "infini"), ("infini", "infini:segment=64")):
        with pytest.raises(UsageError, match="leave out --prefill"):
            LLM(tiny, attention, prefill=prefill).new_context(parse(attention))
    context = new(tiny, "infini:segment=64", prefill=make("infini", segment=64))
    context.extend(tokens[:200])
    assert context.layers[0].memory.length == 192


def test_a_context_that_keeps_everything_may_attend_by_any_mechanism(tiny, tokens):
    context = new(tiny, "dense", budget=Budget(None, "KV"))
    context.extend(tokens[:500])
    used, answers = context.budget.used, []
    for spec in ("infini:segment=100", "infini:segment=64", "infini:segment=100", "dense"):
        context.attend_by(parse(spec))
        answers.append(context.step(tokens[500:510]))
        assert (context.layers[0].memory is None) == (spec == "dense")
        context.truncate(500)
    assert torch.equal(answers[0], answers[2]) and not torch.allclose(answers[0], answers[1], atol=1e-3)
    assert context.budget.used == used


def test_a_question_is_answered_where_no_key_of_the_document_is_held(make_llm, text):
    llm = make_llm("infini")
    session = llm.session()
    llm.add_text(session, text)
    llm.prefill(session)
    exact = make_llm(f"infini:segment={session.memory.length}")
    other = exact.session()
    exact.add_text(other, text)
    exact.prefill(other)
    assert other.memory.dropped(other.memory.length) == (0, other.memory.length)
    answers = [exact.ask(QUESTION, other, max_tokens=3) for _ in range(2)]
    assert answers[0].stats.decoded_tokens == 3 and answers[0].text == answers[1].text
    # What is not held is not cited, and what is asked reads it from memory alone.
    assert answers[0].citations == [] and other.memory.layers[0].memory.length == other.memory.length
