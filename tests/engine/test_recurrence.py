"""Hybrid models in the engine: pages and recurrent states go together through reading, cuts, forks and files."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from longspan import LLM
from longspan.attention import Mechanism, make, parse
from longspan.engine import kv_context, recurrence
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.errors import ModelError, PoolExhaustedError, SessionCorruptError, SessionMismatchError, UsageError
from longspan.hf.loading import load, plain_transformers
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.states import StateCheckpoints
from longspan.retrieval import calibrate as calibration
from longspan.retrieval import heads as heads_store
from longspan.retrieval.heads import RetrievalHeads
from tiny_hybrid import save_hybrid
from tiny_llama import CHUNK

FAMILIES = ("nemotron_h", "bamba", "falcon_h1", "lfm2")
"""Without RoPE and with experts; with RoPE; both kinds in every layer; convolutions alone."""
QUESTION = "What is the code of the tower?"
HEADS = RetrievalHeads(((0, 1), (1, 0), (1, 3)))
EVERYTHING = (
    "dense",
    "streaming:window=4096",
    "superlinear:window=4096",
    "quest",
    "tree:leaves=64",
    "retrieval:window=4096,read=place",
)
"""Ways of attending that read everything of a short text."""
SPECS = (
    "dense",
    "streaming:window=100,sinks=4",
    "superlinear:window=80,spans=2",
    "quest:budget=128,window=64",
    "tree:window=80,leaves=4",
    "retrieval:window=128,pages=2,read=place",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loads each family once: the model, and what transformers alone makes of the same weights."""
    known = {}

    def get(family):
        if family not in known:
            folder = save_hybrid(tmp_path_factory.mktemp("hybrids") / family, family)
            model = load(str(folder), device="cpu", dtype=torch.float32)
            known[family] = model, plain_transformers(model)
        return known[family]

    return get


@pytest.fixture(scope="module")
def nemotron(models):
    return models("nemotron_h")[0]


@pytest.fixture(scope="module")
def tokens(nemotron, text):
    return (nemotron.tokens(text) * 3)[:1000]


@pytest.fixture
def often(monkeypatch):
    """A checkpoint after every chunk of documents."""
    monkeypatch.setattr(recurrence, "LEAST", 1)
    monkeypatch.setattr(recurrence, "SHARE", 1e9)


def new(model, spec="dense", **options):
    mechanism = parse(spec)
    if mechanism.name == "retrieval" and mechanism.read == "again":
        return IndexContext(model, mechanism, HEADS)
    return KVContext(model, mechanism, **options)


def plain_next(plain, tokens):
    """Logits after the last token when transformers reads everything at once."""
    with torch.inference_mode():
        return plain(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].float()


def whole(context):
    """Pages, states and tokens have read the same."""
    assert {kv.length for kv in context._layers()} <= {context.length}
    assert max(context.recurrence.positions, default=0) == context.length


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


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

    def refuse(self, length, state):
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


# --- forks, files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*SPECS, "retrieval:window=128,pages=2"])
def test_forks_and_restored_contexts_go_on_alike(nemotron, tokens, often, spec):
    context = new(nemotron, spec)
    context.extend(tokens[:700])
    restored = new(nemotron, spec)
    restored.restore(tokens[:700], {name: tensor.clone() for name, tensor in context.tensors().items()})
    fork, astray = context.fork(), context.fork()
    astray.extend(tokens[:130])
    everyone, positions = (context, restored, fork), context.recurrence.positions
    for one in everyone:
        assert one.recurrence.positions == positions
        one.extend(tokens[700:750])
        whole(one)
    masses = [one.mass(tokens[:9], HEADS) for one in everyone]
    assert torch.equal(masses[0], masses[1]) and torch.equal(masses[0], masses[2])
    assert astray.length == 830 and astray.recurrence.positions[-2:] != positions[-2:]
    if isinstance(context, KVContext):
        logits = [one.step(tokens[750:760]) for one in everyone]
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    "damage",
    ["a state", "the last", "a tensor", "a shape", "a type", "all"],
)
@pytest.mark.parametrize("spec", ["dense", "retrieval:window=1000,pages=2"])
def test_saved_states_that_do_not_fit_are_refused(nemotron, tokens, often, spec, damage):
    context = new(nemotron, spec)
    context.extend(tokens[:300])
    kept = dict(context.tensors())
    names = [name for name in kept if name.startswith("states.")]
    layers = 2 if spec == "dense" else len({name.split(".")[2] for name in names})
    assert len(names) == 3 * 2 * layers  # at 128, 256 and 300: a convolution and a recurrence each
    if damage == "a state":
        kept.update({name.replace(".300.", ".310."): kept[name] for name in names if ".300." in name})
    elif damage == "the last":
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith("states.300.")}
    elif damage == "a tensor":
        del kept["states.128.0.conv.0"]
    elif damage == "a shape":
        kept.update({name: kept[name][..., 1:] for name in names if "recurrent" in name})
    elif damage == "a type":
        kept.update({name: kept[name].double() for name in names if "recurrent" in name})
    else:
        kept = {name: tensor for name, tensor in kept.items() if name not in names}
    other = new(nemotron, spec)
    with pytest.raises(SessionCorruptError, match="states do not fit") as caught:
        other.restore(tokens[:300], kept)
    assert "\n" not in str(caught.value)
    assert other.length == 0
    whole(other)


