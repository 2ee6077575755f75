"""Contexts whose layers evict, through the real engine: schedules, windows, byte budgets, sessions, interruptions."""

import signal

import pytest
import torch

from longspan import LLM
from longspan.attention import make, parse
from longspan.engine import kept_layers
from longspan.engine.kv_context import KVContext
from longspan.errors import PoolExhaustedError, UsageError
from longspan.evals.haystack import prose
from longspan.hf.loading import load
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.retrieval.heads import RetrievalHeads
from tiny_hybrid import save_hybrid
from tiny_llama import CHUNK, WINDOW

HEADS = RetrievalHeads(((1, 0), (2, 1), (2, 3)))
QUESTION = "Which street has the museum?"
SPECS = [
    "h2o:budget=150,window=70,every=64",
    "h2o:budget=150,window=70,every=200,heads=adaptive",
    "snapkv:budget=150",
    "snapkv:budget=150,heads=adaptive",
    "rocketkv:budget=150",
    "expected:budget=150,future=64",
    "keydiff:budget=150,every=128",
    "kvzip:budget=150,heads=adaptive",
    "kvzip:budget=150",
]
NATIVE = 2 * 2 * PAGE * 8 * 4
"""Bytes of one page of one layer: keys and values, KV heads, tokens, head size, float32."""


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:30000])


def read(model, spec, tokens, **options):
    context = KVContext(model, parse(spec), **options)
    context.extend(tokens)
    return context


def held(context):
    return [row for kv in context.kept.layers for group in kv.groups for row in group.positions().tolist()]


