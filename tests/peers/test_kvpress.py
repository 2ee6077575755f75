"""The program that runs kvpress, without a press: what needs only transformers, against our own dense attention."""

import pytest
import torch

from longspan.attention import make
from longspan.evals.compress import Case, Question
from longspan.evals.compress_ours import Ours, Way
from longspan.evals.haystack import prose
from longspan.peers import kvpress
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
    case = {"tokens": tokens[:400], "score": [tokens[400:], tokens[400:409]], "ask": None}
    (found,) = theirs.answer({"press": "", "ratio": 1, "cases": [case]})["cases"]
    assert found["scores"][0]["nll"] == pytest.approx(mine.nlls, rel=1e-4)
    assert tuple(found["scores"][1]["likeliest"]) == mine.likeliest
    sizes = tiny.dimensions
    assert found["bytes"] == 400 * sizes.layers * sizes.kv_heads * 2 * sizes.head_dim * 4


def asks(tokens, lengths, outputs=("never said, surely",), most=6):
    ask = {"tokens": tokens[400:410], "max_tokens": most, "outputs": list(outputs)}
    return {"press": "", "ratio": 1, "cases": [{"tokens": tokens[:n], "score": [], "ask": ask} for n in lengths]}


def test_without_a_press_it_answers_as_dense_attention_does(tiny, theirs, tokens):
    question = Question("t", tokens[400:410], ("never said, surely",), "all", 6)
    lengths = [400, 391, 17]
    wanted = Ours(tiny, Way(make("dense"))).run([Case(tokens[:n], question) for n in lengths], ())
    found = theirs.answer(asks(tokens, lengths))["cases"]
    assert [tiny.decode(each["answer"]) for each in found] == [each.answer for each in wanted]


def test_answers_written_together_are_those_written_alone(theirs, tokens, monkeypatch):
    lengths = [400, 391, 17, 64, 200]
    together = theirs.answer(asks(tokens, lengths))["cases"]
    monkeypatch.setattr(kvpress, "TOGETHER", 1)
    assert theirs.answer(asks(tokens, lengths))["cases"] == together


def test_keys_that_a_press_masks_keep_their_place_when_caches_are_stacked():
    mask = (torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([5, 7]))
    batch, heads, places = kvpress.masks([None, mask], [0, 3])
    assert (batch.tolist(), heads.tolist(), places.tolist()) == ([1, 1], [0, 2], [8, 10])
    assert kvpress.masks([None, None], [0, 3]) is None


def test_an_answer_ends_where_its_score_is_full(tiny, theirs, tokens):
    (whole,) = theirs.answer(asks(tokens, [400]))["cases"]
    asked = asks(tokens, [400, 391], [tiny.decode(whole["answer"][:2])])
    assert theirs.answer(asked)["cases"][0]["answer"] == whole["answer"][:2]
    assert not torch.is_inference_mode_enabled()


def test_layers_may_hold_different_numbers_of_keys(theirs, tokens, monkeypatch):
    def read(self, tokens, name, ratio):
        from transformers import DynamicCache

        cache = DynamicCache()
        self.model.model(input_ids=torch.tensor([tokens]), past_key_values=cache)
        for i, layer in enumerate(cache.layers):
            layer.keys, layer.values = layer.keys[:, :, 3 * i :], layer.values[:, :, 3 * i :]
        return cache, 0

    monkeypatch.setattr(kvpress.Model, "read", read)
    together = theirs.answer(asks(tokens, [400, 391, 200]))["cases"]
    monkeypatch.setattr(kvpress, "TOGETHER", 1)
    assert theirs.answer(asks(tokens, [400, 391, 200]))["cases"] == together
