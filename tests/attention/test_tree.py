"""The tree against its own equations, and the identities that it must satisfy."""

import pytest
import torch
from plain_tree import plain_tree

from longspan import attend
from longspan.attention import make
from longspan.attention.base import Hints
from longspan.errors import UsageError
from longspan.kv.base import SUMMARIES, TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}
OPTIONS = [
    dict(beam=3, leaves=4, window=30),
    dict(beam=2, leaves=3, window=70, open_by="mean", sinks=0),
    dict(beam=3, leaves=5, window=1, who="layer", sinks=70),
    dict(beam=2, leaves=3, window=64, who="layer", open_by="mean", coarse=False),
    dict(beam=2, leaves=4, window=100, who="model"),
]
CHOSEN = (9, 2, 17, 3, 1)


def inputs(seed, queries, keys, group, dtype=torch.float64, kv_heads=2, dim=8, value_dim=8, batch=1):
    gen = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, kv_heads * group, queries, dim, generator=gen, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, keys, dim, generator=gen, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, keys, value_dim, generator=gen, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def hinted(options):
    return dict(chosen_pages=CHOSEN) if options.get("who") == "model" else {}


def plain_chosen(options):
    return CHOSEN if options.get("who") == "model" else ()


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("queries,keys,group", [(1, 1, 1), (33, 97, 1), (5, 1301, 3), (1, 2777, 1), (1, 17_600, 1)])
def test_follows_its_equations(options, queries, keys, group):
    q, k, v = inputs(1, queries, keys, group, batch=2 if queries == 5 else 1, value_dim=8 if group == 1 else 12)
    truth = plain_tree(q, k, v, **options, chosen=plain_chosen(options))
    torch.testing.assert_close(attend(q, k, v, "tree", **hinted(options), **options), truth, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float_type_and_sixteen_heads_a_group(options, dtype):
    q, k, v = inputs(2, 3, 1203, 16, dtype, kv_heads=1)
    out = attend(q, k, v, "tree", **hinted(options), **options)
    assert out.dtype == dtype
    truth = plain_tree(q, k, v, **options, chosen=plain_chosen(options), dtype=dtype)
    # A choice between two nearly equal pages may fall either way after rounding; nearly all rows must agree.
    close = torch.isclose(out.double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]).all(-1)
    assert close.float().mean() > 0.97