@pytest.mark.parametrize("spec", SPECS)
def test_a_budget_for_everything_is_dense(tiny, tokens, spec):
    name, _, rest = spec.partition(":")
    context = read(tiny, f"{name}:budget=900,{rest.partition(',')[2] or 'sinks=4'}", tokens[:700])
    dense = read(tiny, "dense", tokens[:700])
    for step in (tokens[700:720], tokens[720:721]):
        torch.testing.assert_close(context.step(step), dense.step(step), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_kept_is_the_budget_to_the_row_and_to_the_page(tiny, tokens, spec):
    context, mechanism = read(tiny, spec, tokens[:900]), parse(spec)
    keep, layers = mechanism.keeps(900), context.kept.layers
    assert sum(kv.total for kv in layers) == keep * sum(kv.kv_heads for kv in layers)
    for kv in layers:
        assert kv.length == 900 and (mechanism.heads == "model" or kv.total == keep * kv.kv_heads)
        pages = sum(-(-group.held // PAGE) * group.pages.pool.native.page_bytes for group in kv.groups)
        assert kv.page_bytes == pages == (kv.pool.slots - kv.pool.free) * kv.pool.native.page_bytes
        for group in kv.groups:
            rows = group.positions()
            assert (rows[:, :4] == torch.arange(4)).all(), "sinks"
            assert (rows[:, -mechanism.window :] == torch.arange(900 - mechanism.window, 900)).all(), "window"
    assert context.nbytes < read(tiny, "dense", tokens[:900]).nbytes / (2 if keep < 200 else 1.2)
    # The question and its answer evict nothing, and are taken back.
    before = held(context)
    context.step(tokens[:50])
    context.step(tokens[50:51])
    assert context.kept.held == max(map(len, before)) + 51
    context.truncate(900)
    assert held(context) == before


@pytest.mark.parametrize("spec", SPECS)
def test_evictions_come_where_the_schedule_says_however_documents_are_read(tiny, tokens, spec, monkeypatch):
    lengths = []
    evict = kept_layers.KeptLayers._evict

    def noted(self, layers, length, *rest):
        before = sum(kv.total for kv in layers)
        evict(self, layers, length, *rest)
        if sum(kv.total for kv in layers) < before:
            lengths.append(length)

    monkeypatch.setattr(kept_layers.KeptLayers, "_evict", noted)
    every = parse(spec).every
    whole = read(tiny, spec, tokens[:900])
    wanted = [at for at in range(every, 900, every) if at > 150] if every else []
    if parse(spec).repeats:
        wanted = [WINDOW - WINDOW // 4]  # where a repetition would find no more room
    assert sorted(set(lengths)) == [*wanted, 900]
    lengths.clear()
    # Stopped after some chunks, then read on: the same.
    stopped = KVContext(tiny, parse(spec))

    def stop(count):
        if stopped.length > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.extend(tokens[:900], stop)
    stopped.extend(tokens[stopped.length : 900])
    assert sorted(set(lengths)) == [*wanted, 900]
    assert held(stopped) == held(whole)
    assert torch.equal(stopped.step(tokens[:9]), whole.step(tokens[:9]))


@pytest.mark.parametrize("spec", [*SPECS, "h2o", "rocketkv:budget=700"])
def test_far_beyond_the_window_no_position_passes_it(tiny, tokens, spec, monkeypatch):
    most = []
    append = kept_layers.KeptKV.append

    def noted(self, k, v):
        append(self, k, v)
        most.append(self.held)

    monkeypatch.setattr(kept_layers.KeptKV, "append", noted)
    context = read(tiny, spec, tokens[:2000])
    assert max(most) <= WINDOW
    assert context.kept.held <= WINDOW - WINDOW // 4
    assert context.window_taken == context.kept.held
    assert context.step(tokens[:40]).isfinite().all()
    if parse(spec).every:
        assert max(most) <= parse(spec).keeps(2000) + parse(spec).every or parse(spec).apart


def limit(pages):
    return Budget(pages * 3 * NATIVE, "KV")


@pytest.mark.parametrize(
    "spec,kv_format",
    [*((spec, None) for spec in [*SPECS, "h2o"]), ("h2o", "fp8"), (SPECS[1], "fp8"), ("snapkv:heads=adaptive", "fp8"),
     ("h2o", "int8"), ("snapkv:heads=adaptive", "int4:residual=64,sinks=0")],
)  # fmt: skip
def test_a_byte_budget_is_obeyed_while_reading_and_answering(tiny, tokens, spec, kv_format, monkeypatch):
    root, spent = limit(8 if kv_format is None else 6), []  # a chunk is two pages, and exact while it is read
    charge = Budget.charge

    def noted(self, *numbers):
        charge(self, *numbers)
        spent.append(root.used)

    monkeypatch.setattr(Budget, "charge", noted)
    context = KVContext(tiny, parse(spec), kv_format=kv_format, budget=Budget(None, "session's KV", root))
    context.extend(tokens[:1500])
    assert max(spent) <= root.limit
    if parse(spec).budget > 200:
        assert max(spent) > 0.5 * root.limit, "what is there is used"
    assert context.kept.held >= PAGE
    assert root.used == sum(kv.page_bytes for kv in context.kept.layers)
    assert context.step(tokens[:60]).isfinite().all()
    for token in tokens[60:80]:
        context.step([token])
    assert max(spent) <= root.limit
    other = KVContext(tiny, parse(spec), kv_format=kv_format, budget=Budget(None, "session's KV", root))
    context.free()
    assert root.used == 0
    other.extend(tokens[:300])
    assert other.length == 300


def test_a_byte_budget_that_holds_no_page_of_keys_beside_a_chunk_is_refused(tiny, tokens):
    context = KVContext(tiny, parse("h2o"), budget=limit(2))
    with pytest.raises(PoolExhaustedError, match=rf"{PAGE} keys of every layer and a chunk of {CHUNK}: raise it"):
        context.extend(tokens[:900])
    # What was read before it is whole.
    assert {kv.length for kv in context.kept.layers} == {context.length} and context.length <= 2 * PAGE
    with pytest.raises(UsageError, match="one page for each of 3 layers"):
        KVContext(tiny, parse("h2o"), budget=Budget(NATIVE))


@pytest.mark.parametrize("spec,kv_format", [*((spec, None) for spec in SPECS), *((spec, "fp8") for spec in SPECS[:2])])
def test_saved_restored_and_forked_contexts_continue_exactly(tiny, tokens, spec, kv_format):
    context = read(tiny, spec, tokens[:700], kv_format=kv_format)
    saved = {name: tensor.clone() for name, tensor in context.tensors().items()}
    again = KVContext(tiny, parse(spec), kv_format=kv_format)
    again.restore(tokens[:700], saved)
    fork = context.fork()
    outs = []
    for one in (context, fork, again):
        first = one.step(tokens[700:730])
        one.truncate(700)
        one.extend(tokens[700:1000])
        outs.append((held(one), first, one.step(tokens[5:25])))
    for rows, first, last in outs[1:]:
        assert rows == outs[0][0]
        torch.testing.assert_close(first, outs[0][1], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(last, outs[0][2], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", [*SPECS[:2], *SPECS[3:5]])
@pytest.mark.parametrize("at", ["append", "attend_kept", "learn", "keep"])
def test_ctrl_c_anywhere_leaves_no_trace(tiny, tokens, spec, at, monkeypatch):
    homes = {"append": kept_layers.KeptKV, "keep": kept_layers.KeptKV, "learn": type(parse(spec))}
    home = homes.get(at, type(parse(spec)))
    whole, calls = getattr(home, at), []

    def interrupted(self, *arguments, **options):
        done = whole(self, *arguments, **options)
        calls.append(1)
        if len(calls) in (2, 5):
            signal.raise_signal(signal.SIGINT)
        return done

    context = KVContext(tiny, parse(spec))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stops = 0
    try:
        with monkeypatch.context() as patch:
            patch.setattr(home, at, interrupted)
            while context.length < 900 or not stops:
                try:
                    context.extend(tokens[context.length : 900])
                    break
                except KeyboardInterrupt:
                    stops += 1
                    assert {kv.length for kv in context.kept.layers} == {context.length}
    finally:
        signal.signal(signal.SIGINT, before)
    assert stops
    straight = read(tiny, spec, tokens[:900])
    context.extend([])
    assert held(context) == held(straight)
    assert torch.equal(context.step(tokens[:5]), straight.step(tokens[:5]))


@pytest.mark.parametrize("spec", SPECS)
def test_mass_falls_on_what_each_head_kept(tiny, tokens, spec):
    context = read(tiny, spec, tokens[:700])
    question = tiny.tokens(QUESTION)
    mass = context.mass(question, HEADS)
    assert mass.shape == (3, 700) and mass.dtype == torch.float32
    torch.testing.assert_close(mass.sum(1), torch.ones(3))
    for row, (layer, head) in enumerate(HEADS.heads):
        _, kept = context.kept.layers[layer].head_keys(head // 2, 700)
        assert (mass[row] > 0).nonzero().flatten().tolist() == [
            token for token in kept.tolist() if token >= HEADS.sinks
        ]
    assert torch.equal(context.mass(question, HEADS), mass) and context.length == 700
    # Where nothing was evicted it is the dense context's.
    dense, all_kept = read(tiny, "dense", tokens[:120]), read(tiny, spec, tokens[:120])
    torch.testing.assert_close(all_kept.mass(question, HEADS), dense.mass(question, HEADS), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec,kv", [(SPECS[0], "auto"), (SPECS[1], "fp8"), *((spec, "auto") for spec in SPECS[3:])])
def test_a_session_is_read_asked_saved_and_forked(tiny, calibrated, text, spec, kv):
    llm = LLM(tiny, spec, kv=kv)
    session = llm.session("codes")
    llm.add_text(session, text)
    llm.prefill(session)
    rows = held(session.memory)
    answer = llm.ask(QUESTION, session, max_tokens=6)
    assert answer.citations and answer.stats.decoded_tokens == 6
    assert held(session.memory) == rows
    llm.save(session)
    again = LLM(tiny, spec, kv=kv)
    restored = again.session("codes")
    assert held(restored.memory) == rows
    assert again.ask(QUESTION, restored, max_tokens=6).text == answer.text
    fork = again.fork(restored)
    again.add_text(fork, "The cellar is closed. " * 20, "cellar")
    again.ask(QUESTION, fork, max_tokens=2)
    assert fork.memory.length > restored.memory.length
    assert again.ask(QUESTION, restored, max_tokens=6).text == answer.text
    assert llm.ask("Who keeps the key?", max_tokens=3).stats.decoded_tokens == 3, "without documents"


def test_documents_that_can_not_be_kept_leave_the_session_as_it_was(tiny, calibrated, text, tmp_path, monkeypatch):
    llm = LLM(tiny, "h2o:budget=150,window=70", kv_budget=400_000)
    calls = []
    make_room = kept_layers.KeptLayers.make_room

    def exhausted(self, *lengths):
        calls.append(1)
        if len(calls) == 3:
            raise PoolExhaustedError("nothing is left")
        make_room(self, *lengths)

    session = llm.session()
    llm.add_text(session, text)
    llm.prefill(session)
    said = llm.ask(QUESTION, session, max_tokens=4).text
    (tmp_path / "long.txt").write_text("The pier is long, and the tower is high. " * 200)
    with monkeypatch.context() as patch, pytest.raises(PoolExhaustedError):
        patch.setattr(kept_layers.KeptLayers, "make_room", exhausted)
        llm.read(session, [tmp_path / "long.txt"])
    assert len(session.documents) == 1
    assert llm.ask(QUESTION, session, max_tokens=4).text == said


@pytest.mark.parametrize("family,spec", [("nemotron_h", SPECS[0]), ("lfm2", SPECS[3])])
def test_states_of_hybrid_models_go_with_rows_that_stay(tmp_path, tokens, family, spec):
    model = load(str(save_hybrid(tmp_path / family, family)), device="cpu", dtype=torch.float32)
    context = read(model, spec, tokens[:600])
    assert all(kv.total == 150 * 2 for kv in context.kept.layers)
    rows, first = held(context), context.step(tokens[600:640])
    context.step(tokens[3:4])
    context.truncate(600)
    again = KVContext(model, parse(spec))
    again.restore(tokens[:600], context.tensors())
    fork = context.fork()
    context.extend(tokens[600:900])
    for one in (fork, again):
        assert held(one) == rows
        torch.testing.assert_close(one.step(tokens[600:640]), first, atol=1e-4, rtol=1e-4)
        one.truncate(600)
        one.extend(tokens[600:900])
        assert held(one) == held(context)
    assert context.recurrence.positions == [900]


def test_who_evicts_reads_documents_itself(tiny):
    with pytest.raises(UsageError, match="leave out --prefill"):
        KVContext(tiny, make("snapkv"), make("dense"))
    with pytest.raises(UsageError, match="leave out --prefill"):
        LLM(tiny, "snapkv", prefill="xattention").new_context(make("snapkv"))
    context = KVContext(tiny, make("dense"))
    with pytest.raises(AssertionError, match="a context of its own"):
        context.attend_by(make("snapkv"))


@pytest.mark.parametrize(
    "spec,kv_format",
    [
        ("snapkv:budget=2000", None),
        ("snapkv:budget=2000", "fp8"),
        ("snapkv:budget=2000", "int4:residual=0,sinks=0"),
        ("snapkv:budget=2000", "int4:residual=70,sinks=4"),
        ("snapkv:budget=2000,heads=adaptive", None),
        ("expected:budget=2000,heads=adaptive", "int4:residual=0,sinks=0"),
        ("h2o:budget=700,window=350,every=128", "int4:residual=0,sinks=0"),
    ],
)
def test_layers_shrink_to_bytes_and_waste_no_page(tiny, tokens, spec, kv_format):
    whole = read(tiny, spec, tokens[:960], kv_format=kv_format)
    with pytest.raises(UsageError, match="do not hold a page"):
        whole.kept.shrink(960, whole.nbytes // 100)
    for share in (0.5, 0.41, 0.33):
        context = whole.fork()
        allowed = int(share * whole.nbytes)
        context.kept.shrink(960, allowed)
        kv = context.kept.layers[0]
        # The next page may have to be an exact one.
        page = kv.pool.native.page_bytes + kv.page_cost if kv_format else kv.page_cost
        lost = page * len(context.kept.layers)
        assert allowed - lost < context.nbytes <= allowed, (share, context.nbytes, allowed)
        assert all(group.held % PAGE == 0 for kv in context.kept.layers for group in kv.groups)
        if "adaptive" not in spec:
            rows = [kv.total // kv.kv_heads for kv in context.kept.layers]
            assert all(count % PAGE == 0 for count in rows) and max(rows) - min(rows) <= PAGE