CONTINUING = """
import json, sys, torch
from longspan import LLM
from longspan.engine import contexts

contexts.CHUNK, question, said = int(sys.argv[2]), sys.argv[3], []
torch.set_num_threads(1)
for spec in sys.argv[4:]:
    llm = LLM(sys.argv[1], spec, device="cpu", dtype=torch.float32)
    session = llm.session(spec.partition(":")[0])
    assert llm.prefill(session).read_tokens == 0
    said += [llm.ask(asked, session, max_tokens=12).text for asked in (question, "And the museum?")]
    llm.add_text(session, "The lantern is in the cellar.", "more")
    said.append(llm.ask(question, session, max_tokens=12).text)
print(json.dumps(said))
"""


def test_sessions_are_continued_in_another_process(models, text):
    model, _ = models("nemotron_h")
    heads_store.store(model.fingerprint, HEADS, {})
    specs, expected = ("dense", "streaming:window=100,sinks=4", "retrieval:window=128,pages=2"), []
    for spec in specs:
        llm = LLM(model, spec)
        session = llm.session(spec.partition(":")[0])
        llm.add_text(session, text)
        llm.prefill(session)
        llm.save(session)
        expected += [llm.ask(question, session, max_tokens=12).text for question in (QUESTION, "And the museum?")]
        llm.add_text(session, "The lantern is in the cellar.", "more")
        expected.append(llm.ask(QUESTION, session, max_tokens=12).text)
    program = [sys.executable, "-c", CONTINUING, model.name, str(CHUNK), QUESTION, *specs]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_a_session_of_another_hybrid_is_refused(models, text, tmp_path):
    llm = LLM(models("nemotron_h")[0], "dense")
    session = llm.session("codes")
    llm.add_text(session, text[:300])
    llm.prefill(session)
    llm.save(session)
    other = save_hybrid(tmp_path / "other", "nemotron_h", n_groups=4, ssm_state_size=4)
    with pytest.raises(SessionMismatchError, match="model"):
        LLM(str(other), "dense", device="cpu", dtype=torch.float32).session("codes")


def test_documents_are_forgotten_and_others_read_after_them(models, text):
    model, _ = models("nemotron_h")
    llm = LLM(model, "dense")
    session, alone = llm.session(), llm.session()
    for one in (session, alone):
        llm.add_text(one, text[:700], "first")
    llm.prefill(session)
    llm.add_text(session, text[700:], "second")
    llm.prefill(session)
    llm.keep_documents(session, 1)
    whole(session.memory)
    assert session.memory.length == session.head + len(session.tokens)
    said = [llm.ask(QUESTION, one, max_tokens=12).text for one in (session, alone)]
    assert said[0] == said[1] and session.memory.tokens == alone.memory.tokens


# --- budgets --------------------------------------------------------------------------------------------------


def test_states_are_counted_and_checkpoints_give_way(models, tokens, often):
    model, plain = models("nemotron_h")
    free = new(model)
    free.extend(tokens[:900])
    state = free.recurrence.state_bytes
    pages = sum(kv.nbytes for kv in free.layers)
    assert len(free.recurrence.positions) == 8 and free.nbytes == pages + 8 * state
    # Room for the pages, the two states that must be and two more.
    budget = Budget(pages + 4 * state, "KV")
    tight = new(model, budget=budget)
    tight.extend(tokens[:900])
    assert budget.used == tight.nbytes <= budget.limit
    kept = tight.recurrence.positions
    assert len(kept) < 8 and kept[-1] == 900
    tight.truncate(850)
    close(tight.step(tokens[850:860]), plain_next(plain, tokens[:860]))
    with pytest.raises(PoolExhaustedError, match="KV budget"):
        tight.extend(tokens[:900])
    whole(tight)
    held = tight.length
    assert budget.used == tight.nbytes
    close(tight.step([5]), plain_next(plain, [*tight.tokens[:held], 5]))
    del tight
    assert budget.used == 0


def test_a_budget_below_two_states_is_refused(nemotron):
    with pytest.raises(UsageError, match="two recurrent states"):
        new(nemotron, budget=Budget(10_000, "KV"))


