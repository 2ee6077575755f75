"""The bench of schemes over ranks: figures of right outputs alone, over two gloo ranks."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))
from plain import dense
from ranks import Ranks

from longspan.bench.parallel import measure, run, schemes
from longspan.bench.parallel.inputs import Inputs
from longspan.bench.parallel.measure import Asked, WrongOutputError, measured
from longspan.bench.parallel.truth import Row, attended, causal, rows_of
from longspan.distributed.group import Group

INPUTS = Inputs(4, 2, 16, torch.float32, torch.device("cpu"), 0)
ASKED = Asked((300, 64), ("ring", "context_parallel", "star", "torch"), ("prefill", "decode"), INPUTS, 16, 32, 0.01)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"), 2)
    yield started
    started.close()


def bench(group, asked):
    rows, told = [], []
    measured(group, asked, told.append, rows.append)
    return rows, told


def test_rows_of_every_scheme(two):
    (rows, told), (others, _) = two.run(bench, ASKED, size=2)
    wanted = [("prefill", name) for name in ASKED.schemes] + [("decode", "merge")]
    assert [(row["what"], row["scheme"]) for row in rows] == 2 * wanted
    assert [row["length"] for row in rows] == 5 * [300] + 5 * [64] and len(told) == 12
    by = {(row["scheme"], row["length"]): row for row in rows}
    assert by["torch", 300]["skipped"] == "its kernels run on CUDA only"
    for row in rows:
        if "skipped" not in row:
            assert row["error"] < 1e-5 and row["seconds"] > 0 and row["speedup"] > 0 and row["rows_checked"] > 3
    token = 2 * 2 * 16 * 4
    assert by["ring", 300]["sent_bytes"] == by["context_parallel", 300]["sent_bytes"] == 150 * token
    assert by["star", 300]["sent_bytes"] == 0
    assert by["merge", 300]["sent_bytes"] == by["merge", 64]["sent_bytes"] == 4 * (16 + 1) * 4
    assert [row["seconds"] for row in rows if "seconds" in row] == [
        row["seconds"] for row in others if "seconds" in row
    ], "the slowest rank's, on all"
    json.dumps(rows)


def wrong(group, asked):
    made = schemes.SCHEMES["ring"]

    def spoiled(*given):
        way = made(*given)
        return replace(way, attend=lambda q, k, v: way.attend(q, k, v) * 1.001)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(schemes.SCHEMES, "ring", spoiled)
        try:
            bench(group, asked)
        except WrongOutputError as error:
            return str(error)
    return "timed"


def test_a_wrong_output_is_not_timed(two):
    for told in two.run(wrong, ASKED, size=2):
        assert told == "ring at 300: a sampled output differs by 0.001 of its length: not timed"


def test_the_truth_is_dense_attention_and_rows_reach_every_share():
    rows = rows_of(4, 300, 2, 0)
    assert {row.position for row in rows} >= {0, 299} and any(row.position in (149, 150) for row in rows)
    q, k, v = (INPUTS.at(kind, [(0, 300)]) for kind in "qkv")
    assert torch.equal(torch.cat([INPUTS.at("q", [(200, 300)]), INPUTS.at("q", [(0, 7)])], 2)[0, 1, 103], q[0, 1, 3])
    wanted = dense(q, k, v)
    found = attended(Group.alone(), INPUTS, [Row(3, 120), *rows], [(0, 300)], k, v, causal)
    assert (found[0] - wanted[0, 3, 120]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--schemes", "spiral"], "unknown scheme 'spiral': use one of ring, context_parallel, star"),
        (["--heads", "32/5"], "--heads 32/5 are no heads"),
        (["--what", "both"], "unknown part 'both': use one of prefill, decode"),
        (["--seconds", "0"], "--seconds 0.0 is too small"),
        ([], "put `torchrun --nproc-per-node 2 -m` before the module"),
    ],
)
def test_misuse_is_one_line(arguments, told, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_pairs_of_star_are_those_it_sees():
    group = Group.alone()
    star = measure.Star(300, 1, 16, 32)
    way = schemes.scheme("star", group, 300, star)
    keys = torch.arange(300)
    assert way.pairs == sum(int(way.seen(t, keys).sum()) for t in range(300))
