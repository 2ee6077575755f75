"""Contexts by themselves: reading, taking back, the retrieval heads' mass, what is kept."""

import pytest
import torch

from longspan.attention import Mechanism, make, parse
from longspan.engine.index_context import IndexContext
from longspan.engine.kv_context import KVContext
from longspan.errors import SessionCorruptError
from longspan.hf.loading import load
from longspan.kv.base import PAGE
from longspan.retrieval.heads import RetrievalHeads
from tiny_llama import CHUNK, SPECS, save_model

HEADS = RetrievalHeads(((1, 0), (2, 1), (2, 3)))
KV_SPECS = [spec for spec in SPECS if spec != "retrieval:window=128,pages=2"]


@pytest.fixture(scope="module")
def tokens(tiny, text):
    return tiny.tokens(text) * 3


def new(tiny, spec="retrieval:window=128"):
    mechanism = parse(spec)
    if mechanism.name == "retrieval" and mechanism.read == "again":
        return IndexContext(tiny, mechanism, HEADS)
    return KVContext(tiny, mechanism)


@pytest.mark.parametrize("spec", KV_SPECS)
def test_a_step_is_taken_back_without_a_trace(tiny, tokens, spec):
    context = new(tiny, spec)
    context.extend(tokens[:700])
    expected = context.step(tokens[700:710])
    context.truncate(700)
    context.step(tokens[:90])  # other tokens, over a page's end
    context.truncate(700)
    assert torch.equal(context.step(tokens[700:710]), expected)
    assert context.tokens == tokens[:710]


