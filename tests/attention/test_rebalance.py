"""Pages move between resolutions by the attention they get, and the budget holds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention import make
from longspan.attention.rebalance import PageMass, rebalance
from longspan.errors import UsageError
from longspan.kv.base import PAGE, SUMMARIES, TensorKV
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.pool import Resolution
from longspan.kv.rotary import Rotary


class Resolving(TensorKV):
    """Demoted pages hold NaN until they are promoted from the copy, if one was kept; a page takes one byte."""

    def __init__(self, k, v, rotary=None):
        super().__init__(k.clone(), v.clone(), rotary)
        self._copy = k.clone(), v.clone()
        pages = -(-k.shape[2] // PAGE)
        self.held, self.exact = torch.ones(pages, dtype=torch.bool), {}
        for what in SUMMARIES:
            for block in (PAGE, 16 * PAGE):
                self.summary(what, block)

    def readable(self):
        return self.held

    def ladder(self, formats):
        return [Resolution("summary", 0, 0, 1.0), Resolution("exact", 64, 1, 0.0)]

    def levels(self, ladder):
        best = self.held.long()
        best[list(self.exact)] = 1
        return self.held.long(), best

    def _set(self, pages, k, v):
        for page in pages:
            part = slice(page * PAGE, (page + 1) * PAGE)
            self._k[:, :, part], self._v[:, :, part] = k[:, :, part], v[:, :, part]

    def demote(self, pages, to, *, keep_exact=False):
        assert to == "summary" and all(self.held[page] for page in pages)
        self.held[list(pages)] = False
        self.exact.update((page, page) for page in pages if keep_exact)
        self._set(pages, self._copy[0] * torch.nan, self._copy[1] * torch.nan)

    def promote(self, pages, to=None):
        assert to is None and all(self.exact.pop(page) == page and not self.held[page] for page in pages)
        self.held[list(pages)] = True
        self._set(pages, *self._copy)


def context(pages=100, seed=0, dim=16):
    gen = torch.Generator().manual_seed(seed)
    k = torch.randn(1, 2, pages * PAGE - 10, dim, generator=gen, dtype=torch.float64)
    v = torch.randn(1, 2, pages * PAGE - 10, dim, generator=gen, dtype=torch.float64)
    return k, v


def direction(page_keys):
    """A query for 3 heads a KV head that wants the mean of a page's keys."""
    return (
        4
        * page_keys.mean(2, keepdim=True).repeat_interleave(3, 1)
        / page_keys.mean(2).norm(dim=-1)[..., None, None].mean()
    )


