"""How much attention each token gets: weights that sum values to the mechanism's own output."""

import pytest
import torch
from test_evicting import layer_for, read
from test_evicting import rotary as small_rotary

from longspan.attention import Hints, make, masses, mechanisms
from longspan.kv.base import TensorKV
from longspan.kv.kept import KeptKV
from longspan.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
SPECS = {
    "dense": {},
    "xattention": {},
    "streaming": dict(window=50, sinks=4),
    "retrieval": dict(window=33, sinks=3, read="place"),
    "sparse": dict(window=40, sinks=3),
    "quest": dict(budget=128, window=20, sinks=3, dense_layers=0),
    "sparq": dict(budget=128, window=20, sinks=3, dense_layers=0),
    "tree": dict(beam=2, leaves=2, window=40),
    "superlinear": dict(window=70, spans=2, gate="joint"),
}
CASES = [*SPECS.items(), ("superlinear", dict(window=70, spans=2, gate="routed", sinks=3))]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
EVICTING = [name for name, cls in mechanisms().items() if cls.evicts]
HEADS = (4, 0, 5)
SCALE = 0.3


def inputs(queries, keys, dtype=torch.float32):
    gen = torch.Generator().manual_seed(queries + keys)
    q, k, v = (torch.randn(1, heads, n, 16, generator=gen) for heads, n in ((6, queries), (2, keys), (2, keys)))
    return 2 * q.to(dtype), k.to(dtype), v.to(dtype)


def summed(mass, v, group=3):
    """What the heads' outputs must sum to over the queries."""
    return torch.stack([row @ v[0, head // group].float() for row, head in zip(mass, HEADS, strict=True)])


def test_every_mechanism_that_reads_tokens_is_asked():
    unasked = {name for name, cls in mechanisms().items() if not cls.evicts} - set(SPECS)
    assert unasked == {"infini"}  # what it reads in its matrix belongs to no token


@pytest.mark.parametrize("name,options", CASES, ids=IDS)
@pytest.mark.parametrize("queries,keys,trained", [(1, 1, None), (1, 333, None), (9, 300, 296), (5, 333, 128)])
def test_values_summed_by_the_mass_are_what_is_read(name, options, queries, keys, trained):
    q, k, v = inputs(queries, keys)
    layer = TensorKV(k, v, Rotary(1.0 / 50 ** (torch.arange(8) / 8), trained))
    mechanism, hints = make(name, **options), Hints(chosen_pages=(1, 3), layer=2)
    with torch.inference_mode():
        mass = masses.reads(mechanism, q, layer, HEADS, scale=SCALE, hints=hints)
        reader = make("dense") if mechanism.prefill_only else mechanism  # these queries are an answer's, not a text's
        out = reader.attend(q, layer, scale=SCALE, hints=hints)[0, list(HEADS)].sum(1)
    torch.testing.assert_close(mass.sum(1), torch.full((3,), float(queries)), atol=1e-4, rtol=0)
    torch.testing.assert_close(summed(mass, v), out, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name,options", CASES[2:], ids=IDS[2:])
def test_what_is_not_read_has_no_mass_whatever_it_holds(name, options):
    q, k, v = inputs(3, 300)
    hints = Hints(chosen_pages=(1,), layer=2)
    narrow = {"tree": dict(coarse=False), "superlinear": dict(backward=1.0, forward=0.5)}
    mechanism = make(name, **options, **narrow.get(name, {}))
    mass = masses.reads(mechanism, q, TensorKV(k, v), HEADS, scale=SCALE, hints=hints)
    unread = torch.stack([mass[torch.tensor([h // 3 == kv for h in HEADS])].sum(0) == 0 for kv in range(2)])
    # Only for keys that no head of their KV head read; the other heads of a group may read others.
    everyone = masses.reads(mechanism, q, TensorKV(k, v), range(6), scale=SCALE, hints=hints)
    unread &= torch.stack([everyone[:3].sum(0) == 0, everyone[3:].sum(0) == 0])
    assert unread.any()
    poisoned = v.masked_fill(unread.unsqueeze(-1), float("nan"))
    again = masses.reads(mechanism, q, TensorKV(k, poisoned), HEADS, scale=SCALE, hints=hints)
    torch.testing.assert_close(again, mass, atol=0, rtol=0)
    if name in ("streaming", "retrieval", "sparse"):  # others look at every key to choose
        poisoned = k.masked_fill(unread.unsqueeze(-1), float("nan"))
        again = masses.reads(mechanism, q, TensorKV(poisoned, v), HEADS, scale=SCALE, hints=hints)
        torch.testing.assert_close(again, mass, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", ["same", "adaptive"])
@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("trained", [None, 50])
def test_of_what_was_evicted_nothing_was_read(name, heads, trained):
    gen = torch.Generator().manual_seed(3)
    q = 1.5 * torch.randn(1, 6, 90, 8, generator=gen)
    k, v = (torch.randn(1, 2, 90, 8, generator=gen) for _ in range(2))
    mechanism, layer = layer_for(name, k, dict(budget=24, window=3, sinks=2, heads=heads), small_rotary(trained))
    read(mechanism, layer, q, k, v, 0, 80)
    mechanism.evict(layer, 24)
    outs = []
    for i in range(80, 90):
        layer.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        how = {"learn": False, "decode": True}
        outs.append(mechanism.attend_kept(q[:, :, i : i + 1], layer, scale=SCALE, **how)[0, list(HEADS), 0])
    with torch.inference_mode():
        mass = masses.reads_of_rows(mechanism, q[:, :, 80:], layer, HEADS, scale=SCALE)
    assert mass.shape == (3, 90) and int((mass[0] > 0).sum()) <= int(layer.held)
    torch.testing.assert_close(summed(mass, v), torch.stack(outs).sum(0), atol=1e-4, rtol=1e-4)
    held = [set(layer.head_keys(head // 3, 90)[1].tolist()) for head in HEADS]
    for row, tokens in zip(mass, held, strict=True):
        assert set(row.nonzero().flatten().tolist()) <= tokens
    assert isinstance(layer, KeptKV)