def test_cold_pages_are_demoted_beside_states(nemotron, tokens, often, monkeypatch):
    tree, prefill = make("tree", window=80), make("streaming", window=100)
    free = KVContext(nemotron, tree, prefill)
    free.extend(tokens * 2)
    limit = free.nbytes * 3 // 5
    budget = Budget(limit, "KV")
    tight = KVContext(nemotron, tree, prefill, budget=budget)
    monkeypatch.setattr(kv_context, "SHARE", 0.1)
    tight.extend(tokens * 2)
    state = tight.recurrence.state_bytes
    assert budget.used == tight.nbytes <= limit
    assert any(kv.resolution(page) != "fp32" for kv in tight.layers for page in range(len(kv.table)))
    assert 2 * state < tight.recurrence.nbytes <= 0.1 * limit + state < free.recurrence.nbytes
    for _ in range(3):
        assert tight.step(tokens[:40]).isfinite().all()
        assert tight.step([7]).isfinite().all()
        assert budget.used <= limit
        tight.truncate(2000)
    whole(tight)


def test_a_state_larger_than_pages_finds_room_beside_them(tmp_path, tokens, often):
    folder = save_hybrid(tmp_path / "wide", "nemotron_h", ssm_state_size=128, mamba_head_dim=16)
    model = load(str(folder), device="cpu", dtype=torch.float32)
    tree, prefill = make("tree", window=80), make("streaming", window=100)
    probe = KVContext(model, tree, prefill)
    state, page = probe.recurrence.state_bytes, sum(kv.pool.least_bytes for kv in probe.layers)
    assert state > 3 * page
    budget = Budget(2 * state + 14 * page, "KV")
    context = KVContext(model, tree, prefill, budget=budget)
    for start in range(0, 1000, 100):
        context.extend(tokens[start : start + 100])
        for _ in range(2):
            # Two states: that of the documents' end, and the latest.
            context.step(tokens[:20])
            context.step([7])
            whole(context)
            assert budget.used == context.nbytes <= budget.limit
            context.truncate(start + 100)
    assert any(kv.resolution(page) != "fp32" for kv in context.layers for page in range(len(kv.table)))


def test_a_fork_that_the_budget_does_not_hold_takes_nothing(nemotron, tokens):
    root = Budget(None, "KV")
    context = new(nemotron, budget=Budget(None, "session's KV", root))
    context.extend(tokens[:300])
    used = root.used
    for limit in (context.recurrence.nbytes - 1, context.nbytes - 1):
        small = Budget(limit, "fork's KV", root)
        with pytest.raises(PoolExhaustedError, match="fork's KV"):
            context.fork(small)
        assert small.used == 0 and root.used == used
    whole(context)


# --- retrieval ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "heads,family", [*((HEADS, family) for family in FAMILIES), (RetrievalHeads(((0, 2),)), "bamba")]
)
def test_an_index_reads_as_a_whole_context_does(models, tokens, heads, family):
    model, _ = models(family)
    index = IndexContext(model, parse("retrieval:window=100"), heads)
    whole_context = KVContext(model, make("streaming", window=100, sinks=4))
    whole_context.dropped = lambda length: (0, 0)
    for context in (index, whole_context):
        context.extend(tokens[:700])
        whole(context)
    last = heads.heads[-1][0]
    assert set(index.recurrence.state()) == set(model.states_before(last))
    assert last or set(model.states_before(last)) < set(model.state_spec), "layers above are never run"
    found = index.mass(tokens[:9], heads)
    torch.testing.assert_close(found, whole_context.mass(tokens[:9], heads), atol=2e-3, rtol=2e-2)
    assert torch.equal(index.mass(tokens[:9], heads), found), "a question leaves nothing behind"


def test_calibration_reads_on_from_the_state(nemotron, monkeypatch):
    monkeypatch.setattr(calibration, "_LENGTH", 700)
    monkeypatch.setattr(calibration, "_CONTEXTS", 1)
    monkeypatch.setattr(calibration, "_CHUNK", 100)
    readers, made = [], calibration._Everything.__init__

    def watched(self, model):
        made(self, model)
        readers.append(self)

    monkeypatch.setattr(calibration._Everything, "__init__", watched)
    read, filled = [], calibration._with_facts

    def watch(*arguments):
        read.append(filled(*arguments))
        return read[-1]

    monkeypatch.setattr(calibration, "_with_facts", watch)
    with pytest.raises(ModelError, match="no retrieval head"):
        calibration.calibrate(nemotron)
    tokens = read[0][0]
    context = KVContext(nemotron, make("streaming", window=1024, sinks=4))
    context.extend(tokens)
    close(dict(readers[0].state), context.recurrence.state())