@pytest.mark.parametrize("rotary", [None, 100_000, 500], ids=str)
@pytest.mark.parametrize("options", [{}, dict(beam=2, leaves=3), dict(coarse=False), dict(who="layer")], ids=range(4))
def test_a_decode_step_gives_each_page_the_share_that_it_got(rotary, options):
    k, _ = context()
    gen = torch.Generator().manual_seed(1)
    q = 3 * torch.randn(1, 6, 1, 16, generator=gen, dtype=torch.float64)
    rotary = rotary and Rotary(torch.tensor([0.7, 0.1]), rotary)
    # Values that say which page they are of: outputs are then the shares themselves (the window's are in no page).
    pages = -(-k.shape[2] // PAGE)
    which = torch.nn.functional.one_hot(torch.arange(k.shape[2]) // PAGE, pages).double().expand(1, 2, -1, -1)
    kv = TensorKV(k, which, rotary)
    mechanism = make("tree", window=128, **options)
    kv.mass = PageMass(decay=0.0)
    shares = mechanism.attend(q, kv).mean(1)[0, 0]
    old = int(mechanism.window_starts(k.shape[2] - 1, 1)) // PAGE
    torch.testing.assert_close(kv.mass.pages(pages)[:old], shares[:old], atol=1e-12, rtol=1e-9)
    assert (kv.mass.pages(pages)[old:] == 0).all() and shares[old:].sum() > 0


def test_mass_decays_and_new_pages_are_not_taken_for_cold():
    mass = PageMass(decay=0.5)
    for _ in range(3):
        mass.step(32)
        mass.add(0, torch.tensor([3, 3]), torch.tensor([0.1, 0.3]))
        mass.add(1, torch.tensor([1]), torch.tensor([0.16]))
    assert mass.pages(40)[3] == pytest.approx(0.4)
    assert mass.pages(40)[16:32].tolist() == pytest.approx([0.01] * 16)
    mass.step(33)
    mass.add(0, torch.tensor([32]), torch.tensor([0.2]))
    after = mass.pages(33)
    assert after[32] == pytest.approx(0.2)
    # 0.4 (1/2 + 1/4 + 1/8) over 1 + 1/2 + 1/4 + 1/8
    assert after[3] == pytest.approx(0.4 * 0.875 / 1.875)
    mass.truncate(20)
    assert mass.pages(20)[3] == pytest.approx(float(after[3])) and mass.pages(33)[20:].sum() == 0
    for _ in range(2000):  # long enough for any scale to overflow
        mass.step(33)
        mass.add(0, torch.tensor([7]), torch.tensor([0.25]))
    assert mass.pages(33)[7] == pytest.approx(0.25) and mass.pages(33)[3] < 1e-12


@pytest.mark.parametrize("keep_exact", [True, False])
def test_the_budget_holds_and_sinks_and_window_stay(keep_exact):
    kv = Resolving(*context())
    gen = torch.Generator().manual_seed(2)
    budget = 30
    for step in range(6):
        mass = torch.rand(100, generator=gen)
        before = kv.held.clone()
        moves = rebalance(kv, mass, budget, sinks=70, window=300, keep_exact=keep_exact, moves=5)
        assert kv.held.sum() == budget
        assert kv.held[:2].all() and kv.held[95:].all()
        assert len(moves.promoted) <= 5
        assert before[list(moves.demoted)].all() and not before[list(moves.promoted)].any()
        if step == 0:
            assert len(moves.demoted) == 70
            inner = torch.arange(2, 95)
            kept = inner[kv.held[2:95]]
            assert mass[kept].min() >= mass[inner[~kv.held[2:95]]].max()
        if not keep_exact:
            assert not moves.promoted
    assert keep_exact == bool(moves.promoted)


def test_hysteresis_leaves_pages_of_nearly_equal_mass_alone():
    kv = Resolving(*context())
    mass = torch.full((100,), 0.5)
    rebalance(kv, mass, 30, window=300)
    held = kv.held.clone()
    lost, kept = int((~held).nonzero()[0]), int(held.nonzero()[3])
    mass[lost] = 0.7
    assert rebalance(kv, mass, 30, window=300, hysteresis=0.5).promoted == ()
    mass[lost] = 0.8
    moves = rebalance(kv, mass, 30, window=300, hysteresis=0.5)
    assert moves.promoted == (lost,) and len(moves.demoted) == 1 and kept not in (0, lost)
    # A larger budget brings back what has mass, and nothing else.
    mass[~kv.held] = 0.0
    hot = (~kv.held).nonzero().flatten()[:4].tolist()
    mass[hot] = 0.1
    assert rebalance(kv, mass, 60, window=300).promoted == tuple(hot)


def test_a_budget_that_does_not_hold_sinks_and_window_is_refused():
    kv = Resolving(*context())
    with pytest.raises(UsageError, match="allow 6 or more"):
        rebalance(kv, torch.zeros(100), 5, window=300)
    with pytest.raises(UsageError, match="one entry"):
        rebalance(kv, torch.zeros(99), 50)
    with pytest.raises(UsageError, match="decay"):
        PageMass(1.5)


def paged(k, v, rotary):
    kinds = make("tree").summaries
    pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"), summaries=kinds)
    kv = PagedKV(pool, rotary)
    kv.append(k, v)
    kv.commit()
    return kv


def page_bytes(kv):
    return kv.ladder(())[-1].nbytes


@pytest.mark.parametrize("holds", [Resolving, paged])
@pytest.mark.parametrize("rotary", [None, 100_000, 500], ids=str)
def test_a_page_that_becomes_hot_is_read_exactly_again_within_a_few_steps(rotary, holds):
    k, v = context()
    hot = 40
    k[:, :, hot * PAGE : (hot + 1) * PAGE] += 1.5 * torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(3))
    rotary = rotary and Rotary(torch.tensor([1e-5]), rotary)  # slow enough for the page to stay one direction
    kv = holds(k, v, rotary)
    kv.mass = PageMass(decay=0.9)
    mechanism = make("tree", window=128, beam=4, leaves=4)
    gen = torch.Generator().manual_seed(4)
    elsewhere = direction(k[:, :, 10 * PAGE : 11 * PAGE])
    for _ in range(12):
        noise = torch.randn(1, 6, 1, 16, generator=gen, dtype=torch.float64)
        mechanism.attend(elsewhere - direction(k[:, :, hot * PAGE : (hot + 1) * PAGE]) + 0.3 * noise, kv)
        rebalance(kv, kv.mass.pages(100), 30 * page_bytes(kv), formats=(), window=300)
    assert not kv.readable()[hot] and kv.readable().sum() == 30
    wanted = direction(k[:, :, hot * PAGE : (hot + 1) * PAGE])
    exact = TensorKV(k, v, rotary)
    steps, errors = 0, []
    while steps < 5:
        out = mechanism.attend(wanted, kv)
        errors.append(float((out - make("tree", window=128, beam=100, leaves=100).attend(wanted, exact)).norm()))
        if kv.readable()[hot]:
            break
        rebalance(kv, kv.mass.pages(100), 30 * page_bytes(kv), formats=(), window=300)
        assert kv.readable().sum() == 30
        steps += 1
    assert 1 <= steps <= 3 and kv.readable()[hot]
    assert errors[-1] < 0.5 * errors[0]


def test_several_queries_read_beside_demoted_pages():
    k, v = context()
    q = torch.randn(1, 6, 5, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    kv, mechanism = paged(k, v, None), make("tree", window=128)
    kv.demote(range(5, 60), "summary", keep_exact=True)
    last = mechanism.attend(q[:, :, -1:], kv)
    torch.testing.assert_close(mechanism.attend(q, kv)[:, :, -1:], last, atol=1e-10, rtol=1e-10)


LADDER = ("summary", "int2", "int4", "fp64")


def held(kv):
    return [kv.resolution(page) for page in range(len(kv.table))]


def spent(kv):
    return kv.nbytes - kv.pool.marks.page_bytes * len(kv.table)


def test_hot_pages_are_exact_warm_ones_in_four_bits_cold_ones_in_two_and_the_coldest_a_summary():
    kv = paged(*context(40), None)
    exact = page_bytes(kv)
    mass = torch.logspace(0, -8, 40)
    rebalance(kv, mass, 12 * exact, sinks=1, window=3 * PAGE)
    levels = [LADDER.index(resolution) for resolution in held(kv)]
    assert set(levels) == {0, 1, 2, 3} and levels[-4:] == [3] * 4
    assert levels[:-4] == sorted(levels[:-4], reverse=True)
    assert 11.5 * exact < spent(kv) <= 12 * exact
    k, v = context(40)
    readable = kv.readable()
    assert readable.tolist() == [level > 0 for level in levels]
    # What has become hot comes back to the bit, and no error of the resolutions between is left in it.
    for _ in range(3):
        rebalance(kv, mass.flip(0), 12 * exact, sinks=1, window=3 * PAGE)
    after = [LADDER.index(resolution) for resolution in held(kv)]
    assert after[1:-4] == sorted(after[1:-4]) and spent(kv) <= 12 * exact
    for page, level in enumerate(after):
        if level == 3:
            part = slice(page * PAGE, min((page + 1) * PAGE, kv.length))
            assert torch.equal(kv.keys(part.start, part.stop), k[:, :, part])
            assert torch.equal(kv.values(part.start, part.stop), v[:, :, part])


def error_of(ladder, levels, mass):
    return sum(float(m) * ladder[level].error for m, level in zip(mass, levels, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1.0), min_size=5, max_size=5), st.floats(0, 1))
def test_no_other_choice_within_the_bytes_loses_less(mass, share):
    kv = paged(*context(6), None)
    ladder = kv.ladder(("int2", "int4"))
    assert [resolution.name for resolution in ladder] == list(LADDER)
    sizes = [resolution.nbytes for resolution in ladder]
    budget = int((1 + 5 * share) * sizes[-1])
    rebalance(kv, torch.tensor([*mass, 0.0]), budget, sinks=0, window=1)
    levels = [LADDER.index(resolution) for resolution in held(kv)]
    assert spent(kv) <= budget and levels[-1] == 3
    found = error_of(ladder, levels[:-1], mass)
    left = budget - sizes[-1]
    largest = max(high - low for low, high in itertools.pairwise(sizes))
    choices = list(itertools.product(range(4), repeat=5))
    best = (
        min(
            error_of(ladder, choice, mass)
            for choice in choices
            if sum(sizes[level] for level in choice) <= left - largest
        )
        if left >= largest
        else error_of(ladder, [0] * 5, mass)
    )
    assert found <= best + 1e-12
    assert (
        found
        >= min(error_of(ladder, choice, mass) for choice in choices if sum(sizes[i] for i in choice) <= left) - 1e-12
    )


def test_pages_do_not_flap_between_resolutions():
    kv = paged(*context(40), None)
    budget = 12 * page_bytes(kv)
    gen = torch.Generator().manual_seed(7)
    mass = torch.rand(40, generator=gen) + 0.1
    rebalance(kv, mass, budget, sinks=1, window=3 * PAGE)
    before = held(kv)
    for _ in range(10):
        moves = rebalance(kv, mass * (1 + 0.2 * torch.rand(40, generator=gen)), budget, sinks=1, window=3 * PAGE)
        assert moves.promoted == moves.demoted == () and held(kv) == before


def test_what_no_copy_was_kept_of_is_only_demoted():
    kv = paged(*context(40), None)
    budget = 12 * page_bytes(kv)
    rebalance(kv, torch.linspace(1, 2, 40), budget, sinks=1, window=3 * PAGE, keep_exact=False)
    assert not kv.exact
    before = [LADDER.index(resolution) for resolution in held(kv)]
    moves = rebalance(kv, torch.linspace(2, 1, 40) ** 8, budget, sinks=1, window=3 * PAGE)
    after = [LADDER.index(resolution) for resolution in held(kv)]
    assert not moves.promoted and all(a <= b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("own", ["fp8", "int4", "int4:rotate=false,residual=0,sinks=0", "int2"])
def test_pages_in_a_smaller_format_are_demoted_and_come_back_as_they_were(own):
    kinds = make("tree").summaries
    pool = PagePool(2, 16, 16, torch.float64, torch.device("cpu"), summaries=kinds, kv_format=own)
    kv = PagedKV(pool)
    kv.append(*context(40))
    kv.commit()
    name = pool.format.name
    before = held(kv)
    k = kv.keys(0, kv.length).clone()
    assert before[5:30] == [name] * 25
    ladder = [resolution.name for resolution in kv.ladder(("int2", "int4"))]
    assert ladder == ["summary", *(low for low in ("int2", "int4") if low < name[:4] or name == "fp8"), name, "fp64"]
    window = 4 * PAGE
    least = sum(pool.find(handle)[0].page_bytes for handle in [kv.table[0], *kv.table[35:]])
    rebalance(kv, torch.linspace(1, 0.1, 40), least + 6 * pool.page_bytes(name), sinks=64, window=window)
    assert set(held(kv)[1:35]) <= set(ladder[:-1]) and "summary" in held(kv)
    for _ in range(3):
        rebalance(kv, torch.ones(40), 10**9, sinks=64, window=window)
    assert held(kv) == before and torch.equal(kv.keys(0, kv.length), k) and not kv.exact
