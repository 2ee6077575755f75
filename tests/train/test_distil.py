"""Where dense attention looked, cell by cell: sums are those of a plain softmax, spans hold their cells."""

import pytest
import torch

from longspan.attention import make
from longspan.train import distil

SUPER = make("superlinear", window=15, spans=2)


def looked(tokens=200, rows=(40, 77, 199)):
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, tokens, 8, generator=source) for heads in (4, 2))
    return q, k, distil.look(q, k, torch.tensor(rows), SUPER, 0.5, None)


def test_cells_hold_every_key_before_the_newest_anchor_once():
    q, k, found = looked()
    for r, row in enumerate(found.rows.tolist()):
        weights = torch.softmax((q[0, 1, row] @ k[0, 0, : row + 1].T) * 0.5, -1)
        anchors = SUPER.anchors(row)
        assert found.anchors[r][found.valid[r]].tolist() == anchors
        edges = [*anchors, -1]
        for i, cell in enumerate(found.cells[0, 1, r][: len(anchors)]):
            torch.testing.assert_close(cell, weights[edges[i + 1] + 1 : edges[i] + 1].sum(), atol=1e-5, rtol=1e-4)
        assert float(found.cells[0, 1, r][len(anchors) :].abs().sum()) == 0
        for i, anchor in enumerate(anchors):
            lo, hi = SUPER.span(row, anchor)
            assert lo <= edges[i + 1] + 1 and min(anchor, row - SUPER.whole_window) <= hi, "a span holds its cell"


def test_what_the_best_spans_cover_is_the_union_of_their_keys():
    q, k, found = looked()
    scores = distil.search_scores(q[:, :, found.rows], k, found)
    covered = found.covered(SUPER, scores)
    for r, row in enumerate(found.rows.tolist()):
        anchors = SUPER.anchors(row)
        by = torch.stack([q[0, 3, row] @ k[0, 1, a] for a in anchors])
        keys = set()
        for best in by.topk(min(2, len(anchors))).indices.tolist():
            lo, hi = SUPER.span(row, anchors[best])
            keys |= set(range(lo, hi + 1))
        weights = torch.softmax((q[0, 3, row] @ k[0, 1, : row + 1].T) * 0.5, -1)
        torch.testing.assert_close(covered[0, 3, r], weights[sorted(keys)].sum(), atol=1e-5, rtol=1e-4)


def test_the_loss_is_least_where_scores_are_the_targets():
    _, _, found = looked()
    cells = found.cells
    target = torch.log((cells / cells.sum(-1, keepdim=True)).clamp(min=1e-12))
    assert float(distil.divergence(found, target, 1.0)) == pytest.approx(0.0, abs=1e-5)
    assert float(distil.divergence(found, torch.zeros_like(target), 1.0)) > 0.01


def test_rows_without_an_anchor_are_left_out():
    assert looked(rows=(3, 14))[2] is None
    assert looked(rows=(3, 199))[2].rows.tolist() == [199]
