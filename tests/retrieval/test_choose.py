"""Attention mass of tokens and pages, and which pages are chosen by it."""

import pytest
import torch

from longspan.kv.base import PAGE
from longspan.retrieval import choose
from longspan.retrieval.choose import Choice, choose_pages, page_mass, token_mass


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direct(q, k, sinks):
    scores = q.double() @ k.double().T
    scores[:, :sinks] = float("-inf")
    return torch.softmax(scores, 1).mean(0)


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mass_in_blocks_is_one_softmax(monkeypatch, block, sinks, dtype):
    monkeypatch.setattr(choose, "_BLOCK", block)
    queries = {(3, 1): numbers(5, 8), (7, 0): 3 * numbers(1, 8, seed=1)}
    keys = {(3, 1): numbers(131, 8, seed=2, dtype=dtype), (7, 0): numbers(131, 8, seed=3, dtype=dtype)}
    mass = token_mass(queries, keys, sinks=sinks)
    assert mass.shape == (2, 131) and mass.dtype == torch.float32
    for row, head in enumerate(queries):
        torch.testing.assert_close(mass[row].double(), direct(queries[head], keys[head], sinks), atol=1e-6, rtol=1e-4)
    assert (mass[:, :sinks] == 0).all() and (mass[:, sinks:] > 0).all()
    torch.testing.assert_close(mass.sum(1), torch.ones(2))


@pytest.mark.parametrize("block", [2, 1000])
def test_great_scores_do_not_overflow(monkeypatch, block):
    monkeypatch.setattr(choose, "_BLOCK", block)
    q, k = 60 * numbers(3, 8), 60 * numbers(50, 8, seed=1)
    mass = token_mass({(0, 0): q}, {(0, 0): k}, sinks=4)
    torch.testing.assert_close(mass[0].double(), direct(q, k, 4), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_context_of_sinks_alone_has_no_mass(length):
    mass = token_mass({(0, 0): numbers(3, 8)}, {(0, 0): numbers(length, 8)}, sinks=4)
    assert torch.equal(mass, torch.zeros(1, length))


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5])
def test_the_mass_of_a_page_is_that_of_its_tokens(length):
    mass = numbers(3, length).abs()
    pages = page_mass(mass)
    assert pages.shape == (3, -(-length // PAGE))
    for page in range(pages.shape[1]):
        torch.testing.assert_close(pages[:, page], mass[:, page * PAGE : (page + 1) * PAGE].sum(1))
    torch.testing.assert_close(pages.sum(), mass.sum())


def test_pages_come_best_first_and_earlier_among_equals():
    mass = torch.tensor([[0.1, 0.2, 0.0, 0.2, 0.5], [0.1, 0.2, 0.0, 0.2, 0.1]])
    chosen = choose_pages(mass, 4)
    assert [choice.page for choice in chosen] == [4, 1, 3, 0]
    assert [choice.score for choice in chosen] == pytest.approx([0.3, 0.2, 0.2, 0.1])
    assert {choice.by for choice in chosen} == {"heads"}
    assert choose_pages(mass, 2) == chosen[:2]


def test_a_page_without_a_vote_is_not_chosen():
    assert [choice.page for choice in choose_pages(torch.tensor([[0.0, 1.0, 0.0]]), 3)] == [1]
    assert choose_pages(torch.zeros(2, 3), 3) == []
    assert choose_pages(torch.zeros(2, 3), 3, torch.zeros(3), 0.1) == []


def test_words_are_a_vote_of_their_weight():
    mass, words = torch.tensor([[0.6, 0.4, 0.0]]), torch.tensor([0.0, 5.0, 5.0])
    # A page without any of the words has no part in the lexical vote.
    softmax = torch.tensor([0.0, 0.5, 0.5])
    assert [choice.page for choice in choose_pages(mass, 3, words, 0.1)] == [0, 1, 2]
    heavy = choose_pages(mass, 3, words, 1.0)
    assert [choice.page for choice in heavy] == [1, 0, 2]
    assert [choice.score for choice in heavy] == pytest.approx(
        [(0.4 + float(softmax[1])) / 2, 0.3, float(softmax[2]) / 2]
    )
    assert [choice.page for choice in choose_pages(mass, 3, torch.zeros(3), 1.0)] == [0, 1]


def test_who_chose_a_page_is_told():
    mass, words = torch.tensor([[0.5, 0.3, 0.2, 0.0, 0.0]]), torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0])
    chosen = {choice.page: choice.by for choice in choose_pages(mass, 4, words, 1.0)}
    assert chosen == {0: "heads", 1: "heads+lexical", 2: "heads", 3: "lexical"}
    assert [choice.by for choice in choose_pages(mass, 1, words, 1.0)] == ["lexical"]
    assert choose_pages(mass, 1, words, 0.1)[0].by == "heads"


def test_words_alone_choose_where_no_head_votes():
    chosen = choose_pages(torch.zeros(1, 6), 4, torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0, 0.0]), 0.1)
    assert [(choice.page, choice.by) for choice in chosen] == [(2, "lexical"), (0, "lexical")]


def test_a_page_that_neither_ranks_among_its_best_is_chosen_by_both():
    mass, words = torch.tensor([[0.5, 0.3, 0.0]]), torch.tensor([0.0, 7.0, 7.1])
    assert choose_pages(mass, 1, words, 1.0) == [
        Choice(1, pytest.approx(0.3 / 2 + float(torch.softmax(words[1:], 0)[0]) / 2), "heads+lexical")
    ]
