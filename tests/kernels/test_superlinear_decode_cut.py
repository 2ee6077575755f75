"""How a decode step is cut: into programs that run in whole rounds, with a piece of its own for a few keys over."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from longspan.kernels.held import PAGES
from longspan.kernels.superlinear.triton_decode import cut_for


def cut(longest, rows):
    return cut_for(torch.bfloat16, PAGES, 128, longest, rows).split


@pytest.mark.parametrize("longest,split", [(1027, 256), (2051, 512), (4099, 1024), (8195, 1024)])
def test_spans_of_one_round_are_cut_evenly(longest, split):
    assert cut(longest, 96) == split


@pytest.mark.parametrize("rows", [96, 192, 480])
@pytest.mark.parametrize("longest", [4099, 12957, 40000])
def test_rounds_take_no_longer_than_with_the_usual_pieces(longest, rows):
    def rounds(split):
        return -(-rows * (-(-(longest - 64) // split)) // 396) * split

    assert rounds(cut(longest, rows)) <= rounds(1024) + 64, "rounded up to whole blocks of 64"


def test_ten_million_tokens_take_three_rounds_instead_of_four():
    assert cut(12957, 96) == 1088 and -(-96 * 12 // 396) == 3 < -(-96 * 13 // 396)
