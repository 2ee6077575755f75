"""The program that runs kvpress, without a press: what needs only transformers, against our own dense attention."""

import pytest
import torch

from longspan.attention import make
from longspan.evals.compress import Case, Question
from longspan.evals.compress_ours import Ours, Way
from longspan.evals.haystack import prose
from longspan.peers.kvpress import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def theirs(folder):
    return Model(str(folder), "float32", "cpu")


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokens(prose()[:9000])[:420]


def test_without_a_press_it_scores_as_dense_attention_does(tiny, theirs, tokens):
    (mine,) = Ours(tiny, Way(make("dense"))).run([Case(tokens[:400], None, tuple(tokens[400:]))], [tokens[401:410]])
    asked = {"press": "", "ratio": 1, "tokens": tokens[:400], "score": [tokens[400:], tokens[400:409]], "ask": []}
    found = theirs.answer(asked)
    assert found["scores"][0]["nll"] == pytest.approx(mine.nlls, rel=1e-4)
    assert tuple(found["scores"][1]["likeliest"]) == mine.likeliest
    sizes = tiny.dimensions
    assert found["bytes"] == 400 * sizes.layers * sizes.kv_heads * 2 * sizes.head_dim * 4


def test_without_a_press_it_answers_as_dense_attention_does_and_takes_it_back(tiny, theirs, tokens):
    question = Question("t", tokens[400:410], ("never said, surely",), "all", 6)
    (wanted,) = Ours(tiny, Way(make("dense"))).run([Case(tokens[:400], question)], ())
    ask = {"tokens": question.tokens, "max_tokens": 6, "outputs": list(question.outputs)}
    found = theirs.answer({"press": "", "ratio": 1, "tokens": tokens[:400], "score": [], "ask": [ask, ask]})
    assert tiny.decode(found["answers"][0]) == wanted.answer
    assert found["answers"][0] == found["answers"][1], "the first answer was not taken back"


def test_an_answer_ends_where_its_score_is_full(tiny, theirs, tokens):
    ask = {"tokens": tokens[400:410], "max_tokens": 6, "outputs": ["never said, surely"]}
    asked = {"press": "", "ratio": 1, "tokens": tokens[:400], "score": [], "ask": [ask]}
    whole = theirs.answer(asked)["answers"][0]
    ask["outputs"] = [tiny.decode(whole[:2])]
    assert theirs.answer(asked)["answers"][0] == whole[:2]
    assert not torch.is_inference_mode_enabled()
