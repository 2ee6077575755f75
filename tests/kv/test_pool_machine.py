"""Contexts that share a pool, in any order of operations, against plain lists.

After every step: every slot is counted as often as it is referred to and free where it is not, budgets hold exactly
what pages take and never more than their limit, what is free is NaN, and every context reads what it should.
"""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plain_pages import BITS, BLOCK, DIM, HEADS, SUMMARIES, VALUE_DIM, PlainContext, rows_of

from longspan.errors import PoolExhaustedError
from longspan.kv.base import PAGE
from longspan.kv.budget import Budget
from longspan.kv.pages import PagedKV, PagePool
from longspan.kv.rotary import Rotary
from longspan.kv.tables import DROPPED
from longspan.kv.tiers import DISK, HOST, TierLimits, Tiers

ROTARY = Rotary(torch.tensor([1.0, 0.1]))
MOST = 4  # contexts at once
WHICH, SHARE = st.integers(0, MOST - 1), st.floats(0, 1)


class Pages(RuleBasedStateMachine):
    kv_format = None

    @initialize(total=st.sampled_from([None, 12, 30]), each=st.sampled_from([None, 9, 16]))
    def start(self, total, each):
        probe = self.new_pool(None)
        self.page = probe.least_bytes
        self.root = Budget(None if total is None else total * self.page, "whole")
        self.each = None if each is None else each * self.page
        self.pool = self.new_pool(self.root)
        self.contexts, self.next = [], 0
        first = PlainContext(self.kv_format or "fp32", ROTARY)
        self.smaller = [*{first.policy.name} - {"fp32"}, "fp16", "fp8", "int4", "int2"]
        self.add(PagedKV(self.pool, ROTARY, self.session()), first)

    def new_pool(self, budget):
        return PagePool(
            HEADS, DIM, VALUE_DIM, torch.float32, torch.device("cpu"), budget,
            kv_format=self.kv_format, summaries=SUMMARIES, block=BLOCK,
        )  # fmt: skip

    def session(self):
        return self.root if self.each is None else Budget(self.each, "session", self.root)

    def add(self, kv, plain):
        self.contexts.append((kv, plain))

    def pick(self, which):
        return self.contexts[which % len(self.contexts)]

    def refused(self, kv, plain, needed):
        """A refusal must be for want of bytes: `needed` is the most that the change could have taken."""
        left = kv.budget.left
        assert left is not None and needed > left, "refused although there was room"
        assert kv.length == plain.length

    @rule(which=WHICH, count=st.one_of(st.integers(0, 150), st.sampled_from([1, 15, 16, PAGE - 1, PAGE, PAGE + 1])))
    def append(self, which, count):
        kv, plain = self.pick(which)
        if not plain.can_append():
            return
        k, v = rows_of(self.next, count, DIM, 0), rows_of(self.next, count, VALUE_DIM, 5)
        new = -(-(plain.length + count) // PAGE) - -(-plain.length // PAGE)
        due, plain_fresh = plain.due_now() if count else ([], plain.fresh)
        try:
            kv.append(k.unsqueeze(0), v.unsqueeze(0))
        except PoolExhaustedError:
            self.refused(kv, plain, (new + 1) * self.page)  # new pages, and a copy of a shared one
            if self.wrote_down(kv, plain, due):
                plain.fresh = plain_fresh
        else:
            self.next += count
            if self.wrote_down(kv, plain, due):
                plain.fresh = plain_fresh
            plain.append(k, v)

    def wrote_down(self, kv, plain, due):
        """Pages that are old enough are written in the format, or none of them: for want of room beside shared ones."""
        done = [kv.resolution(page) != "fp32" for page in due]
        if not all(done):
            assert not any(done) and kv.budget.limited
            assert any(self.pool.native.references[kv.table[page]] > 1 for page in due), (
                "refused although it saves room"
            )
            return False
        for page in due:
            plain.rewrite(page, plain.policy.name)
        return True

    @rule(which=WHICH, share=SHARE)
    def truncate(self, which, share):
        self.cut(*self.pick(which), lambda plain: int(plain.length * share))

    @rule(which=WHICH)
    def take_back(self, which):
        self.cut(*self.pick(which), lambda plain: plain.committed)

    def cut(self, kv, plain, to):
        length = to(plain)
        kv.truncate(length)
        plain.truncate(length)
        plain.committed = min(plain.committed, length)

    @rule(which=WHICH)
    def commit(self, which):
        kv, plain = self.pick(which)
        due, written = plain.due(plain.written)
        kv.commit()
        if self.wrote_down(kv, plain, due):
            plain.written = written
        plain.committed = plain.length

    @rule(which=WHICH, share=SHARE, count=st.integers(0, 700))
    def replace(self, which, share, count):
        self.commit(which)
        kv, plain = self.pick(which)
        start = int(plain.length // PAGE * share) * PAGE
        k, v = rows_of(self.next, count, DIM, 0), rows_of(self.next, count, VALUE_DIM, 5)
        try:
            kv.replace(start, k.unsqueeze(0), v.unsqueeze(0))
        except PoolExhaustedError:
            self.refused(kv, plain, -(-count // PAGE) * self.page)
            return
        self.next += count
        plain.truncate(start)
        plain.append(k, v)
        due, written = plain.due(plain.written)
        for page in due:
            if page >= start // PAGE:
                plain.rewrite(page, plain.policy.name)
        if self.wrote_down(kv, plain, [page for page in due if page < start // PAGE]):
            plain.written = written
        plain.committed = plain.length

    @rule(which=WHICH, shares=st.tuples(SHARE, SHARE))
    def drop(self, which, shares):
        kv, plain = self.pick(which)
        start, stop = sorted(int(plain.length * share) for share in shares)
        kv.drop(start, stop)
        plain.drop(range(-(-start // PAGE), stop // PAGE))

    @precondition(lambda self: len(self.contexts) < MOST)
    @rule(which=WHICH)
    def fork(self, which):
        kv, plain = self.pick(which)
        budget = self.session()
        try:
            other = kv.fork(budget)
        except PoolExhaustedError:
            assert budget.limit is not None and kv.nbytes > budget.left
            return
        self.add(other, plain.copy())

    @precondition(lambda self: len(self.contexts) < MOST)
    @rule(which=WHICH, counts=st.tuples(st.integers(1, 70), st.integers(1, 70)))
    def go_two_ways(self, which, counts):
        which %= len(self.contexts)
        before = len(self.contexts)
        self.fork(which)
        if len(self.contexts) > before:
            self.append(which, counts[0])
            self.contents()
            self.append(before, counts[1])

    @rule(which=WHICH, question=st.integers(1, 90), answer=st.integers(0, 3))
    def ask(self, which, question, answer):
        self.commit(which)
        self.append(which, question)
        for _ in range(answer):
            self.append(which, 30)
        self.contents()
        self.take_back(which)

    @precondition(lambda self: len(self.contexts) > 1)
    @rule(which=WHICH)
    def free(self, which):
        kv, plain = self.pick(which)
        kv.free()
        assert kv.nbytes == 0
        self.contexts.remove((kv, plain))

    @rule(which=WHICH, chosen=st.sets(st.integers(0, 12)), to=st.integers(0, 5), keep_exact=st.booleans())
    def demote(self, which, chosen, to, keep_exact):
        kv, plain = self.pick(which)
        to = ["summary", *self.smaller][to % (1 + len(self.smaller))]
        pages = sorted(page for page in chosen if page < plain.committed // PAGE)
        try:
            kv.demote(pages, to, keep_exact=keep_exact)
        except PoolExhaustedError:
            self.refused(kv, plain, len(pages) * self.page)
        else:
            plain.demote(pages, to, keep_exact)

    @rule(which=WHICH, chosen=st.sets(st.integers(0, 12)), to=st.integers(-6, 5))
    def promote(self, which, chosen, to):
        kv, plain = self.pick(which)
        to = self.smaller[to % len(self.smaller)] if to >= 0 else None
        pages = sorted(chosen & set(plain.host))
        pages = [page for page in pages if not to or BITS[plain.held[page]] < BITS[to] < BITS[plain.host[page][0]]]
        try:
            kv.promote(pages, to)
        except PoolExhaustedError:
            self.refused(kv, plain, len(pages) * self.page)
        else:
            plain.promote(pages, to)

    @rule(which=WHICH)
    def save_and_restore(self, which):
        kv, plain = self.pick(which)
        saved = {name: tensor.clone() for name, tensor in kv.tensors("x.").items()}
        assert all(tensor.isfinite().all() for tensor in saved.values()), "memory that nothing was written to"
        try:
            kv.restore("x.", plain.length, saved)
        except PoolExhaustedError:
            self.refused(kv, plain, kv.nbytes)  # pages that were shared are its own now
        else:
            plain.committed = plain.length
            plain.written, plain.fresh = plain.due(0)[1], 0
            self.tail_is_cut(kv, plain)

    def tail_is_cut(self, kv, plain):
        """What a copy holds behind the last token is not saved, and has a part in how the page is written anew."""
        last, filled = divmod(plain.length, PAGE)
        if filled and last in plain.host:
            name, parts = plain.host[last]
            found = [kv.copies([last], what)[:, 0] for what in ("k", "v")]
            parts = tuple(torch.cat([a[:, :filled], b[:, filled:]], 1) for a, b in zip(parts, found, strict=True))
            plain.host[last] = name, parts

    @rule()
    def compact(self):
        self.pool.compact()
        assert self.pool.free == 0 and self.pool.nbytes == self.root.used

    def seen(self, plain):
        """Which pages can be read, and the rows that are read."""
        return torch.tensor([held != "summary" for held in plain.held], dtype=torch.bool), plain

    @invariant()
    def slots_and_bytes(self):
        pool, contexts = self.pool, [kv for kv, _ in self.contexts]
        marks = [mark for kv in contexts for mark in kv.blocks.table.slots if mark != DROPPED]
        referred = {plane: [] for plane in pool.planes}
        for kv in contexts:
            held = [pool.find(handle) for handle in kv.table if handle != DROPPED]
            for plane, slot in held:
                referred[plane].append(slot)
            own = sum(plane.page_bytes for plane, _ in held)
            own += pool.marks.page_bytes * sum(mark != DROPPED for mark in kv.blocks.table.slots)
            assert kv.nbytes == own
            if self.each is not None:
                assert kv.budget.used == own <= self.each
        hosted = {plane: [] for plane in pool.below}
        for kv in contexts:
            for host, slot in map(pool.find_below, kv.exact.values()):
                hosted[host].append(slot)
        for plane, slots in [*referred.items(), (pool.marks, marks), *hosted.items()]:
            assert plane.references == [slots.count(slot) for slot in range(plane.slots)]
            assert sorted(plane.free_slots) == [slot for slot in range(plane.slots) if slot not in slots]
            for tensor in plane.tensors.values():
                tensor[:, plane.free_slots] = float("nan") if tensor.is_floating_point() else 0x7F
        memory = sum(len(set(slots)) * plane.page_bytes for plane, slots in referred.items())
        memory += len(set(marks)) * pool.marks.page_bytes
        assert self.root.used == memory
        assert self.root.limit is None or memory <= self.root.limit
        assert self.root.reserved == pool.nbytes
        for kv, plain in self.contexts:
            if plain.length % PAGE and plain.held[-1] == "fp32" and pool.native.references[kv.table[-1]] == 1:
                pool.keys[:, kv.table[-1], plain.length % PAGE :] = float("nan")

    @invariant()
    def contents(self):
        pool = self.pool
        for kv, plain in self.contexts:
            assert kv.length == plain.length
            assert [kv.resolution(page) for page in range(len(kv.table))] == plain.held
            copies = {page: pool.find_below(handle)[0].format.name for page, handle in kv.exact.items()}
            assert copies == {page: name for page, (name, _) in plain.host.items()}
            readable, seen = self.seen(plain)
            said = kv.readable()
            assert readable.all() if said is None else torch.equal(said, readable)
            tokens = readable.repeat_interleave(PAGE)[: plain.length].nonzero().flatten()
            check_reads(kv, seen, tokens)
            for what in SUMMARIES:
                rows = plain.blocks[what]
                dim = VALUE_DIM if what == "mean_value" else DIM
                wanted = torch.stack(rows, 1) if rows else torch.zeros(HEADS, 0, dim)
                torch.testing.assert_close(kv.summary(what, BLOCK)[0], wanted, atol=1e-4, rtol=1e-6)
                coarse = (
                    wanted[:, : plain.length // PAGE * 4].unflatten(1, (-1, 4)) if rows[3:] else wanted[:, :0, None]
                )
                coarse = coarse.mean(2) if "mean" in what else coarse.amin(2) if "low" in what else coarse.amax(2)
                torch.testing.assert_close(kv.summary(what)[0], coarse, atol=1e-4, rtol=1e-6)

    def teardown(self):
        for kv, _ in getattr(self, "contexts", []):
            kv.free()
        if hasattr(self, "pool"):
            assert self.root.used == 0 and self.pool.free == self.pool.slots, "a page leaked"
            assert not any(self.pool.marks.references)
            assert not any(count for host in self.pool.below for count in host.references)


def check_reads(kv, plain, tokens):
    """Everything that can be read: ranges, tokens picked for all heads, tokens that each head picked, rotated."""
    pages = torch.unique(tokens // PAGE)
    cuts = (pages.diff() != 1).nonzero().flatten() + 1
    for run in torch.tensor_split(pages, cuts):
        if run.numel() == 0:
            continue
        start, stop = int(run[0]) * PAGE, min(int(run[-1]) * PAGE + PAGE, plain.length)
        for a, b in ((start, stop), (start + (stop - start) // 3, stop - (stop - start) // 5)):
            assert torch.equal(kv.keys(a, b)[0], plain.k[:, a:b])
            assert torch.equal(kv.values(a, b)[0], plain.v[:, a:b])
            rotated = ROTARY.range(plain.k[:, a:b], a)
            torch.testing.assert_close(kv.keys_at_own_positions(a, b)[0], rotated, atol=1e-4, rtol=1e-6)
    if tokens.numel():
        picked = torch.stack([tokens.flip(0), tokens.roll(3)])[:, ::5]
        wanted_k = torch.stack([plain.k[head, index] for head, index in enumerate(picked)])
        wanted_v = torch.stack([plain.v[head, index] for head, index in enumerate(picked)])
        k, v = kv.gather(picked.unsqueeze(0), rotated=False)
        assert torch.equal(k[0], wanted_k) and torch.equal(v[0], wanted_v)
        k, v = kv.gather(picked.unsqueeze(0), rotated=True)
        torch.testing.assert_close(k[0], ROTARY(wanted_k, picked), atol=1e-4, rtol=1e-6)
        assert torch.equal(kv.gather_keys(picked)[0], plain.k[:, picked])
        assert torch.equal(kv.gather_values(picked)[0], plain.v[:, picked])


class QuantisedPages(Pages):
    kv_format = "fp8"


class PagesOfBits(Pages):
    kv_format = "int4:group=64,residual=100,sinks=1"


class PagesOfFewBits(Pages):
    kv_format = "int2:residual=0,sinks=0"


class PagesInTiers(Pages):
    """Copies in little host memory and a small file, read from there, prefetched at any time."""

    folder = None

    def new_pool(self, budget):
        page = PAGE * HEADS * (DIM + VALUE_DIM) * 4
        self.tiers = Tiers(TierLimits(page, 12 * page, self.folder))
        return PagePool(
            HEADS, DIM, VALUE_DIM, torch.float32, torch.device("cpu"), budget,
            kv_format=self.kv_format, summaries=SUMMARIES, block=BLOCK, tiers=self.tiers,
        )  # fmt: skip

    def add(self, kv, plain):
        kv.reads_below = True
        super().add(kv, plain)
        if not plain.length:  # so that something lies below from the start
            self.read_and_move_down(len(self.contexts) - 1, 380, 0, 0)

    def seen(self, plain):
        seen = plain.copy()
        for page, held in enumerate(plain.held):
            if held == "summary" and page in plain.host:
                filled = min(PAGE, plain.length - page * PAGE)
                seen.put(page, *(part[:, :filled] for part in plain.host[page][1]))
        return torch.tensor([h != "summary" or p in plain.host for p, h in enumerate(plain.held)]).bool(), seen

    def refused(self, kv, plain, needed):
        page = PAGE * HEADS * (DIM + VALUE_DIM) * 4
        assert kv.length == plain.length
        if self.tiers.left(HOST) + self.tiers.left(DISK) >= (needed // self.page + len(kv.exact)) * page:
            super().refused(kv, plain, needed)

    def read_and_move_down(self, which, count, stay, to):
        self.append(which, count)
        self.commit(which)
        full = self.pick(which)[1].length // PAGE
        self.demote(which, set(range(full - stay)), to=to, keep_exact=True)

    @rule(which=WHICH, count=st.integers(1, 250), stay=st.integers(0, 4), to=st.integers(0, 5))
    def move_down(self, which, count, stay, to):
        self.read_and_move_down(which, count, stay, to)

    @rule(which=WHICH, chosen=st.sets(st.integers(0, 12)))
    def move_up(self, which, chosen):
        self.promote(which, chosen, to=-1)

    @rule(which=WHICH, chosen=st.sets(st.integers(0, 6), min_size=2))
    def prefetch(self, which, chosen):
        self.pick(which)[0].prefetch(sorted(chosen))

    @invariant()
    def tiers_hold_what_is_referred_to(self):
        for tier, limit in ((HOST, self.tiers.limits.host), (DISK, self.tiers.limits.disk)):
            used = sum(
                below.page_bytes * sum(count > 0 for count in below.references)
                for below in self.pool.below
                if below.tier == tier
            )
            assert self.tiers.used(tier) == used <= limit

    def teardown(self):
        super().teardown()
        if hasattr(self, "tiers"):
            self.tiers.prefetcher.close()


class QuantisedPagesInTiers(PagesInTiers):
    kv_format = "int4:residual=0,sinks=0"


@pytest.mark.parametrize("machine", [PagesInTiers, QuantisedPagesInTiers])
def test_no_order_of_operations_leaks_or_spoils_a_page_in_tiers(machine, tmp_path):
    from hypothesis.stateful import run_state_machine_as_test

    machine.folder = tmp_path
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert not list(tmp_path.iterdir()), "files have no name"


@pytest.mark.parametrize("machine", [Pages, QuantisedPages, PagesOfBits, PagesOfFewBits])
def test_no_order_of_operations_leaks_or_spoils_a_page(machine):
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
