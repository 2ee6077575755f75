"""Infini-attention against its paper's equations, its identities, its memory, and that it can be trained."""

import plain_infini as plain
import pytest
import torch
from torch import nn

from longspan import attend
from longspan.attention import Hints, Shape, make
from longspan.attention.infini import fold, read, sigma
from longspan.errors import UsageError
from longspan.kv.base import PAGE, TensorKV
from longspan.kv.memory import LayerMemory
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
RULES = ["delta", "linear"]


def inputs(seed, queries, keys, group, dtype=torch.float64, batch=1, kv_heads=2, dim=16, value_dim=16):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * group, queries, dim, generator=gen, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, dim, generator=gen, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, value_dim, generator=gen, dtype=torch.float64)
    gates = torch.randn(kv_heads * group, generator=gen, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype), gates.to(dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("queries,keys", [(1, 1), (1, 301), (63, 64), (63, 333), (97, 97)])
@pytest.mark.parametrize("group", [1, 3])
def test_follows_its_equations(rule, queries, keys, group):
    q, k, v, gates = inputs(1, queries, keys, group, batch=2 if keys == 64 else 1, value_dim=16 if group == 1 else 24)
    out = attend(q, k, v, "infini", segment=37, rule=rule, gates=gates)
    torch.testing.assert_close(out, plain.infini(q, k, v, 37, rule, gates), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_and_sixteen_heads_a_group(rule, dtype):
    q, k, v, gates = inputs(2, 33, 150, 16, dtype, kv_heads=1)
    out = attend(q, k, v, "infini", segment=40, rule=rule, gates=gates)
    assert out.dtype == dtype
    truth = plain.infini(q, k, v, 40, rule, gates)
    torch.testing.assert_close(out.double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [8, 20])
def test_rows_that_attend_apart_are_rows_that_attend_together(monkeypatch, rows):
    from longspan.attention import infini

    q, k, v, gates = inputs(3, 150, 150, 3)
    whole = attend(q, k, v, "infini", segment=64, gates=gates)
    monkeypatch.setattr(infini, "_ROWS", rows)
    torch.testing.assert_close(attend(q, k, v, "infini", segment=64, gates=gates), whole, atol=1e-12, rtol=1e-12)


def test_where_no_gates_are_given_every_head_has_the_options():
    q, k, v, _ = inputs(4, 20, 90, 3)
    for beta in (0.0, -1.5, 40.0):
        expected = plain.infini(q, k, v, 30, "delta", [beta] * 6)
        torch.testing.assert_close(attend(q, k, v, "infini", segment=30, beta=beta), expected)
    # What gates say comes first.
    gates = torch.full((6,), 2.0)
    torch.testing.assert_close(
        attend(q, k, v, "infini", segment=30, beta=-7.0, gates=gates), attend(q, k, v, "infini", segment=30, beta=2.0)
    )


def test_a_closed_gate_reads_the_segment_alone_and_an_open_one_the_memory_alone():
    q, k, v, _ = inputs(5, 1, 100, 1)
    gates = torch.tensor([-1e4, 1e4])
    out = attend(q, k, v, "infini", segment=32, gates=gates)
    local = attend(q, k[:, :, 96:], v[:, :, 96:], "dense")
    torch.testing.assert_close(out[:, 0], local[:, 0])
    state = None
    for begin in (0, 32, 64):
        state = fold(state, k[:, :, begin : begin + 32], v[:, :, begin : begin + 32], delta=True)
    torch.testing.assert_close(out[:, 1], read(q, state)[:, 1])
    assert not torch.allclose(out[:, 1], local[:, 1], atol=1e-2)


@pytest.mark.parametrize("queries,keys,group", [(1, 777, 3), (63, 190, 1), (129, 129, 16)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_context_of_one_segment_is_dense_whatever_the_gates(queries, keys, group, dtype):
    q, k, v, gates = inputs(6, queries, keys, group, dtype)
    for segment in (keys, 4000):
        torch.testing.assert_close(
            attend(q, k, v, "infini", segment=segment, gates=gates).double(),
            attend(q, k, v, "dense").double(),
            atol=TOLERANCE[dtype],
            rtol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunks", [(1,), (7, 64, 1, 130), (50,), (299, 1)])
def test_prefill_in_chunks_and_decode_equal_prefill_at_once(rule, dtype, chunks):
    keys = 300
    q, k, v, gates = inputs(7, keys, keys, 3, dtype)
    whole = attend(q, k, v, "infini", segment=50, rule=rule, gates=gates)
    done, parts, i = 0, [], 0
    while done < keys:
        stop = min(keys, done + chunks[i % len(chunks)])
        given = (q[:, :, done:stop], k[:, :, :stop], v[:, :, :stop])
        parts.append(attend(*given, "infini", segment=50, rule=rule, gates=gates))
        done, i = stop, i + 1
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_lies_in_the_future_never_changes_an_output(rule, dtype):
    q, k, v, gates = inputs(8, 200, 200, 3, dtype)
    clean = attend(q, k, v, "infini", segment=64, rule=rule, gates=gates)
    for t in (0, 1, 62, 63, 64, 127, 150, 198):
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, :, t + 1 :] = float("nan")
        poisoned_v[:, :, t + 1 :] = float("nan")
        out = attend(q, poisoned_k, poisoned_v, "infini", segment=64, rule=rule, gates=gates)
        torch.testing.assert_close(out[:, :, : t + 1], clean[:, :, : t + 1], atol=TOLERANCE[dtype], rtol=0)
        assert out[:, :, t + 1 :].isnan().all(), "all later queries read a poisoned key, in their segment or as memory"


@pytest.mark.parametrize("length", [130, 301])
def test_positions_enter_the_segment_and_not_the_memory(length):
    q, k, v, gates = inputs(9, 40, length, 3)
    rotary = Rotary(1.0 / 100.0 ** (torch.arange(6) / 6), trained_length=128)
    out = make("infini", segment=48).attend(q, TensorKV(k, v, rotary), hints=Hints(gates=gates))
    torch.testing.assert_close(out, plain.infini(q, k, v, 48, "delta", gates, rotary.inv_freq))
    # Far beyond the trained length a segment reads as at the beginning: only distances count.
    before = [torch.cat([part[:, :, :96].repeat(1, 1, 50, 1), part], 2) for part in (k, v)]
    far = TensorKV(*before, rotary)
    mechanism = make("infini", segment=48, beta=-1e4)
    torch.testing.assert_close(mechanism.attend(q, far), mechanism.attend(q, TensorKV(k, v, rotary)))


def test_keys_far_below_zero_are_remembered():
    # ELU(x) + 1 added up in float32 has lost these keys: it is 0, or a multiple of 2^-24.
    q, k, v, _ = inputs(10, 9, 90, 2, torch.float32)
    q, k, gates = q - 25, k - 25, torch.full((4,), 1e4)
    assert (torch.nn.functional.elu(k) + 1 == 0).float().mean() > 0.99
    out = attend(q, k, v, "infini", segment=20, gates=gates)
    torch.testing.assert_close(out.double(), plain.infini(q, k, v, 20, "delta", gates), atol=2e-4, rtol=2e-4)


def test_a_query_that_finds_nothing_reads_nothing():
    q, k, v, gates = inputs(11, 1, 50, 2, torch.float32)
    out = attend(q - 300, k, v, "infini", segment=20, gates=gates)
    local = attend(q - 300, k[:, :, 40:], v[:, :, 40:], "dense")
    torch.testing.assert_close(out, (1 - torch.sigmoid(gates)).view(1, -1, 1, 1) * local)


def test_delta_writes_only_what_the_memory_does_not_say_already():
    _, k, v, _ = inputs(12, 1, 64, 1)
    matrix, total = fold(None, k, v, delta=True)
    again = fold((matrix, total), k, read(k, (matrix, total)), delta=True)
    torch.testing.assert_close(again[0], matrix)
    torch.testing.assert_close(again[1], 2 * total)
    assert not torch.allclose(fold((matrix, total), k, v, delta=False)[0], matrix)


# --- in pages, with a memory ----------------------------------------------------------------------------------


def paged(mechanism, shape, dtype=torch.float64):
    pool = PagePool(shape.kv_heads, shape.head_dim, shape.value_dim, dtype, torch.device("cpu"))
    kv = PagedKV(pool)
    kv.memory = LayerMemory(mechanism, mechanism.memory(shape), dtype, torch.device("cpu"), kv.budget)
    return kv


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("segment", [64, 100, 30])
def test_pages_that_were_folded_are_dropped_and_never_read_again(rule, segment):
    q, k, v, gates = inputs(13, 500, 500, 3, value_dim=24)
    mechanism = make("infini", segment=segment, rule=rule)
    truth = attend(q, k, v, mechanism, gates=gates)
    kv, parts = paged(mechanism, Shape(6, 2, 16, 24)), []
    for start in [*range(0, 490, 35), *range(490, 500)]:
        stop = 500 if start == 499 else start + (35 if start < 490 else 1)
        kv.append(k[:, :, start:stop], v[:, :, start:stop])
        parts.append(mechanism.attend(q[:, :, start:stop], kv, hints=Hints(gates=gates)))
        kv.commit()
        kv.drop(*mechanism.dropped(stop))
        kv.pool.keys[:, kv.pool._free] = float("nan")
        kv.pool.values[:, kv.pool._free] = float("nan")
        assert kv.pages_held <= segment // PAGE + 2
    torch.testing.assert_close(torch.cat(parts, 2), truth, atol=1e-10, rtol=1e-10)


def test_a_page_table_in_any_order_gives_the_same():
    q, k, v, _ = inputs(14, 63, 900, 3)
    mechanism = make("infini", segment=130)
    pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"))
    pool.reserve(25)
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    pool._free = torch.randperm(25, generator=torch.Generator().manual_seed(8)).tolist()
    kv = PagedKV(pool)
    for start in range(0, 900, 170):
        kv.append(k[:, :, start : start + 170], v[:, :, start : start + 170])
    assert kv.table != sorted(kv.table)
    torch.testing.assert_close(mechanism.attend(q, kv), attend(q, k, v, mechanism), atol=1e-12, rtol=1e-12)


def test_a_memory_of_other_options_is_not_read():
    q, k, v, _ = inputs(15, 1, 200, 1)
    one, other = make("infini", segment=64), make("infini", segment=64, rule="linear")
    kv = paged(one, Shape(2, 2, 16, 16))
    kv.append(k, v)
    one.attend(q, kv)
    assert kv.memory.length == 192
    torch.testing.assert_close(other.attend(q, kv), attend(q, k, v, other))
    assert kv.memory.length == 192 and kv.memory.owner == one
    # A tile of queries that begins before what is remembered folds from the first key on.
    torch.testing.assert_close(one.attend(k, kv), attend(k, k, v, one))


def test_memory_is_constant_from_a_thousand_to_a_million_tokens():
    mechanism, shape = make("infini"), Shape(2, 1, 4, 4)
    kv = paged(mechanism, shape, torch.float32)
    k, v = torch.randn(2, 1, 1, 65536, 4, generator=torch.Generator().manual_seed(16))
    held, reserved = [], []
    for i in range(0, 1 << 20, 1024):
        at = i % 65536
        kv.append(k[:, :, at : at + 1024], v[:, :, at : at + 1024])
        out = mechanism.attend(k[:, :, at : at + 2].repeat(1, 2, 1, 1), kv)
        kv.commit()
        kv.drop(*mechanism.dropped(kv.length))
        held.append(kv.nbytes), reserved.append(kv.pool.nbytes)
    assert kv.length == kv.memory.length == 1 << 20 and out.isfinite().all()
    half, state = 1024 * 2 * 4 * 4, 4 * (4 * 4 + 4)
    # Half a segment and the memory of those before it, or that memory alone.
    assert held == [half, state, *[half + state, state] * 511]
    assert set(reserved[1:]) == {2 * half}
    assert mechanism.cost(1 << 20, shape).kept_bytes == mechanism.cost(4096, shape).kept_bytes


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("queries", [1, 4, 11])
def test_gradients_flow_through_queries_keys_values_and_gates(rule, queries):
    q, k, v, gates = (x.requires_grad_() for x in inputs(17, queries, 11, 2, dim=3, value_dim=2))
    assert torch.autograd.gradcheck(
        lambda q, k, v, gates: attend(q, k, v, "infini", segment=4, rule=rule, gates=gates), (q, k, v, gates)
    )


def test_a_key_of_zeros_has_the_gradient_of_elu():
    x = torch.zeros(3, requires_grad=True)
    sigma(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


class Recall(nn.Module):
    """One layer that is shown eight keys with their values, then other things, and is asked for one key's value."""

    PAIRS, HEADS, WIDTH, SEGMENT = 8, 2, 32, 8

    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Embedding(self.PAIRS, self.WIDTH), nn.Embedding(self.PAIRS + 1, self.WIDTH)
        self.other = nn.Parameter(torch.randn(self.WIDTH))
        self.q, self.k, self.v = (nn.Linear(self.WIDTH, self.WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(self.WIDTH, self.PAIRS)
        self.gates = nn.Parameter(torch.zeros(self.HEADS))

    def forward(self, values, asked, rule):
        shown = self.key.weight + self.value(values)
        question = (self.key(asked) + self.value.weight[self.PAIRS]).unsqueeze(1)
        x = torch.cat([shown, self.other.expand(len(values), 13, -1), question], 1)
        q, k, v = (part(x).unflatten(2, (self.HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = attend(q[:, :, -1:], k, v, "infini", segment=self.SEGMENT, rule=rule, gates=self.gates)
        return self.out(out.transpose(1, 2).flatten(1))


@pytest.mark.parametrize("rule,closed", [("delta", False), ("linear", False), ("delta", True)])
def test_recall_beyond_a_segment_is_learned(rule, closed):
    """The pairs lie two segments back: only the memory can hold them, and only a trained one is understood."""
    gen = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recall()
    if closed:
        model.gates.requires_grad_(False).fill_(-1e4)

    def batch(count):
        values = torch.stack([torch.randperm(Recall.PAIRS, generator=gen) for _ in range(count)])
        asked = torch.randint(Recall.PAIRS, (count,), generator=gen)
        return values, asked, values[torch.arange(count), asked]

    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(160):
        values, asked, wanted = batch(64)
        loss = nn.functional.cross_entropy(model(values, asked, rule), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, asked, wanted = batch(512)
    right = (model(values, asked, rule).argmax(1) == wanted).float().mean()
    if closed:
        assert right < 0.25, "one of eight by chance"
    else:
        assert right > 0.95 and (model.gates > 0).all()


# --- options and costs ----------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    q, k, v, gates = inputs(18, 2, 9, 2)
    for bad in (gates[:3], gates.unsqueeze(0)):
        with pytest.raises(UsageError, match=r"gates must be \[4\]"):
            attend(q, k, v, "infini", gates=bad)
    for options, told in (
        ({"segment": 0}, "segment=0"),
        ({"rule": "hebb"}, "delta, linear"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": float("inf")}, "beta=inf"),
    ):
        with pytest.raises(UsageError, match=told):
            make("infini", **options)
    with pytest.raises(UsageError, match="segment"):
        make("infini").within(0, 100)


def test_what_a_decode_step_takes_stops_growing_at_a_segment():
    mechanism, shape = make("infini", segment=1000), Shape(8, 2, 64, 32)
    assert mechanism.cost(1000, shape).decode_bytes == make("dense").cost(1000, shape).decode_bytes
    first, later = mechanism.cost(1001, shape), mechanism.cost(10**7, shape)
    assert (first.decode_flops, first.decode_bytes, first.kept_bytes) == (
        later.decode_flops,
        later.decode_bytes,
        later.kept_bytes,
    )
    state = 4 * 2 * 64 * 33
    assert later.kept_bytes == 1000 * shape.token_bytes + state
    assert later.decode_keys == 1000 and mechanism.within(300, 10**6).cost(10**6, shape).decode_keys == 300
    # Three segments: each is read densely, the second and third read the memory, the first two are folded.
    whole = mechanism.cost(3000, shape).prefill_flops
    assert whole == 3 * make("dense").cost(1000, shape).prefill_flops + 2000 * 64 * 32 * 2 * (8 + 2 * 2)
