"""A hybrid model that reads in chunks is the model that transformers runs at once: states go in and out by name."""

import pytest
import torch

from longspan.attention import make, parse
from longspan.errors import ModelError
from longspan.hf import hybrid
from longspan.hf.attention import Enough
from longspan.hf.loading import load, plain_transformers
from longspan.kv.pages import PagedKV, PagePool
from tiny_hybrid import FAMILIES, save_hybrid

LENGTH = 130


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Loads each family once."""
    known = {}

    def get(family, **config):
        key = (family, *sorted(config.items()))
        if key not in known:
            folder = save_hybrid(tmp_path_factory.mktemp("models") / family, family, **config)
            known[key] = load(str(folder), device="cpu", dtype=torch.float32)
        return known[key]

    return get


@pytest.fixture(scope="module")
def nemotron(loaded):
    return loaded("nemotron_h")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(4, 320, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()


class Reading:
    """Every layer that attends in pages, attended to by a mechanism; the state of the others beside them."""

    def __init__(self, model, mechanism=None):
        sizes, self.state = model.dimensions, {}
        self.mechanism = mechanism or make("dense")
        self.layers = [
            PagedKV(PagePool(sizes.kv_heads, sizes.head_dim, sizes.head_dim, model.dtype, model.device), model.rotary)
            for _ in range(sizes.layers)
        ]

    def attend(self, layer, q, k, v, scale):
        self.layers[layer].append(k, v)
        return self.mechanism.attend(q, self.layers[layer], scale=scale)


def read(model, tokens, chunks, mechanism=None):
    """Logits of every position, and the reader; the last of the chunks is repeated."""
    reader, out, start, chunks = Reading(model, mechanism), [], 0, list(chunks)
    while start < len(tokens):
        chunk = tokens[start : start + (chunks.pop(0) if len(chunks) > 1 else chunks[0])]
        out.append(model.forward(chunk, reader, logits=len(chunk), state=reader.state))
        start += len(chunk)
    return torch.cat(out), reader


def plain_logits(model, tokens):
    with torch.inference_mode():
        return plain_transformers(model)(torch.tensor([tokens])).logits[0].float()


def test_the_families_that_are_served_are_tested():
    assert set(hybrid.SERVED) == set(FAMILIES) - {"jamba"}


@pytest.mark.parametrize("family", hybrid.SERVED)
def test_logits_are_the_models_own_whatever_the_chunks(loaded, tokens, family):
    model = loaded(family)
    expected = plain_logits(model, tokens)
    assert float(expected.std()) > 0.5, "with such weights every reading would look right"
    states = []
    for chunks in ([LENGTH], [64], [1, 2, 3, 1, 50, 7]):
        logits, reader = read(model, tokens, chunks)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        states.append(reader.state)
    torch.testing.assert_close(read(model, tokens[:20], [1])[0], expected[:20], atol=1e-4, rtol=1e-4)
    for state in states:
        assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == model.state_spec
        torch.testing.assert_close(state, states[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", hybrid.SERVED)
def test_a_lost_state_would_be_seen(loaded, tokens, family):
    model = loaded(family)
    expected = plain_logits(model, tokens)[64:]
    for part in ("recurrent", "conv"):
        reader = Reading(model)
        model.forward(tokens[:64], reader, state=reader.state)
        lost = {name: torch.zeros_like(t) if part in name else t for name, t in reader.state.items()}
        if any(part in name for name in reader.state):
            logits = model.forward(tokens[64:], reader, logits=LENGTH - 64, state=lost)
            assert float((logits - expected).abs().max()) > 2e-3


@pytest.mark.parametrize("spec", ["streaming:window=4096", "superlinear:window=4096", "quest", "sparse:window=4096"])
@pytest.mark.parametrize("family", ["nemotron_h", "bamba"])
def test_a_mechanism_that_reads_everything_gives_the_models_logits(loaded, tokens, family, spec):
    model = loaded(family)
    logits, _ = read(model, tokens, [64], parse(spec))
    torch.testing.assert_close(logits, plain_logits(model, tokens), atol=1e-4, rtol=1e-4)


def test_states_handed_in_are_not_written_to(nemotron, tokens):
    reader = Reading(nemotron)
    nemotron.forward(tokens[:30], reader, state=reader.state)
    for chunk in (tokens[30:31], tokens[31:50]):
        before = dict(reader.state)
        copies = {name: tensor.clone() for name, tensor in before.items()}
        nemotron.forward(chunk, reader, state=reader.state)
        for name, tensor in before.items():
            assert torch.equal(tensor, copies[name])
            assert not torch.equal(reader.state[name], tensor), "the new state is another"


def test_layers_are_counted_among_those_that_attend(nemotron, tokens):
    seen = []

    class Watching(Reading):
        def attend(self, layer, q, k, v, scale):
            seen.append((layer, tuple(q.shape), tuple(k.shape)))
            return super().attend(layer, q, k, v, scale)

    assert nemotron.dimensions.layers == 2 and nemotron.config.num_hidden_layers == 6
    reader = Watching(nemotron)
    nemotron.forward(tokens[:9], reader, state=reader.state)
    assert seen == [(0, (1, 4, 9, 8), (1, 2, 9, 8)), (1, (1, 4, 9, 8), (1, 2, 9, 8))]
    assert set(nemotron.state_spec) == {f"{layer}.{kind}.0" for layer in (0, 3) for kind in ("conv", "recurrent")}
    assert set(nemotron.states_before(0)) == {"0.conv.0", "0.recurrent.0"}
    assert nemotron.states_before(1) == nemotron.state_spec


def test_of_a_call_that_ended_early_the_layers_before_have_a_state(nemotron, tokens):
    class Impatient(Reading):
        def attend(self, layer, q, k, v, scale):
            raise Enough

    reader = Impatient(nemotron)
    assert nemotron.forward(tokens[:9], reader, logits=1, state=reader.state) is None
    assert set(reader.state) == set(nemotron.states_before(0))
    whole = Reading(nemotron)
    nemotron.forward(tokens[:9], whole, state=whole.state)
    assert all(torch.equal(reader.state[name], whole.state[name]) for name in reader.state)


def test_a_call_without_a_state_is_our_fault(nemotron, tokens):
    with pytest.raises(AssertionError, match="state"):
        nemotron.forward(tokens[:3], Reading(nemotron))


@pytest.mark.parametrize("family", ["nemotron_h", "qwen3_next", "falcon_h1"])
def test_recurrent_states_are_float32_whatever_the_model_computes_in(loaded, tokens, family):
    model = load(loaded(family).name, device="cpu", dtype=torch.bfloat16)
    _, reader = read(model, tokens[:40], [16])
    assert {t.dtype for name, t in reader.state.items() if "recurrent" in name} == {torch.float32}
    assert {t.dtype for name, t in reader.state.items() if "conv" in name} == {torch.bfloat16}
    assert model.fingerprint == loaded(family).fingerprint


def test_a_fingerprint_follows_what_no_weight_shows(loaded):
    # 2 groups of 8 channels and 4 of 4 have matrices of one shape.
    one, other = loaded("nemotron_h"), loaded("nemotron_h", n_groups=4, ssm_state_size=4)
    shapes = [{name: t.shape for name, t in model.model.state_dict().items()} for model in (one, other)]
    assert shapes[0] == shapes[1]
    assert one.fingerprint != other.fingerprint


# --- time steps -----------------------------------------------------------------------------------------------


def test_small_time_steps_are_kept_in_prefill_too(loaded, tokens):
    model = loaded("nemotron_h")
    assert model.config.time_step_min == 0.001, "transformers takes it for a floor"
    by_one, at_once = read(model, tokens, [1])[0], read(model, tokens, [LENGTH])[0]
    torch.testing.assert_close(by_one, at_once, atol=1e-4, rtol=1e-4)
    mixers = [module for module in model.model.modules() if hasattr(module, "time_step_limit")]
    assert len(mixers) == 2
    try:
        for mixer in mixers:
            mixer.time_step_limit = (0.001, float("inf"))
        floored = read(model, tokens, [LENGTH])[0]
    finally:
        for mixer in mixers:
            mixer.time_step_limit = (0.0, float("inf"))
    assert float((floored - by_one).abs().max()) > 1e-3, "no step here is so small that it would matter"


@pytest.mark.parametrize("limit", [(0.01, float("inf")), (0.0, 0.1)])
@pytest.mark.parametrize("family", ["nemotron_h", "bamba"])
def test_limited_time_steps_are_refused(tmp_path, family, limit):
    folder = save_hybrid(tmp_path / family, family, time_step_limit=limit)
    with pytest.raises(ModelError, match="time steps") as caught:
        load(str(folder), device="cpu", dtype=torch.float32)
    assert "\n" not in str(caught.value)


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_family_that_is_not_served_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"nemotron_h.* not jamba") as caught:
        load(str(save_hybrid(tmp_path / "jamba", "jamba")), device="cpu", dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_layers_that_do_not_continue_from_a_state_are_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid, "SERVED", (*hybrid.SERVED, "jamba"))
    with pytest.raises(ModelError, match="does not continue") as caught:
        load(str(save_hybrid(tmp_path / "jamba", "jamba")), device="cpu", dtype=torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config,reason",
    [
        ({"layers_block_type": ["linear_attention", "mlp", "linear_attention"]}, "recurrent layers alone"),
        ({"layers_block_type": ["full_attention", "moe", "full_attention"]}, "full_attention, moe"),
    ],
)
def test_mixtures_that_are_none_are_refused(tmp_path, config, reason):
    with pytest.raises(ModelError, match=reason) as caught:
        load(str(save_hybrid(tmp_path / "other", "nemotron_h", **config)), device="cpu", dtype=torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["order", "skipped"])
def test_attention_that_does_not_come_to_the_reader_is_found_out(nemotron, damage):
    found = hybrid.layers("other", nemotron.config)
    spoilt = hybrid.Layers({2: 1, 5: 0} if damage == "order" else {**found.ordinals, 4: 2}, recurrent=True)
    other = hybrid.Hybrid("other", nemotron.model, nemotron.config, spoilt)

    @torch.inference_mode()
    def forward(tokens, reader, state):
        cache = other.cache(state)
        ids = torch.tensor([tokens])
        given = {"position_ids": torch.zeros_like(ids), "past_key_values": cache, "use_cache": True}
        nemotron.model.base_model(input_ids=ids, longspan=other.counting(reader), **given)
        state.update(other.states(cache))

    with pytest.raises(ModelError, match="does not continue"):
        other.check(forward, 320)
