"""Recurrent states in forks, saved sessions, budgets and indexes: kept with their pages, or refused."""

import json
import subprocess
import sys

import pytest
import torch
from recurrent import FAMILIES, HEADS, QUESTION, SPECS, close, new, plain_next, whole

from longspan import LLM
from longspan.attention import make, parse
from longspan.engine import kv_layers
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.errors import ModelError, PoolExhaustedError, SessionCorruptError, SessionMismatchError, UsageError
from longspan.hf.loading import load
from longspan.kv.budget import Budget
from longspan.retrieval import calibrate as calibration
from longspan.retrieval import heads as heads_store
from longspan.retrieval.heads import RetrievalHeads
from tiny_hybrid import save_hybrid
from tiny_llama import CHUNK

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
    monkeypatch.setattr(kv_layers, "SHARE", 0.1)
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
