"""Vectors compared without what all have in common, and rankings joined by places."""

import pytest
import torch

from longspan.retrieval.dense import DenseIndex
from longspan.retrieval.fusion import fused


def cone(count, dim=24, seed=0):
    """Vectors of a narrow cone: a large common part, one direction in which all differ most, a little of their own."""
    rng = torch.Generator().manual_seed(seed)
    own = torch.randn(count, dim, generator=rng)
    common, loud = torch.randn(2, dim, generator=rng) * torch.tensor([[40.0], [20.0]])
    return own, own + common + torch.randn(count, 1, generator=rng) * loud


def test_what_all_have_in_common_hides_nothing():
    own, vectors = cone(41)
    passages, query = vectors[:40], vectors[40] - own[40] + own[7]
    plain = torch.nn.functional.cosine_similarity(passages, query[None], dim=1)
    assert plain.min() > 0.2, "in the cone all are alike"
    index = DenseIndex(passages)
    assert len(index) == 40 and index.ranking(query)[0] == 7
    scores = index.scores(query)
    assert scores[7] > 0.9 and scores.abs().max() <= 1 + 1e-5 and scores.sort().values[-2] < 0.8


def test_a_vector_scores_the_same_whatever_its_length():
    own, _ = cone(30)
    index = DenseIndex(own)
    far = index.scores(own[3] * 5 - 4 * own.mean(0))
    torch.testing.assert_close(far, index.scores(own[3]))


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_few_passages_are_ranked_too(count):
    own, _ = cone(8)
    ranking = DenseIndex(own[:count]).ranking(own[0] if count else own[1])
    assert sorted(ranking) == list(range(count)) and ranking[:1] == [0][:count]


def test_fused_places_are_the_papers_sums():
    # 1/61 + 1/63, 1/62 + 1/61, 1/63 + 1/64, 1/64 + 1/62: by hand.
    assert fused([[5, 2, 9], [2, 7, 5]]) == [2, 5, 7, 9]
    assert fused([[1, 0], [0, 1]]) == [0, 1], "of equal ones that of the lower number"
    assert fused([]) == fused([[], []]) == [] and fused([[3, 1]]) == [3, 1]


def test_two_middling_places_beat_one_of_them_and_a_last():
    first, second = list(range(20)), [19, *range(5, 19), *range(5)]
    found = fused([first, second])
    assert found[0] == 5 and found.index(0) < found.index(19), "19 is first in one, and last in the other"


def test_what_one_ranking_lacks_is_not_lost():
    """Twenty passages share a word with the question, and the second by meaning shares none."""
    by_words, by_meaning = list(range(20)), [30, 40, *range(19, -1, -1), *range(50, 60)]
    found = fused([by_words, by_meaning])
    assert found[0] == 30 and found.index(40) < 4 and set(range(50, 60)) < set(found[20:])