@pytest.mark.parametrize("spec", KV_SPECS)
def test_a_long_step_is_read_in_chunks(tiny, tokens, spec):
    at_once, by_one = new(tiny, spec), new(tiny, spec)
    logits = at_once.step(tokens[: CHUNK + 40])
    by_one.extend(tokens[: CHUNK - 3])
    by_one.step(tokens[CHUNK - 3 : CHUNK + 39])
    torch.testing.assert_close(by_one.step(tokens[CHUNK + 39 : CHUNK + 40]), logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_reading_tells_every_chunk(tiny, tokens, spec):
    context, told = new(tiny, spec), []
    context.extend(tokens[: 2 * CHUNK + 5], told.append)
    assert [count for count in told if count] == [CHUNK, CHUNK, 5]
    assert context.length == 2 * CHUNK + 5 and context.tokens == tokens[: 2 * CHUNK + 5]
    context.extend([])
    assert context.length == 2 * CHUNK + 5


@pytest.mark.parametrize("spec", SPECS)
def test_an_interrupted_chunk_leaves_no_page_behind(tiny, tokens, spec, monkeypatch):
    context = new(tiny, spec)
    context.extend(tokens[:100])
    used = [kv.pool.slots - kv.pool.free for kv in context._layers()]
    real, calls = Mechanism.attend, []

    def attend(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the disk of a swapped page, say")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Mechanism, "attend", attend)
        with pytest.raises(RuntimeError):
            context.extend(tokens[100:400])
    assert context.length == 100 and context.tokens == tokens[:100]
    assert [kv.length for kv in context._layers()] == [100] * len(used)
    assert [kv.pool.slots - kv.pool.free for kv in context._layers()] == used


def test_streaming_keeps_a_bounded_memory(tiny, tokens):
    context, sizes = new(tiny, "streaming:window=100,sinks=4"), []
    for start in range(0, 8 * CHUNK, CHUNK):
        context.extend(tokens[start : start + CHUNK])
        sizes.append(context.nbytes)
    assert len(set(sizes[1:])) == 1
    page = 2 * 2 * PAGE * 8 * 4  # keys and values, KV heads, tokens, head size, float32
    assert sizes[-1] <= 3 * 4 * page
    dense = new(tiny, "dense")
    dense.extend(tokens[: 4 * PAGE])
    assert dense.nbytes == 3 * 4 * page


def test_an_index_keeps_less_than_a_context(tiny, tokens):
    index, dense = new(tiny), new(tiny, "dense")
    for context in (index, dense):
        context.extend(tokens[:1000])
    assert index.nbytes < dense.nbytes / 2
    # Two KV heads carry the three retrieval heads: layer 1 head 0, layer 2 heads 0 and 1.
    assert index.tensors()["index"].shape == (3, 1000, 8)
    assert len(index._layers()) == 2, "layers from the highest retrieval head on are not read"


@pytest.mark.parametrize("spec", SPECS)
def test_mass_is_a_distribution_and_leaves_nothing(tiny, tokens, spec):
    context = new(tiny, spec)
    context.extend(tokens[:1000])
    question = tiny.tokens("Which street has the museum?")
    mass = context.mass(question, HEADS)
    assert mass.shape == (3, 1000) and mass.dtype == torch.float32
    torch.testing.assert_close(mass.sum(1), torch.ones(3))
    assert (mass >= 0).all() and (mass[:, :4] == 0).all()
    assert context.length == 1000 and all(kv.length == 1000 for kv in context._layers())
    assert torch.equal(context.mass(question, HEADS), mass)
    dropped = (mass == 0).all(0).nonzero().squeeze(1).tolist()
    if spec.startswith("streaming"):
        assert dropped == list(range(1000 - 100 + 1 + PAGE - 1 - (1000 - 100 + PAGE) % PAGE)), "only the window is held"
    else:
        assert dropped == [0, 1, 2, 3]


def test_mass_is_the_softmax_of_the_heads_over_all_keys(tiny, tokens):
    context = new(tiny, "dense")
    context.extend(tokens[:300])
    question = tiny.tokens("Which street?")
    mass = context.mass(question, HEADS)
    caught = {}

    class Watching:
        def attend(self, layer, q, k, v, scale):
            caught[layer] = q[0].double() * scale
            kv = context.layers[layer]
            kv.append(k, v)
            return context.mechanism.attend(q, kv, scale=scale)

    keys = {layer: context.layers[layer].keys(0, 300)[0].double() for layer in (1, 2)}
    tiny.forward(question, Watching())
    for row, (layer, head) in enumerate(HEADS.heads):
        scores = caught[layer][head] @ keys[layer][head // 2].T
        scores[:, :4] = float("-inf")
        torch.testing.assert_close(mass[row].double(), torch.softmax(scores, 1).mean(0), atol=1e-5, rtol=1e-3)


def test_an_index_finds_what_a_whole_context_finds(tiny, tokens):
    # Reading by the same window, the index differs in that it keeps half the precision, and nothing else.
    index = IndexContext(tiny, make("retrieval", window=128), HEADS)
    whole = KVContext(tiny, make("streaming", window=128, sinks=4))
    whole._drop = lambda: None
    for context in (index, whole):
        context.extend(tokens[:1000])
    question = tiny.tokens("Which street has the museum?")
    found = index.mass(question, HEADS)
    queries = {}

    class Watching:
        def attend(self, layer, q, k, v, scale):
            queries[layer] = q[0] * scale
            whole.layers[layer].append(k, v)
            return whole.mechanism.attend(q, whole.layers[layer], scale=scale)

    keys = {layer: whole.layers[layer].keys(0, 1000)[0].clone() for layer in (1, 2)}
    tiny.forward(question, Watching())
    for row, (layer, head) in enumerate(HEADS.heads):
        scores = queries[layer][head] @ keys[layer][head // 2].T
        scores[:, :4] = float("-inf")
        torch.testing.assert_close(found[row], torch.softmax(scores, 1).mean(0), atol=2e-3, rtol=2e-2)


def test_an_index_asked_for_other_heads_or_for_logits_is_our_fault(tiny, tokens):
    context = new(tiny)
    context.extend(tokens[:10])
    with pytest.raises(AssertionError):
        context.mass(tokens[:5], RetrievalHeads(((0, 0),)))
    with pytest.raises(AssertionError):
        context.step(tokens[:5])


@pytest.mark.parametrize("heads", [((0, 2),), ((0, 0), (0, 3)), ((2, 0),)])
def test_an_index_of_any_layers(tiny, tokens, heads):
    context = IndexContext(tiny, make("retrieval", window=64), RetrievalHeads(heads))
    context.extend(tokens[:600])
    mass = context.mass(tokens[:9], RetrievalHeads(heads))
    torch.testing.assert_close(mass.sum(1), torch.ones(len(heads)))
    other = IndexContext(tiny, make("retrieval", window=64), RetrievalHeads(heads))
    other.restore(context.tokens, {name: tensor.clone() for name, tensor in context.tensors().items()})
    assert torch.equal(other.mass(tokens[:9], RetrievalHeads(heads)), mass)


@pytest.mark.parametrize("spec", SPECS)
def test_restored_contexts_go_on_alike(tiny, tokens, spec):
    context, other = new(tiny, spec), new(tiny, spec)
    context.extend(tokens[:700])
    other.restore(tokens[:700], {name: tensor.clone() for name, tensor in context.tensors().items()})
    for one in (context, other):
        one.extend(tokens[700:750])
    question = tiny.tokens("Which street?")
    assert torch.equal(context.mass(question, HEADS), other.mass(question, HEADS))
    assert context.tokens == other.tokens
    if isinstance(context, KVContext):
        assert torch.equal(context.step(question), other.step(question))


@pytest.mark.parametrize("spec", SPECS)
def test_tensors_that_do_not_fit_are_refused(tiny, tokens, spec):
    context = new(tiny, spec)
    context.extend(tokens[:300])
    kept = context.tensors()
    for name in kept:
        if name.startswith("0.") or name == "index":
            with pytest.raises(SessionCorruptError):
                new(tiny, spec).restore(tokens[:300], {other: kept[other] for other in kept if other != name})
    with pytest.raises(SessionCorruptError):
        new(tiny, spec).restore(tokens[:100], kept)


@pytest.mark.parametrize("window,length", [(1, 660), (10, 660), (63, 703)])
def test_mass_of_a_window_shorter_than_a_page(tiny, tokens, window, length):
    context = new(tiny, f"streaming:window={window},sinks=4")
    context.extend(tokens[:length])
    mass = context.mass(tiny.tokens("Which street?"), HEADS)
    assert mass.shape == (3, length)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model that was trained on 256 positions."""
    folder = save_model(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=256)
    return load(str(folder), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("spec", ["quest", "retrieval", "retrieval:sinks=20,window=1000", "retrieval:window=100"])
def test_documents_are_read_at_positions_that_were_trained(short, spec):
    reads = new(short, spec).reads_by(300)
    assert reads.window + reads.sinks == (104 if spec.endswith("=100") else 256)


def test_beyond_the_trained_length_documents_are_read_by_sinks_and_a_window_within_it(short, tokens):
    context = new(short, "quest:budget=64,window=32")
    expected, longer = (
        KVContext(short, context.mechanism, make("streaming", window=window, sinks=4)) for window in (252, 256)
    )
    for each in (context, expected, longer):
        each.extend(tokens[:900])
    keys = [each.layers[-1].keys(890, 900) for each in (context, expected, longer)]
    torch.testing.assert_close(keys[0], keys[1], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(keys[0], keys[2], atol=2e-5, rtol=1e-4)