@pytest.mark.parametrize("options", OPTIONS[:3], ids=range(3))
@pytest.mark.parametrize("trained", [5000, 1300, 100])
def test_positions_are_true_up_to_the_trained_length_and_compact_beyond(options, trained):
    q, k, v = inputs(3, 2, 1301, 1)
    frequencies = [1.0, 0.3, 0.05, 0.002]
    kv = TensorKV(k, v, Rotary(torch.tensor(frequencies, dtype=torch.float64), trained))
    out = make("tree", **options).attend(q, kv)
    truth = plain_tree(q, k, v, **options, frequencies=frequencies, trained=trained)
    torch.testing.assert_close(out, truth, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("queries,keys,group", [(1, 777, 3), (63, 190, 1), (17, 5000, 16), (1, 17_000, 1)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_opening_everything_equals_dense(queries, keys, group, dtype):
    q, k, v = inputs(4, queries, keys, group, dtype)
    torch.testing.assert_close(
        attend(q, k, v, "tree", beam=300, leaves=300, window=20).double(),
        attend(q, k, v, "dense").double(),
        atol=TOLERANCE[dtype],
        rtol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_lies_in_the_future_never_changes_an_output(options, dtype):
    keys, queries = 1201, 150
    q, k, v = inputs(5, queries, keys, 3, dtype)
    clean = attend(q, k, v, "tree", **hinted(options), **options)
    for t in (1051, 1087, 1151, 1152, 1199):
        poisoned = [torch.where(torch.arange(keys).unsqueeze(1) > t, torch.nan, x) for x in (k, v)]
        out = attend(q, *poisoned, "tree", **hinted(options), **options)
        past = t + 1 - (keys - queries)
        torch.testing.assert_close(out[:, :, :past], clean[:, :, :past], atol=TOLERANCE[dtype], rtol=0)
        assert out[:, :, past:].isnan().all()


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unread_pages_reach_an_output_through_their_summaries_alone(options, dtype):
    q, k, v = inputs(6, 1, 3000, 3, dtype)
    mechanism, hints = make("tree", **options), Hints(chosen_pages=CHOSEN)
    clean = mechanism.attend(q, TensorKV(k, v), hints=hints)
    read = set()

    class Watched(TensorKV):
        def gather(self, index, *, rotated):
            read.update(index.flatten().tolist())
            return super().gather(index, rotated=False)  # no positions, so the same

        def keys(self, start, stop):
            read.update(range(start, stop))
            return super().keys(start, stop)

    kv = Watched(k, v)
    for what in SUMMARIES:
        for block in (64, 1024):
            kv.summary(what, block)
    read.clear()
    mechanism.attend(q, kv, hints=hints)
    assert 0 < len(read) < 2000
    unread = torch.tensor(sorted(set(range(3000)) - read))
    kv._k, kv._v = k.index_fill(2, unread, torch.nan), v.index_fill(2, unread, torch.nan)
    out = mechanism.attend(q, kv, hints=hints)
    torch.testing.assert_close(out, clean, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("chunks", [(1199, 1), (407, 64, 1)])
def test_prefill_in_chunks_and_decode_equal_prefill_at_once(options, chunks):
    q, k, v = inputs(7, 1200, 1200, 3)
    mechanism, hints = make("tree", **options), Hints(chosen_pages=CHOSEN)
    rotary = Rotary(torch.tensor([0.5, 0.01]), 1150)
    whole = mechanism.attend(q, TensorKV(k, v, rotary), hints=hints)
    done, parts = 0, []
    while done < 1200:
        stop = min(done + chunks[len(parts) % len(chunks)], 1200)
        kv = TensorKV(k[:, :, :stop], v[:, :, :stop], rotary)
        parts.append(mechanism.attend(q[:, :, done:stop], kv, hints=hints))
        done = stop
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_every_single_decode_step_equals_its_row_of_prefill(options):
    q, k, v = inputs(8, 1217, 1217, 1)
    mechanism, hints = make("tree", **options), Hints(chosen_pages=CHOSEN)
    whole = mechanism.attend(q, TensorKV(k, v), hints=hints)
    for t in (0, 63, 64, 127, 128, 1023, 1024, 1087, 1088, 1151, 1152, 1215, 1216):
        out = mechanism.attend(q[:, :, t : t + 1], TensorKV(k[:, :, : t + 1], v[:, :, : t + 1]), hints=hints)
        torch.testing.assert_close(out, whole[:, :, t : t + 1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("trained", [None, 9000, 1000])
def test_a_page_table_in_any_order_gives_the_same(trained):
    q, k, v = inputs(9, 63, 2900, 3)
    rotary = None if trained is None else Rotary(torch.tensor([0.5, 0.01]), trained)
    pool = PagePool(2, 8, 8, torch.float64, torch.device("cpu"))
    pool.reserve(60)
    pool._free = torch.randperm(60, generator=torch.Generator().manual_seed(8)).tolist()
    kv = PagedKV(pool, rotary)
    for start in range(0, 2900, 170):
        kv.append(k[:, :, start : start + 170], v[:, :, start : start + 170])
    mechanism = make("tree", **OPTIONS[0])
    torch.testing.assert_close(
        mechanism.attend(q, kv), mechanism.attend(q, TensorKV(k, v, rotary)), atol=1e-12, rtol=1e-12
    )


class Partly(TensorKV):
    """Some pages can't be read exactly: their keys and values are NaN, their summaries are as they were."""

    def __init__(self, k, v, lost):
        super().__init__(k, v)
        for what in SUMMARIES:
            for block in (64, 1024):
                self.summary(what, block)
        gone = torch.tensor([page * 64 + i for page in lost for i in range(64)])
        self._k, self._v = k.index_fill(2, gone, torch.nan), v.index_fill(2, gone, torch.nan)
        self._readable = torch.ones(-(-k.shape[2] // 64), dtype=torch.bool)
        self._readable[list(lost)] = False

    def readable(self):
        return self._readable


@pytest.mark.parametrize("options", [*OPTIONS[:2], dict(beam=16, leaves=64, window=64), OPTIONS[4]], ids=range(4))
def test_pages_that_cannot_be_read_stand_for_themselves(options):
    q, k, v = inputs(10, 1, 2777, 3)
    lost = (1, 2, 3, 9, 16, 20, 31, 33)
    out = make("tree", **options).attend(q, Partly(k, v, lost), hints=Hints(chosen_pages=CHOSEN))
    truth = plain_tree(q, k, v, **options, unreadable=lost, chosen=plain_chosen(options))
    torch.testing.assert_close(out, truth, atol=1e-10, rtol=1e-10)


def structured(seed, keys, group=3, heads=2, dim=32):
    """Topics of hundreds of tokens, sentences of tens, and noise; each query looks for one token that there is."""
    gen = torch.Generator().manual_seed(seed)

    def steps(mean):
        which = (torch.rand(keys, generator=gen) < 1 / mean).cumsum(0)
        return torch.randn(heads, int(which[-1]) + 1, dim, generator=gen)[:, which]

    k, v = ((steps(700) + steps(40) + torch.randn(heads, keys, dim, generator=gen)) / 3**0.5 for _ in range(2))
    at = torch.randint(keys, (heads * group, 1), generator=gen)
    wanted = k.repeat_interleave(group, 0).gather(1, at.unsqueeze(-1).expand(-1, -1, dim))
    q = 2 * (wanted + 0.7 * torch.randn(wanted.shape, generator=gen))
    return q[None], k[None], v[None]


@pytest.mark.parametrize("open_by", ["mean", "bounds"])
def test_a_wider_beam_errs_less_on_average(open_by):
    errors = torch.zeros(4)
    left_out = 0.0
    for seed in range(6):
        q, k, v = structured(seed, 20_000)
        truth = attend(q, k, v, "dense")
        for i, beam in enumerate((1, 4, 16, 64)):
            out = attend(q, k, v, "tree", beam=beam, leaves=16, open_by=open_by)
            errors[i] += (out - truth).norm() / truth.norm()
        left_out += (attend(q, k, v, "tree", beam=64, open_by=open_by, coarse=False) - truth).norm() / truth.norm()
    assert (errors.diff() < 0).all(), errors
    assert errors[3] < 0.7 * errors[0]
    assert left_out > errors[3]


@pytest.mark.parametrize(
    "options", [dict(beam=0), dict(leaves=1, sinks=65), dict(open_by="x"), dict(who="me"), dict(window=0)]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        make("tree", **options)


def test_dense_layers_read_everything_up_to_the_trained_length():
    q, k, v = inputs(12, 1, 2000, 3)
    mechanism = make("tree", dense_layers=2, **OPTIONS[0])
    dense, tree = attend(q, k, v, "dense"), attend(q, k, v, "tree", **OPTIONS[0])
    for layer, truth in ((1, dense), (2, tree)):
        torch.testing.assert_close(mechanism.attend(q, TensorKV(k, v), hints=Hints(layer=layer)), truth)
    beyond = TensorKV(k, v, Rotary(torch.tensor([0.5]), 1000))
    torch.testing.assert_close(
        mechanism.attend(q, beyond, hints=Hints(layer=0)), make("tree", **OPTIONS[0]).attend(q, beyond)
    )
